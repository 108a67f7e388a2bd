"""`python -m benchmarks`: what it writes and prints, and that it refuses unequal results. No timing is judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import machine, random_model, sides, stages
from benchmarks.__main__ import main
from benchmarks.measure import Refused, alternate, check_equal, check_psnr, median_ratio

ROOT = Path(__file__).parent.parent
SIZE = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "2"]
QUICK = ["stages", "--model", "demo", "--repeats", "1", "--threads", "1", *SIZE]
COUNTS = {"request": 1, "step": 4, "decode": 2, "decode_bfloat16": 2, "encode": 2, "text": 4}


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


def check_model(model: dict[str, Any], names: list[str], only: list[str]) -> None:
    """Check what holds for every model in a file of results of one repeat."""
    assert model["name"] == "demo"
    assert 7.0e6 < model["parameters"]["transformer"] < 7.1e6
    asked = {key: model["request"][key] for key in ("width", "height", "num_frames", "steps", "guidance")}
    assert asked == {"width": 32, "height": 32, "num_frames": 5, "steps": 2, "guidance": 4.0}
    assert 0 <= model["difference"] <= 1
    assert list(model["stages"]) == only
    for stage, found in model["stages"].items():
        if stage == "decode_bfloat16":
            assert 50 < found["psnr"] < 90
        else:
            assert 0 <= found["difference"] <= (1 if stage in ("request", "decode") else 1e-3)
        assert list(found["seconds"]) == names
        for samples in found["seconds"].values():
            assert len(samples) == COUNTS[stage]
            assert min(samples) > 0
        assert found["ratio"] > 0
    assert list(model["memory"]) == [stage for stage in ("request", "decode", "decode_bfloat16") if stage in only]
    if sys.platform == "linux":
        for runs in (runs for stage in model["memory"].values() for runs in stage.values()):
            assert len(runs) == 1
            assert runs[0]["before"] > 2**20
            assert 0 <= runs[0]["growth"] < 2**30


def test_command_against_diffusers(tmp_path: Path) -> None:
    file, cache = tmp_path / "new" / "results.json", tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *QUICK, "--against", "diffusers", "--only", "request", "--json", file],
        cwd=ROOT, env={**os.environ, "DIT_RUNTIME_CACHE": str(cache)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not cache.exists()

    record = json.loads(file.read_text())
    assert record["sides"] == ["dit-runtime", "diffusers"]
    assert record["dtype"] == "float32"
    assert record["machine"]["threads"] == 1
    assert record["machine"]["versions"]["torch"] == torch.__version__
    (model,) = record["models"]
    check_model(model, record["sides"], ["request"])

    assert "largest difference of frames" in done.stderr
    first, *lines = done.stdout.strip().splitlines()
    name, versions = record["machine"]["name"], f"torch {torch.__version__}, diffusers "
    for part in (name, "1 thread,", versions, "float32", f"commit {record['machine']['commit']}"):
        assert part in first
    head, rule, request, *memory = [line for line in lines if line.startswith("|")]
    assert head == "|  | dit-runtime | diffusers | ratio |"
    assert rule == "| --- | ---: | ---: | ---: |"
    number = r"\d[\d.]*"
    cell = rf"{number} (ms|s|MiB) \({number} to {number}\)"
    assert re.fullmatch(rf"\| whole request \| {cell} \| {cell} \| {number} \|", request)
    if sys.platform == "linux":
        assert re.fullmatch(rf"\| peak memory added, whole request \| {cell} \| {cell} \| {number} \|", memory[0])


def test_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Memory is measured in this process here: starting four takes longer than everything else.
    monkeypatch.setattr(stages, "fresh_process", lambda function, *arguments: function(*arguments))
    file = tmp_path / "r.json"
    assert main([*QUICK, "--against", "diffusers", "--json", str(file)]) == 0
    (model,) = json.loads(file.read_text())["models"]
    check_model(model, ["dit-runtime", "diffusers"], list(COUNTS))
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert re.fullmatch(r"VAE decode, ours in bfloat16 \(\d\d\.\d dB\)", rows.pop(5))
    assert rows[2:7] == ["whole request", "one guided step", "VAE decode", "VAE encode", "text encoding"]


def test_the_autoencoder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only decode and encode: no whole request, and beside the demo an autoencoder of Wan 2.1's size."""
    monkeypatch.setattr(stages, "fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setitem(random_model.KINDS, "vae", (32, 1, 1, 8))
    file = tmp_path / "r.json"
    command = [part for part in QUICK if part not in ("--model", "demo")]
    assert main([*command, "--only", "decode", "--json", str(file)]) == 0
    demo, vae = json.loads(file.read_text())["models"]
    assert (demo["name"], vae["name"]) == ("demo", "vae")
    assert list(vae["stages"]) == list(vae["memory"]) == ["decode", "decode_bfloat16"]
    assert demo["difference"] is None


def test_psnr_below_the_bar_is_refused() -> None:
    assert check_psnr(50.5) == 50.5
    for found in (49.9, float("nan")):
        with pytest.raises(Refused, match="the bar is 50 dB"):
            check_psnr(found)


def test_one_side_and_one_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--only", "text", "--json", str(tmp_path / "r.json")]) == 0
    (model,) = json.loads((tmp_path / "r.json").read_text())["models"]
    assert model["difference"] is model["stages"]["text"]["ratio"] is None
    assert list(model["stages"]) == ["text"]
    assert not model["memory"]
    printed = capsys.readouterr().out
    assert "|  | dit-runtime |\n| --- | ---: |\n| text encoding | " in printed
    assert "ratio" not in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "request,dekode"], "dekode: legal are request, step, decode, encode, text"),
        (["--repeats", "0"], "legal is a whole number of at least 1"),
        (["--threads", "two"], "legal is a whole number of at least 1"),
        (["--model", "no-such-model"], "no model 'no-such-model'"),
        (["--model", "demo", "--frames", "6"], "take 5 or 9"),
    ],
)
def test_wrong_options(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(["stages", *arguments]))  # argparse exits by itself
    assert says in capsys.readouterr().err


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.sides.installed", lambda package: None)
    monkeypatch.setattr("benchmarks.stages.installed", lambda package: None)
    assert main(["stages", "--model", "demo", "--against", "diffusers"]) == 2
    assert "diffusers is not installed; install it with: pip install diffusers" in capsys.readouterr().err
    assert main(["stages"]) == 2
    assert "take --model demo" in capsys.readouterr().err


def test_unequal_results_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = sides.Ours.request
    monkeypatch.setattr(sides.Ours, "request", lambda self, take: ours(self, take) ^ 2)
    file = tmp_path / "r.json"
    assert main([*QUICK, "--against", "diffusers", "--json", str(file)]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert not file.exists()
    assert re.search("no speeds: the result of request differs by up to [23] of 255", printed.err)


def test_check_equal() -> None:
    frames = np.full((2, 4, 4, 3), 7, np.uint8)
    assert check_equal("x", frames, frames - 1) == 1
    with pytest.raises(Refused, match="2 of 255"):
        check_equal("x", frames, frames + 2)
    ones = torch.ones(3)
    assert check_equal("x", [ones, ones], [ones, ones * 1.0001]) == pytest.approx(1e-4, rel=0.01)
    for other in (ones * 1.01, ones * float("nan"), torch.ones(4)):
        with pytest.raises(Refused):
            check_equal("x", ones, other)


def test_alternate_takes_turns() -> None:
    order: list[tuple[str, int]] = []
    seconds = alternate([lambda n: order.append(("a", n)), lambda n: order.append(("b", n))], [3, 4])
    assert order == [("a", 3), ("b", 3), ("a", 4), ("b", 4)]
    assert [len(samples) for samples in seconds] == [2, 2]
    assert median_ratio([1, 2, 4], [2, 2, 40]) == 2


def test_results_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "benchmarks" / "results")
    cpu = {"name": "Intel(R) Xeon(R) Processor", "device": "cpu", "logical_cores": 2, "commit": "c0ffee1",
           "date": "2026-11-22T10:00:00+00:00"}  # fmt: skip
    folder = tmp_path / "benchmarks" / "results"
    first = machine.results_file(cpu)
    assert first == folder / "cpu-intel-xeon-processor-2-cores" / "2026-11-22-c0ffee1.json"
    first.parent.mkdir(parents=True)
    first.touch()
    assert machine.results_file(cpu).name == "2026-11-22-c0ffee1-2.json"
    gpu = machine.results_file({**cpu, "name": "NVIDIA H200", "device": "cuda"})
    assert gpu.parent == folder / "h200"
