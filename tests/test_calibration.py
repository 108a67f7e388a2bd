"""The machine's calibration: brief at first, whole when that is asked for, dropped where requests keep missing it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from runtime import calibration
from runtime.__main__ import main
from runtime.calibration import IN_A_ROW, SETTLED, Calibration, compare, local, place
from runtime.machine import GPUS, Measured, Rate
from runtime.measuring import CURVES, fit, measure_rates
from runtime.models.costs import Operation, convolution
from runtime.planner import find_model
from runtime.weighing import Job, Setting

CPU = torch.device("cpu")
KINDS = {*CURVES, "linear", "attention", "convolution", "narrow", "upsample"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that nobody has measured."""
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_known", {})
    return tmp_path / "cache" / "machine"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each measurement that was taken is brief; every operation takes a day."""
    found: list[bool] = []

    def measured(device: torch.device, dtype: torch.dtype, *, brief: bool) -> Calibration:
        found.append(brief)
        return Calibration({kind: Rate((86400.0, 0, 0, 0)) for kind in KINDS}, {}, {}, 1e9, brief)

    monkeypatch.setattr(calibration, "measured", measured)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_brief_measurement_knows_every_kind_of_operation(dtype: torch.dtype) -> None:
    assert measure_rates(CPU, dtype, brief=True).keys() == KINDS


def test_a_first_video_is_told_by_a_brief_one(tmp_path: Path, cache: Path) -> None:
    command = ["generate", "a ball", "--size", "64x64", "--frames", "5", "--steps", "1", "--quiet"]
    assert main([*command, "-o", str(tmp_path / "a.gif"), "--receipt", str(tmp_path / "a.json")]) == 0
    predicted = json.loads((tmp_path / "a.json").read_text())["predicted"]
    assert predicted["machine"].endswith(", measured briefly") and predicted["seconds"]["total"] > 0
    assert len(list(cache.glob("*.json"))) == 1


def test_python_and_the_command_line_tell_the_same(taken: list[bool], cache: Path) -> None:
    """What is made in Python is measured for as well, once and briefly, unless nothing is to be foreseen."""
    model = runtime.load("demo")
    request = runtime.Request(prompt="a", width=32, height=32, num_frames=1, steps=1, seed=0)
    assert runtime.generate(model, request, predict=False).receipt.predicted is None and taken == []
    predicted = runtime.generate(model, request).receipt.predicted
    assert predicted is not None and predicted["machine"].endswith(", measured briefly") and taken == [True]
    assert runtime.generate(model, request, predict=False).receipt.predicted is None
    assert runtime.generate(model, request).receipt.predicted is not None and taken == [True]


@pytest.mark.parametrize("task", ["extend", "animate", "long", "edit", "loop"])
def test_every_task_has_a_prediction_and_counts_its_own_steps(task: str, cache: Path, taken: list[bool]) -> None:
    model = runtime.load("demo")
    small = {"width": 32, "height": 32, "steps": 4, "seed": 0}
    clip = runtime.Clip(np.zeros((9, 32, 32, 3), np.uint8))
    asked: dict[str, Any] = {
        "extend": {"clips": (clip,), "direction": "forward", "num_frames": 4, "overlap": 5},
        "animate": {"clips": (runtime.Clip(np.zeros((32, 32, 3), np.uint8)),), "num_frames": 5},
        "long": {"num_frames": 17, "window": 9, "overlap": 5},
        "edit": {"clips": (clip,), "strength": 0.5},
        "loop": {"periodic": True, "num_frames": 8},
    }[task]
    video = runtime.generate(model, runtime.Request(prompt="a", **small, **asked))
    assert video.frames.any()
    receipt = video.receipt
    assert receipt.predicted is not None
    called = receipt.stages["denoise/step"].calls
    each, all_steps = (receipt.predicted["seconds"][stage] for stage in ("step", "denoise"))
    assert all_steps / each == pytest.approx(called, rel=0.5)
    assert receipt.predicted["encoded"] == ("encode" in receipt.stages)
    assert receipt.predicted["windows"] == (3 if task == "long" else 1)


def test_a_whole_one_takes_its_place(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert local(CPU, torch.float32, "none") is None

    def brief(effort: Any) -> bool:
        monkeypatch.setattr(calibration, "_known", {})  # as in a new process
        found = local(CPU, torch.float32, effort)
        assert found is not None and found.name.endswith("briefly") == found.brief
        return found.brief

    assert brief("brief") and brief("brief") and brief("none") and taken == [True]
    assert not brief("whole") and taken == [True, False]
    assert not brief("brief") and not brief("whole") and len(taken) == 2
    assert not brief("anew") and len(taken) == 3


def test_another_process_may_have_taken_it(taken: list[bool]) -> None:
    local(CPU, torch.float32, "brief")
    file = place(CPU, torch.float32)
    file.write_text(file.read_text().replace('"brief": true', '"brief": false'))
    found = local(CPU, torch.float32)
    assert found is not None and not found.brief and taken == [True]


@pytest.mark.parametrize(
    ("ratios", "age", "dropped"),
    [
        ([2.0, 3.0, 1.6], SETTLED, True),
        ([0.5, 0.3, 0.6], SETTLED, True),
        ([1.0, 1.1, 2.0, 3.0, 1.6], SETTLED, True),
        ([2.0, 3.0], SETTLED, False),
        ([2.0, 0.5, 2.0, 0.5, 2.0], SETTLED, False),
        ([1.4, 1.4, 1.4, 1.4], SETTLED, False),
        ([2.0, 2.0, 2.0, 2.0], 0.0, False),
    ],
)
def test_what_keeps_missing_is_dropped(ratios: list[float], age: float, dropped: bool, taken: list[bool]) -> None:
    local(CPU, torch.float32)
    file = place(CPU, torch.float32)
    os.utime(file, (time.time() - age - 1,) * 2)
    assert [compare(CPU, torch.float32, ratio) for ratio in ratios] == [False] * (len(ratios) - 1) + [dropped]
    assert file.exists() != dropped


def test_requests_before_a_measurement_do_not_count_nor_does_rubbish(taken: list[bool]) -> None:
    local(CPU, torch.float32)
    file, log = place(CPU, torch.float32), place(CPU, torch.float32).with_suffix(".ratios")
    begun = time.time() - 2 * SETTLED
    os.utime(file, (begun, begun))
    for ratio in range(2, IN_A_ROW + 1):
        compare(CPU, torch.float32, ratio)
    os.utime(log, (begun - 1, begun - 1))
    assert not compare(CPU, torch.float32, 2.0)
    log.write_text("two\n")
    assert not compare(CPU, torch.float32, 2.0) and log.read_text() == "2.000"


def test_without_a_calibration_nothing_is_compared(cache: Path) -> None:
    assert not compare(CPU, torch.float32, 9.0) and not cache.exists()


def test_requests_drop_a_calibration_made_in_another_world(taken: list[bool], cache: Path) -> None:
    model = runtime.load("demo")
    assert local(CPU, torch.float32) is not None
    for file in cache.iterdir():
        os.utime(file, (time.time() - 2 * SETTLED,) * 2)
    notes = []
    for seed in range(IN_A_ROW):
        request = runtime.Request(prompt="a", width=32, height=32, num_frames=1, steps=2, seed=seed)
        skipping = runtime.generate(model, runtime.Request(**request.record() | {"quality": "fast", "steps": 20}))
        assert skipping.receipt.approximations  # not counted
        notes.append(runtime.generate(model, request).receipt.notes)
    assert notes[:-1] == [[], []] and "measured anew" in notes[-1][0]
    assert not list(cache.iterdir())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_autoencoder_counts_in_the_dtype_that_it_runs_in(device: str, dtype: str) -> None:
    spec, costs = find_model("demo")
    rates, vae_rates = ({kind: Rate((seconds, 0, 0, 0)) for kind in KINDS} for seconds in (1.0, 100.0))
    capability = (9, 0) if device == "cuda" else (0, 0)
    machine = Measured("bench", 10**12, rates, vae_rates, capability=capability)
    request = runtime.Request(prompt="a", seed=0).resolved(spec)
    setting = Setting(dtype=dtype, itemsize=4 if dtype == "float32" else 2, memory=10**12)
    size = 2 if device == "cuda" and dtype != "float32" else 4
    job = Job(spec, costs, request, machine, setting)
    assert job.vae_itemsize == size
    wide = job.costs.decode(job.latents, None, 4, parked=device == "cuda")
    works = job.works(None)
    assert works["decode"].bytes == pytest.approx(wide.bytes * size / 4)
    assert machine.seconds(works["decode"], "decode") == 100 * sum(each.count for each in wide.operations)
    assert machine.seconds(works["step"], "step") == sum(each.count for each in works["step"].operations)
    named = Job(spec, costs, request, GPUS["h200"], setting)
    assert named.vae_itemsize == (4 if dtype == "float32" else 2)


def test_what_no_weights_explain_is_told_by_its_neighbours() -> None:
    """A rate that halves from some size on, as where a cache ends: between two samples as they are."""

    def taken(flops: float) -> float:
        return 1e-5 + flops * (1e-11 if flops < 1e9 else 2e-11)

    operations = [Operation("convolution", flops, flops / 100) for flops in (1e7, 1e8, 3e8, 5e8, 2e9, 3e9, 1e10)]
    rate = fit([(each, taken(each.flops)) for each in operations])["convolution"]
    for flops in (1e8, 4e8, 2.5e9, 1e10, 1e12):
        foreseen = sum(rate.parts(Operation("convolution", flops, flops / 100)))
        assert foreseen == pytest.approx(taken(flops), rel=0.1)
    bare = replace(rate, samples=())
    assert any(abs(sum(bare.parts(each)) / taken(each.flops) - 1) > 0.2 for each in operations)


def test_lanes_that_no_channel_fills_take_time_and_are_no_flops() -> None:
    rate = Rate(weights=(0.0, 1e-11, 0.0, 0.0))
    few, full = (convolution("convolution", 4096, 27, 32, outputs, 4) for outputs in (3, 16))
    assert few.flops == 2 * 4096 * 27 * 32 * 3
    assert sum(rate.parts(few)) == sum(rate.parts(full)) == pytest.approx(1e-11 * full.flops)


def test_a_calibration_is_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibration.calibration(CPU, torch.float32, "brief")
    monkeypatch.setattr(calibration, "_known", {})
    assert found is not None and found.rates["convolution"].samples
    assert calibration.calibration(CPU, torch.float32, "none") == found
