"""The measures of verbs, on clips whose answer is known; and the table of a small run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import pixels
from benchmarks.__main__ import main
from benchmarks.verbs import VERBS, Trial, motion, things, trials
from benchmarks.verbs_report import line, plain
from tools.demo_model.captions import held_out


def moving(speed: float, frames: int = 12, jump: int | None = None) -> np.ndarray:
    """A red square on green that moves right; from frame `jump` on all is brighter."""
    clip = np.full((frames, 64, 64, 3), (20, 160, 40), np.uint8)
    for i in range(frames):
        x = 10 + round(speed * i)
        clip[i, 24:36, x : x + 12] = (220, 20, 20)
        if jump is not None and i >= jump:
            clip[i] += 30
    return clip


def test_velocities() -> None:
    places = np.stack([3 + 2 * np.arange(12.0), np.full(12, 7.0)], axis=1)
    places[4] = np.nan
    assert pixels.velocity(places) == pytest.approx([2, 0], abs=1e-9)
    assert np.isnan(pixels.velocity(np.full((12, 2), np.nan))).all()
    assert pixels.ground_drift(moving(2), 4) == 0
    assert pixels.ground_drift(moving(2, jump=6), 4) == 30


def test_seams() -> None:
    even, jump = moving(2), moving(2, jump=6)
    assert pixels.seam_ratio(pixels.steps(even), [6]) == pytest.approx(1)
    assert pixels.seam_ratio(pixels.steps(jump), [6]) > 5
    assert pixels.colour_steps(jump)[5] == pytest.approx(30)
    assert pixels.seam_ratio(pixels.colour_steps(jump), [6], least=0.5) == pytest.approx(60)
    assert pixels.loop_ratio(np.concatenate([even, even[::-1]])) == 0
    assert pixels.loop_ratio(even) > 5


def test_low_pass_and_psnr() -> None:
    clip = moving(2)
    assert pixels.psnr(clip, clip) == float("inf")
    assert pixels.psnr(np.zeros((1, 4, 4, 3)), np.full((1, 4, 4, 3), 255)) == 0
    checks = np.indices((64, 64)).sum(0)[None, :, :, None] % 2 * np.full((1, 1, 1, 3), 200)
    assert np.allclose(pixels.low_pass(checks, 4), 100)


def test_scenes_are_held_out_and_move_along_lines() -> None:
    found = trials(None, 24, 96, 64, 1)
    assert len({trial.prompt for trial in found}) == 24
    assert all(held_out(trial.scene) for trial in found)
    for trial in found[:6]:
        way = pixels.velocity(trial.way)
        across, sign = {"left": (0, -1), "right": (0, 1), "rise": (1, -1), "fall": (1, 1)}[trial.scene.motion]
        assert sign * way[across] > 2 * abs(way[1 - across])


def test_what_is_drawn_passes_and_its_reverse_does_not() -> None:
    (trial,) = trials(None, 1, 160, 96, 1)
    kept = motion(trial, trial.truth, slice(9, 17))
    assert kept == {"direction off, degrees": 0, "speed, of the drawn one": 1, "place off, % of the width": 0}
    assert motion(trial, trial.truth[::-1], slice(9, 17))["direction off, degrees"] > 135
    assert things(trial.scene, trial.truth, moving=True)["direction right"]
    assert not things(trial.scene, trial.truth[::-1], moving=True)["direction right"]


def test_rows() -> None:
    assert line("a", "direction right", [True, False]) == "| a | direction right | | | 1 of 2 |"
    assert line("a", "step at the seam", [1.0, 1.6, None]) == "| a | step at the seam | 1.30 | 1.60 | 1 of 3 |"
    assert line("a", "as it was drawn, dB", [20.0, 30.0]) == "| a | as it was drawn, dB | 25.00 | 20.00 |  |"
    assert line("a", "speed", [None]) == "| a | speed | not seen | | |"
    assert plain({"a": float("nan"), "b": np.bool_(True), "c": float("inf")}) == {"a": None, "b": True, "c": 1e9}


def test_a_small_run_that_is_interrupted_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every verb on one prompt: its measures and its sheet are there, and what is given comes back."""
    file, sheets = tmp_path / "a.json", tmp_path / "sheets"
    asked = ["verbs", "--prompts", "1", "--steps", "2", "--sheets", str(sheets)]
    with monkeypatch.context() as patch:
        patch.setitem(VERBS, "connect", interrupted)
        assert main([*asked, "--json", str(file)]) == 130
    first = [row["verb"] for row in json.loads(file.read_text())["rows"]]
    assert first == list(VERBS)[: list(VERBS).index("connect")]
    with monkeypatch.context() as patch:
        patch.setitem(VERBS, "text", interrupted)  # is there already
        assert main([*asked, "--resume", str(file)]) == 0
    record = json.loads(file.read_text())
    assert [row["verb"] for row in record["rows"]] == list(VERBS)
    assert all(len(row["measures"]) == 1 and row["seconds"] > 0 for row in record["rows"])
    told = capsys.readouterr().out
    assert told.endswith(file.with_suffix(".md").read_text())
    assert file.with_suffix(".md").read_text().count("| given unchanged | | | 1 of 1 |") == 8
    assert {path.stem for path in sheets.iterdir()} == {name.replace(" ", "-") for name in VERBS}
    with Image.open(file.with_suffix(".png")) as overview:
        assert overview.width > 700 and overview.height > 50 * len(VERBS)
    assert main([*asked, "--steps", "3", "--resume", str(file)]) == 2
    assert "another settings" in capsys.readouterr().err


def interrupted(trial: Trial) -> None:
    raise KeyboardInterrupt
