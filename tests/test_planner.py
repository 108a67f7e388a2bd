"""The planner: the ideal times that were computed by hand, what fits, what is chosen, and how it refuses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.__main__ import main
from runtime.machine import GPUS, Measured, Rate
from runtime.models import published, published_names
from runtime.offload import Offload, choices
from runtime.planner import find_model, parse_bytes, plan_request
from runtime.prediction import GIB, STAGES, duration, table
from runtime.request import Request
from runtime.weighing import Job, Setting, predict

# facts: FLOPs per pass, and ideal seconds of a pass, a guided step and 50 of them on an H200 at 790 TFLOP/s
IDEAL = [
    ("wan2.1-t2v-1.3b", 832, 480, 32760, 283.0, 0.358, 0.716, 35.8),
    ("wan2.1-t2v-1.3b", 1280, 720, 75600, 1249.8, 1.582, 3.164, 158.2),
    ("wan2.1-t2v-14b", 832, 480, 32760, 1678.4, 2.124, 4.249, 212.5),
    ("wan2.1-t2v-14b", 1280, 720, 75600, 6523.4, 8.257, 16.515, 825.8),
]


@pytest.mark.parametrize(("name", "width", "height", "tokens", "teraflops", "one", "step", "all_steps"), IDEAL)
def test_h200_has_the_ideal_times_of_the_limits(
    name: str, width: int, height: int, tokens: int, teraflops: float, one: float, step: float, all_steps: float
) -> None:
    found = plan_request(name, width=width, height=height, num_frames=81, steps=50, gpu="h200")
    assert found.tokens == tokens
    assert found.flops["forward"] / 1e12 == pytest.approx(teraflops, rel=1e-3)
    assert found.flops["forward"] / 790e12 == pytest.approx(one, rel=2e-3)
    assert found.seconds["step"] == pytest.approx(step, rel=2e-3)
    assert found.seconds["denoise"] == pytest.approx(all_steps, rel=2e-3)
    assert found.bound["step"] == "compute"
    assert found.choices["offload"]["transformer"] == "resident"


@pytest.mark.parametrize(
    ("name", "width", "height", "frames", "teraflops", "seconds"),
    [
        ("wan2.1-t2v-1.3b", 832, 480, 81, 275.4, 0.349),
        ("wan2.1-t2v-14b", 1280, 720, 81, 639.2, 0.809),
        ("wan2.1-t2v-14b", 1280, 704, 61, 471.2, 0.596),
        ("wan2.2-ti2v-5b", 1280, 704, 121, 2011.1, 2.546),
    ],
)
def test_h200_has_the_ideal_decoding_of_the_limits(
    name: str, width: int, height: int, frames: int, teraflops: float, seconds: float
) -> None:
    found = plan_request(name, width=width, height=height, num_frames=frames, gpu="h200")
    assert found.flops["decode"] / 1e12 == pytest.approx(teraflops, rel=1e-3)
    assert found.seconds["decode"] == pytest.approx(seconds, rel=3e-3)


def test_5b_and_the_text_encoder_have_the_numbers_of_the_limits() -> None:
    found = plan_request("wan2.2-ti2v-5b", gpu="h200")
    assert (found.width, found.height, found.frames, found.steps) == (1280, 704, 121, 50)
    assert found.tokens == 27280
    assert found.flops["forward"] / 1e12 == pytest.approx(517, rel=1e-3)
    assert found.seconds["denoise"] == pytest.approx(65.4, rel=2e-3)
    assert found.flops["text"] / 1e12 == pytest.approx(4.8, rel=0.02)
    assert found.weights_bytes["text_encoder"] / 2 / 1e9 == pytest.approx(4.63 + 1.05, rel=0.01)
    assert found.flops["total"] == pytest.approx(
        2 * found.flops["text"] + 100 * found.flops["forward"] + found.flops["decode"]
    )


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("name", "width", "height", "frames", "teraflops", "decoded"), [
    ("wan2.1-t2v-1.3b", 832, 480, 81, 283.0, 275.4),
    ("wan2.1-t2v-1.3b", 1280, 720, 81, 1249.8, 639.2),
    ("wan2.1-t2v-14b", 832, 480, 81, 1678.4, 275.4),
    ("wan2.1-t2v-14b", 1280, 720, 81, 6523.4, 639.2),
    ("wan2.2-ti2v-5b", 1280, 704, 121, 517, 2011.1),
])  # fmt: skip
def test_every_column_has_the_ideal_times_at_its_own_peaks(
    name: str, width: int, height: int, frames: int, teraflops: float, decoded: float, gpu: str
) -> None:
    """Where weights stay: nothing but arithmetic at the device's rate, since all of it hides the traffic."""
    peak = GPUS[gpu].flops / 1e12
    found = plan_request(name, width=width, height=height, num_frames=frames, steps=50, gpu=gpu)
    assert found.seconds["step"] == pytest.approx(2 * teraflops / peak, rel=2e-3)
    assert found.seconds["denoise"] == pytest.approx(100 * teraflops / peak, rel=2e-3)
    if found.choices["tiles"] is None:
        assert found.seconds["decode"] == pytest.approx(decoded / peak, rel=3e-3)
    if found.choices["offload"]["text_encoder"] == "resident":
        traffic = 2 * (2 * 4.63e9 + 2e9) / GPUS[gpu].bandwidth
        assert 2 * 4.8 / peak * 0.99 <= found.seconds["text"] <= max(2 * 4.9 / peak, traffic)
    bf16 = replace(GPUS[gpu], name="twice", flops=2 * GPUS[gpu].flops)  # fp8's assumed peak halves all of it
    spec, costs = find_model(name)
    asked = Request(prompt="a", seed=0, width=width, height=height, num_frames=frames, steps=50).resolved(spec)
    fp8 = Job(spec, costs, asked, bf16, Setting(dtype="bfloat16", itemsize=2, memory=2**40))
    assert fp8.seconds(Offload(), None)["denoise"] == pytest.approx(50 * teraflops / peak, rel=2e-3)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", published_names())
def test_every_published_model_is_planned_for_every_gpu_without_weights(name: str, gpu: str) -> None:
    found = plan_request(name, width=832, height=480, num_frames=49, gpu=gpu)
    for stage in STAGES:
        assert found.seconds[stage] > 0
        assert found.peak_bytes[stage] > 0
        assert found.bound[stage] in ("compute", "memory")
    assert found.most <= found.memory
    assert f"{found.tokens:,} tokens" in table(found)


@given(
    name=st.sampled_from(published_names()),
    gpu=st.sampled_from(sorted(GPUS)),
    memory=st.none() | st.integers(8, 80),
    frames=st.sampled_from([1, 5, 17, 81, 121, 241, 961]),
    size=st.sampled_from([(1920, 1080), (1280, 720), (720, 1280), (832, 480), (338, 190), (64, 64), (2048, 64)]),
    guidance=st.sampled_from([None, 1.0]),
)
@settings(deadline=None, max_examples=20)
def test_nothing_that_is_told_surprises(
    name: str, gpu: str, memory: int | None, frames: int, size: tuple[int, int], guidance: float | None
) -> None:
    asked = {"width": size[0], "height": size[1], "num_frames": frames, "guidance": guidance}
    found, told = None, ""
    try:
        found = plan_request(name, gpu=gpu, memory=memory and f"{memory}GiB", **asked)
    except ValueError as refused:
        told = str(refused)
    if found is None:
        assert "legal is what fits: take --" in told
        return
    assert found.frames == frames and (found.windows > 1) == (frames == 961)
    for numbers in (found.flops, found.seconds, found.bytes, found.peak_bytes):
        assert all(math.isfinite(number) and number > 0 for number in numbers.values())
    run = ["text", "denoise", "decode", *["encode"] * found.encoded]
    assert found.seconds["total"] == pytest.approx(sum(found.seconds[stage] for stage in run))
    assert found.seconds["denoise"] >= found.seconds["step"] * (found.steps - 1)
    assert max(found.peak_bytes[stage] for stage in run) == found.most <= found.memory
    offload = found.choices["offload"]
    assert (offload["transformer"] == "resident") == (offload["blocks"] is None)
    assert (found.choices["engine"] == "cuda_graph") == (offload["blocks"] is None)
    told = table(found)
    assert f"{found.frames:,} frame" in told and "e+" not in told and "nan" not in told
    assert ("encode only with a clip" in told) != found.encoded


def test_a_minute_counts_all_its_windows() -> None:
    """Each but the first knows the last frames of the one before: they are encoded, and blended in step by step."""
    once = plan_request("wan2.1-t2v-1.3b", width=832, height=480, num_frames=81, gpu="h200")
    minute = plan_request("wan2.1-t2v-1.3b", width=832, height=480, num_frames=961, gpu="h200")
    assert (once.windows, once.encoded, minute.windows, minute.encoded) == (1, False, 16, True)
    assert minute.tokens == once.tokens and minute.seconds["step"] == once.seconds["step"]
    assert minute.seconds["text"] == once.seconds["text"]
    assert 14 * once.seconds["decode"] < minute.seconds["decode"] < 16 * once.seconds["decode"]
    with pytest.raises(ValueError, match=r"with 81 frames at once of .*; legal is what fits: take --window \d+, or"):
        plan_request("wan2.1-t2v-14b", width=1280, height=720, num_frames=961, gpu="4090", memory="8GiB")
    passes = 1 + 14 * 99 / 50  # 14 whole windows more, whose steps but the last are taken twice, and what is left
    assert passes < minute.seconds["denoise"] / once.seconds["denoise"] < passes + 99 / 50
    assert minute.flops["denoise"] == pytest.approx(minute.seconds["denoise"] * 790e12)


def test_models_that_go_on_from_pictures_are_planned_without_one_and_encode_it() -> None:
    for name, encoded in (("wan2.1-i2v-14b", True), ("wan2.1-vace-1.3b", True), ("wan2.2-ti2v-5b", False)):
        found = plan_request(name, gpu="h200")
        assert found.encoded == encoded, name


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.0123, "12.3 ms"), (0.9994, "999 ms"), (0.9996, "1 s"), (1.5, "1.5 s"), (825.8, "826 s"), (999.4, "999 s"),
     (3550, "59.2 min"), (7199, "120 min"), (7200, "2 h"), (86400, "24 h"), (172800, "2 days"), (1e9, "11,574 days")],
)  # fmt: skip
def test_seconds_are_told_as_people_do(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_json_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--size", "1280x720", "--frames", "81", "--steps", "50", "--gpu", "h200", "--json"]
    assert main(["plan", "--model", "wan2.1-t2v-14b", *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 75600
    assert found["flops"].keys() >= {"text", "forward", "decode", "total"}
    for part in ("seconds", "peak_bytes", "bound", "bytes"):
        assert found[part].keys() >= {"text", "step", "decode", "encode"}
    assert found["choices"].keys() >= {"engine", "attention", "offload", "tiles"}


def test_a_refusal_names_the_nearest_that_fits_and_that_one_fits(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "wan2.1-t2v-14b", "--gpu", "4090", "--memory", "8GiB", "--size", "1280x720"]
    assert main([*asked, "--frames", "81"]) == 2
    told = capsys.readouterr().err
    assert "1280x720 with 81 frames" in told and "8.00 GiB may be used" in told
    frames, size, memory = (
        re.search(pattern, told)[1] for pattern in (r"--frames (\d+)", r"--size (\d+x\d+)", r"--memory ([\d.]+GiB)")
    )  # type: ignore[index]
    assert main([*asked, "--frames", frames]) == 0
    assert main([*asked, "--frames", str(int(frames) + 4)]) == 2
    assert main([*asked[:-1], size, "--frames", "81"]) == 0
    assert main([*asked[:-3], memory, *asked[-2:], "--frames", "81"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "wan9"], "wan2.1-t2v-14b"),
        (["--model", "wan2.1-t2v-14b", "--gpu", "h900"], "legal: h200"),
        (["--model", "wan2.1-t2v-14b", "--gpu", "h200", "--memory", "much"], "24GiB"),
        (["--model", "wan2.1-t2v-14b", "--gpu", "h200", "--size", "833x480"], "832x480"),
        (["--model", "wan2.1-t2v-14b", "--gpu", "h200", "--frames", "80"], "77 or 81"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "count"), [("24GiB", 24 * GIB), ("1.5 GiB", 3 * GIB // 2), ("800MiB", 800 * 2**20), ("12GB", 12 * 10**9)]
)
def test_bytes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def job(name: str, memory: int, machine: Any = GPUS["4090"], **asked: Any) -> Job:
    spec, costs = find_model(name)
    request = Request(prompt="x", seed=0, **asked).resolved(spec)
    return Job(spec, costs, request, machine, Setting(dtype="bfloat16", itemsize=2, memory=memory))


@given(
    name=st.sampled_from(["wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b"]),
    memory=st.integers(6, 90),
    frames=st.integers(0, 20).map(lambda n: 1 + 4 * n),
    size=st.sampled_from([(832, 480), (480, 832), (1280, 720), (256, 256)]),
)
@settings(deadline=None, max_examples=25)
def test_what_is_chosen_keeps_the_budget_and_more_memory_is_never_slower(
    name: str, memory: int, frames: int, size: tuple[int, int]
) -> None:
    spec, costs = find_model(name)
    request = Request(prompt="x", seed=0, width=size[0], height=size[1], num_frames=frames).resolved(spec)

    def predicted(gibibytes: int) -> Any:
        try:
            return predict(
                spec, costs, request, GPUS["4090"], Setting(dtype="bfloat16", itemsize=2, memory=gibibytes * GIB)
            )
        except ValueError:
            return None

    little, much = predicted(memory), predicted(memory + 10)
    if little is not None:
        assert little.most <= memory * GIB
        assert much is not None and much.seconds["total"] <= little.seconds["total"] * (1 + 1e-9)


def test_weights_leave_the_device_in_order_of_what_they_cost() -> None:
    found = published("wan2.2-t2v-a14b")
    assert found is not None
    _, costs = found
    ways = choices(costs.transformer, 2)
    assert ways[0] == Offload() and ways[3] == Offload("resident", 40) and ways[-1] == Offload("streamed", 0)
    held = [way.transformer_bytes(costs.transformer, 2, 2) for way in ways]
    assert held == sorted(held, reverse=True)
    assert ways[0].coming_bytes(costs.transformer, 2) == ways[3].coming_bytes(costs.transformer, 2) == 0
    assert ways[-1].coming_bytes(costs.transformer, 2) == 40 * costs.transformer.block_bytes(2)


def test_streamed_blocks_hide_behind_arithmetic_or_bound_the_step() -> None:
    small = predict_with("wan2.1-t2v-14b", Offload("streamed", 0), width=256, height=256, num_frames=1)
    large = predict_with("wan2.1-t2v-14b", Offload("streamed", 0), width=832, height=480, num_frames=81)
    blocks = 40 * find_model("wan2.1-t2v-14b")[1].transformer.block_bytes(2)
    assert small.seconds["step"] == pytest.approx(blocks / 32e9)
    assert large.seconds["step"] == pytest.approx(2 * large.flops["forward"] / GPUS["4090"].flops)


def predict_with(name: str, offload: Offload, **asked: Any) -> Any:
    spec, costs = find_model(name)
    request = Request(prompt="x", seed=0, **asked).resolved(spec)
    setting = Setting(dtype="bfloat16", itemsize=2, memory=64 * GIB, offload=offload)
    return predict(spec, costs, request, GPUS["4090"], setting)


def test_predicted_steps_and_weights_in_8_bits_count_less() -> None:
    spec, costs = find_model("wan2.1-t2v-14b")
    asked = Request(prompt="a", width=832, height=480, num_frames=81, steps=50, seed=0).resolved(spec)
    setting = Setting(dtype="bfloat16", itemsize=2, memory=GPUS["h200"].memory)
    full, fewer, narrow = (
        predict(spec, costs, asked, GPUS["h200"], replace(setting, **more))
        for more in ({}, {"computed": 20}, {"fp8": True})
    )
    assert fewer.seconds["denoise"] == pytest.approx(0.4 * full.seconds["denoise"])
    assert fewer.seconds["decode"] == full.seconds["decode"]
    layers = 40 * (6 * 5120**2 + 2 * 5120 * 13824)
    rows = 40 * (7 * 5120 + 13824)
    assert full.weights_bytes["transformer"] - narrow.weights_bytes["transformer"] == layers - 4 * rows
    assert full.peak_bytes["denoise"] - narrow.peak_bytes["denoise"] == layers - 4 * rows
    spared = 2 * 2 * layers * 32760 / 2 / GPUS["h200"].flops  # both prompts, at half the time
    assert full.seconds["step"] - narrow.seconds["step"] == pytest.approx(spared)
    assert narrow.flops == full.flops and not full.notes and "not measured" in narrow.notes[0]
    older = predict(spec, costs, asked, GPUS["a100"], replace(setting, fp8=True))
    assert (
        older.seconds == predict(spec, costs, asked, GPUS["a100"], setting).seconds and "not foreseen" in older.notes[0]
    )
    small = replace(setting, memory=24 * GIB)
    assert predict(spec, costs, asked, GPUS["4090"], small).choices["offload"]["transformer"] == "streamed"
    found = predict(spec, costs, asked, GPUS["4090"], replace(small, fp8=True))
    assert found.choices["offload"]["transformer"] == "resident"


def test_a_measured_machine_adds_up_what_is_executed() -> None:
    rate = Rate(weights=(0.0, 1e-11, 0.0, 0.0))
    kinds = ("linear", "attention", "convolution", "narrow", "upsample")
    curve = Rate(curve=((1.0, 1e-12), (2.0, 2e-12)))
    swept = ("modulate", "gate_residual", "qk_norm_rope", "norm_silu", "pass")
    rates = dict.fromkeys(kinds, rate) | dict.fromkeys(swept, curve)
    machine = Measured("bench", 10**12, rates, rates)
    spec, costs = find_model("demo")
    request = Request(prompt="x", seed=0).resolved(spec)
    setting = Setting(dtype="float32", itemsize=4, memory=10**12, text_tokens=(1, 5))
    found = predict(spec, costs, request, machine, setting)
    assert found.basis == "measured"
    assert found.executed["total"] < found.flops["total"]
    assert found.seconds["total"] == pytest.approx(1e-11 * found.executed["total"], rel=0.01)
    assert torch.float32.itemsize == setting.itemsize
