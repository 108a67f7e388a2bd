"""Progress lines: what they say, and when."""

from __future__ import annotations

import io

import pytest

from runtime.cli import progress
from runtime.cli.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_tell_the_pace_and_what_is_left(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("denoising", "step", stream=stream) as report:
        clock[0] += 7.0  # the text encoder, not a step
        for step in range(1, 11):
            report(step, 10)
            clock[0] += 2.0
    assert stream.getvalue().splitlines() == [
        "denoising: step 1/10",
        "denoising: step 4/10, 2 s each, 12 s left",
        "denoising: step 7/10, 2 s each, 6 s left",
        "denoising: step 10/10, 2 s each",
    ]


def test_quiet_says_nothing(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("denoising", "step", stream=stream, quiet=True) as report:
        report(1, 1)
    assert stream.getvalue() == ""
