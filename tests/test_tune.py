"""What was tuned is taken, and `tools.tune` keeps what is correct and clearly faster; its clock is replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import kernels
from runtime.kernels import backend, tuning
from runtime.kernels.cases import Case, cases
from runtime.kernels.verdicts import made, run
from tools import tune

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="Triton compiles here: see -m gpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    monkeypatch.setattr(tuning, "gpu_of", lambda device: "any")
    tuning.table.cache_clear()
    yield tmp_path / "any.json"
    tuning.table.cache_clear()


def test_names_of_gpus() -> None:
    assert tuning.slug("NVIDIA H200") == "h200"
    assert tuning.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_a_file_is_read_on_a_gpu_alone(file: Path) -> None:
    tune.keep(file, "modulate", "5120", {"num_warps": 2})
    tune.keep(file, "modulate", "1536", {"implementation": "cuda"})
    assert json.loads(file.read_text())["modulate"] == {"5120": {"num_warps": 2}, "1536": {"implementation": "cuda"}}
    assert tuning.tuned("modulate", "5120", torch.device("cuda", 0)) == {"num_warps": 2}
    assert not tuning.tuned("modulate", "5120", CPU) and not tuning.tuned("modulate", "64", torch.device("cuda", 0))


def test_settings_are_launched() -> None:
    """Each operation that is tuned launches with what a trial gives, and asks for it by a key."""
    for name, (operation, candidates) in tune.CHOICES.items():
        case = next(case for case in cases(operation, real=True) if case.name.startswith(("wan-1.3b", "wan-vae 480p")))
        for settings in candidates:
            if "implementation" in settings:
                continue
            with backend.recorded((9, 0)) as launches, tuning.trial(name, settings) as asked:
                run(operation, "triton", made(case, torch.bfloat16, "meta"))
            assert asked and launches, name
            found = [
                launch.options | {key.lower(): value for key, value in launch.constants.items()} for launch in launches
            ]
            wanted = {
                {"warps": "num_warps"}.get(key, key): value for key, value in settings.items() if key != "numbers"
            }
            assert any(wanted.items() <= each.items() for each in found), (name, settings, found)


@interpreted
def test_what_is_faster_is_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest correct choice is written; a wrong one never, however fast."""
    small = next(case for case in cases("modulate", real=False) if case.name.startswith("1x7x33"))
    real = Case("modulate", small.name, small.make, real=True, bytes=1)
    monkeypatch.setattr(tune, "real_cases", lambda name, part: [real])
    monkeypatch.setattr(tune, "FORCED", {"modulate": "triton"})
    monkeypatch.setitem(tune.CHOICES, "modulate", ("modulate", [{"num_warps": 2}, {"num_warps": 8}, {"num_warps": 1}]))
    times = {"{}": 1.0, '{"num_warps": 2}': 0.9, '{"num_warps": 8}': 0.5, '{"num_warps": 1}': 0.1}

    def clocked(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [times[name]] for name in calls}

    real_run = tune.run

    def spoiled(operation: str, implementation: str | None, arguments: dict[str, Any]) -> list[torch.Tensor]:
        outputs = real_run(operation, implementation, arguments)
        if tuning._trial.get() and tuning._trial.get()[1].get("num_warps") == 1:
            outputs[0][0, 0, 0] += 1
        return outputs

    monkeypatch.setattr(tune, "timed", clocked)
    monkeypatch.setattr(tune, "run", spoiled)
    assert list(tune.tuned("modulate", "", CPU, float("inf"))) == [("modulate", "33", {"num_warps": 8})]
    times['{"num_warps": 8}'] = times['{"num_warps": 2}'] = 0.99  # less than what counts
    assert list(tune.tuned("modulate", "", CPU, float("inf"))) == []


def test_preferred_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 8)
    assert backend.pick(x, {"implementation": "cuda"}, ref=kernels.modulate, cuda=None) is kernels.modulate
    monkeypatch.setattr(backend.cuda, "available", lambda tensor: True)

    class OnGpu:
        device = torch.device("cuda", 0)

    ours: Any = OnGpu()
    both = {"ref": len, "triton": min, "cuda": max}
    assert backend.pick(ours, {"implementation": "cuda"}, **both) is max
    assert backend.pick(ours, {"num_warps": 4}, **both) is min


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert tune.main(["--dry-run", "--case", "wan-14b 480p"]) == 0
    assert "attention: wan-14b 480p over itself: 10 choices" in capsys.readouterr().out
