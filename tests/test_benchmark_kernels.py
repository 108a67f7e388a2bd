"""`benchmarks kernels` and `tools/gpu.py` as far as they go without a GPU: limits, judging, tables, refusals."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import kernels, pairs
from benchmarks.baselines import Bar, baselines
from benchmarks.kernels import limit, measure, table
from benchmarks.pairs import paired
from runtime.kernels.cases import CASES, Case, cases
from runtime.kernels.verdicts import made

CPU = torch.device("cpu")
MACHINE = {"name": "a GPU", "versions": {"torch": "2"}, "commit": "abc"}


def clocked(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Stand in for the GPU's clock: every version runs once; each is slower than the one before."""
    for call in calls.values():
        call()
    return {name: [1e-3 * (count + 1)] * 3 for count, name in enumerate(calls)}


@pytest.fixture
def off_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "timed", clocked)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def small(operation: str) -> Case:
    """The first small case that has numbers, with a limit as real ones have."""
    found = next(case for case in cases(operation, real=False) if "x" in case.name and not case.name.startswith("0"))
    return Case(operation, found.name, found.make, real=True, bytes=10**9)


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="Triton compiles here")
def test_measured_and_shown(off_gpu: None) -> None:
    found = measure(small("modulate"), CPU)
    assert not found["wrong"]
    assert list(found["seconds"])[:2] == ["reference", "triton"] and "torch.compile" in found["seconds"]
    lines = table({"machine": MACHINE, "kernels": [found], "left_out": ["mlp wan-14b 480p"]}).splitlines()
    ours = next(line for line in lines if "| triton |" in line)
    assert "| 2000 us | 0.50 TB/s | 12% |" in ours and "3.7 TB/s: missed" in ours
    assert any("Left out when the time was up: mlp wan-14b 480p" in line for line in lines)


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="Triton compiles here")
def test_wrong_results_have_no_speed(off_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.run

    def broken(operation: str, implementation: str | None, arguments: dict[str, Any]) -> list[torch.Tensor]:
        outputs = real(operation, implementation, arguments)
        if implementation == "triton":
            outputs[0][..., -1] += 1
        return outputs

    monkeypatch.setattr(kernels, "run", broken)
    found = measure(small("modulate"), CPU)
    assert found["wrong"] == ["triton"] and not found["seconds"]
    text = table({"machine": MACHINE, "kernels": [found], "left_out": []})
    assert "no speeds: triton: " in text and " us" not in text


def test_a_pair_is_judged_and_timed_as_one(off_gpu: None) -> None:
    """On the CPU: cuDNN's name stands for PyTorch's own convolution, after its own norm; both are judged as ours is."""
    case = paired(next(case for case in cases("causal_conv3d", real=False) if "residual True" in case.name))
    found = measure(replace(case, bytes=10**9), CPU)
    assert list(found["seconds"]) == ["picked", "cuDNN", "cuDNN channels_last"]
    assert not found["wrong"] and not found["skipped"] and found["verdicts"]["picked"]
    assert "| picked | 1000 us |" in table({"machine": MACHINE, "kernels": [found], "left_out": []})


def test_a_wrong_pair_has_no_speed(off_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pairs.pair
    monkeypatch.setattr(pairs, "run", lambda version, given: real(**given) + (version == "picked"))
    found = measure(paired(cases("causal_conv3d", real=False)[0]), CPU)
    assert found["wrong"] == ["picked"] and not found["seconds"]


def test_pairs_are_the_decoders() -> None:
    """Each convolution of Wan 2.1's decoder that reads a norm's output, once; their limit is the convolution's."""
    names = [case.name for case in pairs.pair_cases()]
    assert len(names) == len(set(names)) == 6 and all("wan-vae 480p" in name for name in names)
    conv = {case.name: case for case in cases("causal_conv3d", real=True)}
    assert all(limit(case) == limit(conv[case.name]) for case in pairs.pair_cases())


@pytest.mark.parametrize("operation", CASES)
def test_baselines_take_the_operations_arguments(operation: str) -> None:
    """On tensors without data; whether their numbers are right is judged where they are timed."""
    for case in cases(operation, real=True)[:2]:
        arguments = made(case, torch.bfloat16, "meta")
        assert all(callable(baseline.call) for baseline in baselines(operation, arguments))


def test_limits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert limit(Case("modulate", "", lambda m: {}, bytes=4_300_000, flops=1)).seconds == pytest.approx(1e-6)
    compute = limit(Case("mlp", "", lambda m: {}, bytes=1, flops=790_000_000))
    assert compute.seconds == pytest.approx(1e-6) and compute.rate(2e-6) == "395 TFLOP/s"
    assert limit(Case("linear_fp8", "", lambda m: {}, flops=790_000_000)).seconds == pytest.approx(0.5e-6)
    file = tmp_path / "r.json"
    assert command.main(["kernels", "--roofline", "--only", "modulate", "--json", str(file)]) == 0
    assert "| modulate | wan-14b 480p | 671 | 0 | 156 us | memory |" in capsys.readouterr().out
    assert json.loads(file.read_text())["roofline"][0]["case"] == "wan-14b 480p"


def test_bars() -> None:
    assert Bar(rate=3.7e12).met(1e-3, 3.8e9, {}) is True
    assert Bar(rate=3.7e12).met(1e-3, 3.6e9, {}) is False
    assert Bar(over="bare GEMMs", ratio=1.02).met(1.01, 0, {"bare GEMMs": 1.0}) is True
    assert Bar(over="bare GEMMs", ratio=1.02).met(1.03, 0, {"bare GEMMs": 1.0}) is False
    assert Bar(over="bare GEMMs", ratio=1.02).met(1.03, 0, {}) is None


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@no_gpu
def test_speeds_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["kernels"]) == 2
    assert "no NVIDIA GPU is here" in capsys.readouterr().err


def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["kernels", "--roofline", "--case", "nothing"]) == 2
    assert "no case is named like 'nothing'" in capsys.readouterr().err


@pytest.fixture
def gpu_tool() -> ModuleType:
    file = Path(__file__).parent.parent / "tools" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_tool", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@no_gpu
def test_gpu_tool_without_a_gpu(gpu_tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_tool.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_gpu_tool_keeps_its_budget(gpu_tool: ModuleType, tmp_path: Path) -> None:
    began = time.time()
    note = gpu_tool.failed("a", [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), began + 2)
    assert note == "a: out of time" and time.time() - began < 20
    assert gpu_tool.failed("a", ["no such program"], {}, began) == "a: no time was left"
    log = tmp_path / "log"
    note = gpu_tool.failed("b", [sys.executable, "-c", "print(1); raise SystemExit(3)"], {}, began + 60, log)
    assert note == "b: exit status 3" and log.read_text() == "1\n"


def test_gpu_tool_links_the_kernels(gpu_tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `runtime.kernels` is not installed, links make it reachable, and Python's own folder does not hide them."""
    real = gpu_tool.output
    monkeypatch.setattr(gpu_tool, "LINKED", tmp_path / "gpu")
    monkeypatch.setattr(gpu_tool, "output", lambda *_, **__: None)
    environment = gpu_tool.reachable()
    assert "TRITON_INTERPRET" not in environment
    question = "import runtime; from runtime.kernels import backend; print(runtime.__file__)"
    assert Path(real(sys.executable, "-c", question, environment=environment)).parent == tmp_path / "gpu" / "runtime"


def test_gpu_tool_runs_every_part(gpu_tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command is one that its program takes, keeps its results in OUT, and ends before the budget does."""
    commands: list[list[str]] = []
    ends: list[float] = []

    def noted(what: str, command: list[str], environment: dict[str, str], end: float, log: Path | None = None) -> str:
        commands.append(command)
        ends.append(end)
        if log:
            log.write_text("1 passed")
        return ""

    real = gpu_tool.output
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu_tool, "OUT", tmp_path)
    monkeypatch.setattr(gpu_tool, "LINKED", tmp_path / "build" / "gpu")
    monkeypatch.setattr(gpu_tool, "KEPT", tmp_path / "build" / "results")
    monkeypatch.setattr(gpu_tool, "failed", noted)
    monkeypatch.setattr(gpu_tool, "checkers", lambda: {tool: ["compute-sanitizer", tool] for tool in gpu_tool.CHECKERS})
    monkeypatch.setattr(
        gpu_tool, "output", lambda *command, **more: "tests/a.py::b" if "--collect-only" in command else "a GPU"
    )
    began = time.time()
    assert gpu_tool.main(["--only", ",".join(reversed(gpu_tool.PARTS)), "--budget", "500"]) == 0
    assert max(ends) <= began + 501
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert "results/tests.log" in archive.getnames()
    asked = [command[3:] for command in commands if command[1:3] == ["-m", "benchmarks"]]
    assert [each[0] for each in asked] == [
        "kernels", *["published"] * len(gpu_tool.STAGES), "warm", *["latency"] * len(gpu_tool.LATENCY),
    ]  # fmt: skip
    for name, *options in asked:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"benchmarks.{name}").add_command(parser.add_subparsers())
        assert parser.parse_args([name, *options]).json.parent == tmp_path / "build" / "results"
    commands.clear()
    assert gpu_tool.main(["--only", "latency", "--row", str(len(gpu_tool.LATENCY)), "--budget", "500"]) == 0
    assert [command[3] for command in commands if command[1:3] == ["-m", "benchmarks"]] == ["warm", "latency"]
    assert real(sys.executable, "-m", "tools.tune", "--dry-run", "--only", "modulate") is not None
