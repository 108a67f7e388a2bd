"""The benchmark of the warm start: what it prints of samples, and when it says that the bar is missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bars, warm
from benchmarks.__main__ import main

STEADY = [1.0, 1.0, 1.02, 0.98, 1.0, 1.0, 1.0, 1.0, 3.0]  # the tenth met something else on the machine


@pytest.mark.parametrize(("first", "code"), [(1.05, 0), (1.2, 1)])
def test_one_disturbed_request_is_no_tenth(
    first: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def made(function: object, model: str, device: str, engine: str, warmed: bool, threads: int) -> dict:
        asked.append(warmed)
        took = [first if warmed else 4.0, *STEADY]
        return {"seconds": took, "cpu": took}

    monkeypatch.setattr(warm, "fresh_process", made)
    file = tmp_path / "warm.json"
    assert main(["warm", "--repeats", "3", "--threads", "1", "--json", str(file)]) == code
    assert asked == [True, False] * 3
    told = capsys.readouterr().out
    assert f"| warm | {first * 1e3:.0f} ms | 1000 ms | {first:.2f} | {first:.2f} to {first:.2f} | {first:.2f} |" in told
    assert "| cold | 4000 ms | 1000 ms | 4.00 |" in told
    assert bars.first_of(json.loads(file.read_text())) == pytest.approx(first)
