"""The measures of verbs, on clips whose answer is known; and the table of a small run."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pixels
from benchmarks.__main__ import main
from benchmarks.verbs import prompts


def moving(speed: float, frames: int = 12, jump: int | None = None) -> np.ndarray:
    """A red square on green that moves right; from frame `jump` on all is brighter."""
    clip = np.full((frames, 64, 64, 3), (20, 160, 40), np.uint8)
    for i in range(frames):
        x = 10 + round(speed * i)
        clip[i, 24:36, x : x + 12] = (220, 20, 20)
        if jump is not None and i >= jump:
            clip[i] += 30
    return clip


def test_tracks_and_velocities() -> None:
    assert pixels.velocity(moving(2)) == pytest.approx([2, 0], abs=0.01)
    assert np.isnan(pixels.velocity(moving(0)[:, :20])).all()
    assert pixels.ground(moving(2))[3].tolist() == [20, 160, 40]


def test_seams() -> None:
    assert pixels.seam_ratio(moving(2), [6]) == pytest.approx(1)
    assert pixels.seam_ratio(moving(2, jump=6), [6]) > 5
    assert pixels.colour_steps(moving(2, jump=6))[5] == pytest.approx(30)
    assert pixels.loop_ratio(np.concatenate([moving(2), moving(2)[::-1]])) == 0
    assert pixels.loop_ratio(moving(2)) > 5


def test_low_pass_and_psnr() -> None:
    clip = moving(2)
    assert pixels.psnr(clip, clip) == float("inf")
    assert pixels.psnr(np.zeros((1, 4, 4, 3)), np.full((1, 4, 4, 3), 255)) == 0
    checks = np.indices((64, 64)).sum(0)[None, :, :, None] % 2 * np.full((1, 1, 1, 3), 200)
    assert np.allclose(pixels.low_pass(checks, 4), 100)


def test_prompts_differ() -> None:
    found = list(islice(prompts(), 24))
    assert len(set(found)) == 24
    assert len({text.split()[1] for text in found}) >= 6


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verbs", "--prompts", "2", "--steps", "1", "--verbs", "extend", "loop", "--sheets", str(tmp_path)]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "| extend | given unchanged | 1.00 | 1.00 | 2 of 2 |" in told
    assert "| loop | last to first |" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["extend.png", "loop.png"]
