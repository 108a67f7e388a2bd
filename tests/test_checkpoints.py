"""A generation that was stopped goes on from its checkpoint to the same frames, whatever the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime.checkpoints import Checkpoints
from runtime.denoising import Cancelled

CLIP = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
TASKS: dict[str, dict[str, Any]] = {
    "text": {"num_frames": 5},
    "loop": {"num_frames": 8, "periodic": True},
    "blended in": {"num_frames": 4, "clips": (runtime.Clip(CLIP),), "direction": "forward", "overlap": 5},
    "edit": {"clips": (runtime.Clip(CLIP),), "strength": 0.95, "steps": 8},
    "windows": {"num_frames": 13, "window": 9, "overlap": 5},
}


@pytest.fixture(scope="module")
def model() -> runtime.Model:
    return runtime.load("demo", device="cpu")


def stopping(at: int) -> Any:
    def on_step(step: int, *_: object) -> None:
        if step == at:
            raise Cancelled

    return on_step


@pytest.mark.fault(27)
@pytest.mark.parametrize("task", TASKS)
def test_the_same_frames(model: runtime.Model, tmp_path: Path, task: str) -> None:
    request = runtime.Request(**{"prompt": "a red ball", "seed": 5, "steps": 4, **TASKS[task]})
    whole = runtime.generate(model, request).frames
    seen: list[int] = []
    for at in (2, 4, 7):  # the last one is in the second window
        try:
            video = runtime.generate(
                model, request, on_step=stopping(at), checkpoints=Checkpoints(tmp_path, "key", steps=1)
            )
            video.frames  # noqa: B018
        except Cancelled:
            seen.append(at)
    assert seen[:2] == [2, 4] and (task != "windows" or seen[2:] == [7])
    steps: list[int] = []
    again = runtime.generate(
        model, request, on_step=lambda step, *_: steps.append(step), checkpoints=Checkpoints(tmp_path, "key")
    )
    assert np.array_equal(again.frames, whole)
    assert len(steps) <= 1 or task == "edit"  # what was made is not made again


def test_kept_by_steps_by_seconds_and_before_decoding(model: runtime.Model, tmp_path: Path) -> None:
    request = runtime.Request(prompt="a red ball", seed=5, steps=3, num_frames=1)
    kept = Checkpoints(tmp_path, "key", steps=5)
    seen: list[bool] = []
    runtime.generate(model, request, on_step=lambda *_: seen.append(kept.file(0).exists()), checkpoints=kept)
    assert seen == [False, False, True]
    kept = Checkpoints(tmp_path / "none", "key", seconds=0.0)
    with pytest.raises(OSError, match="cannot be written|No such file"):
        runtime.generate(model, request, checkpoints=kept)


@pytest.mark.fault(29)
def test_what_cannot_be_used_is_dropped(model: runtime.Model, tmp_path: Path) -> None:
    request = runtime.Request(prompt="a red ball", seed=5, steps=2, num_frames=1)
    kept = Checkpoints(tmp_path, "key", steps=1)
    frames = runtime.generate(model, request, checkpoints=kept).frames
    file = kept.file(0)
    good = file.read_bytes()
    assert Checkpoints(tmp_path, "key").find(0) is not None
    with pytest.warns(UserWarning, match="another request"):
        assert Checkpoints(tmp_path, "other").find(0) is None
    for damaged in (good[: len(good) // 2], good[:-1] + bytes([good[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is not used"):
            assert Checkpoints(tmp_path, "key").find(0) is None
    with pytest.warns(UserWarning, match="is not used"):
        again = runtime.generate(model, request, checkpoints=Checkpoints(tmp_path, "key"))
    assert np.array_equal(again.frames, frames)
