"""Sizes that a model does not make by itself: what is made is the middle of the next larger one that it makes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import runtime
from runtime import Clip, Request
from runtime.__main__ import main
from runtime.canvas import framed, on_canvas
from runtime.planner import plan_request
from runtime.reading import read_video
from runtime.video import Video
from tests.published import Tiny, channels_pipeline, control_pipeline, write

PROMPT = "a red ball rolls left over green grass"
RANDOM = np.random.default_rng(5)
SIZE = (38, 54)  # (height, width): of neither is any a multiple of 16; made at 48x64


def pictures(count: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def demo() -> runtime.Model:
    return runtime.load("demo")


VERBS = {
    "animate": ({"clips": (Clip(pictures(1)),), "num_frames": 5}, {0: 0}),
    "keyframes": ({"clips": (Clip(pictures(1)), Clip(pictures(1), at="end")), "num_frames": 9}, {0: 0, 8: 1}),
    "extend": ({"clips": (Clip(pictures(5)),), "direction": "forward", "num_frames": 4}, {0: 0, 4: 4}),
    "prepend": ({"clips": (Clip(pictures(5)),), "direction": "backward", "num_frames": 4}, {4: 0, 8: 4}),
    "connect": (
        {"clips": (Clip(pictures(5)), Clip(pictures(5))), "direction": "between", "num_frames": 3}, {4: 4, 8: 5},
    ),
    "loop a clip": ({"clips": (Clip(pictures(5)),), "periodic": True, "num_frames": 4}, {0: 0, 4: 4}),
    "loop": ({"periodic": True, "num_frames": 8, "width": 54, "height": 38}, {}),
    "edit": ({"clips": (Clip(pictures(5)),), "strength": 0.5}, {}),
    "long": ({"num_frames": 21, "window": 9, "overlap": 5, "width": 54, "height": 38}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["clean_tokens", "blend"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb(demo: runtime.Model, verb: str, kind: str) -> None:
    """A clip keeps its own size, and given frames come back byte for byte: {place: which of the clips' frames}."""
    asked, kept = VERBS[verb]
    model = replace(demo, checkpoint=replace(demo.checkpoint, spec=replace(demo.spec, conditioning=kind)))
    video = runtime.generate(model, Request(prompt=PROMPT, steps=1, guidance=1, resample=1, seed=7, **asked))
    assert video.frames.shape[1:] == (*SIZE, 3)
    assert (video.receipt.request["width"], video.receipt.request["height"]) == SIZE[::-1]
    assert video.receipt.canvas == (64, 48)
    given_frames = np.concatenate([clip.frames for clip in asked.get("clips", ())] or [pictures(1)])
    for place, index in kept.items():
        assert np.array_equal(video.frames[place], given_frames[index])


@pytest.mark.parametrize("kind", ["channels", "control"])
def test_every_kind_of_conditioning(tmp_path: Path, kind: str) -> None:
    write(Tiny(seed=72), tmp_path, control_pipeline if kind == "control" else partial(channels_pipeline, images=2))
    model = runtime.load(tmp_path)
    clip = Clip(pictures(5)) if kind == "channels" else Clip(pictures(5), mask=RANDOM.random(SIZE) > 0.5)
    looks = () if kind == "channels" else (Clip(pictures(1)),)
    request = Request(prompt=PROMPT, steps=1, seed=1, num_frames=9, clips=(clip,), references=looks)
    frames = runtime.generate(model, request).frames
    assert frames.shape == (9, *SIZE, 3)
    assert np.array_equal(frames[:5], clip.frames) == (kind == "channels")  # a masked clip is made anew


def test_what_is_made_is_the_middle_of_the_canvas(demo: runtime.Model, tmp_path: Path) -> None:
    """The same noise makes the same video, cut; and latents that are kept say by how much."""
    command = ["generate", PROMPT, "--steps", "1", "--frames", "5", "--seed", "3", "--quiet"]
    for name, size in (("large", "96x64"), ("small", "90x60")):
        latents = str(tmp_path / f"{name}.safetensors")
        assert main([*command, "--size", size, "-o", str(tmp_path / name), "--latents", latents]) == 0
        assert main(["decode", latents, "-o", str(tmp_path / f"{name}-again"), "--quiet"]) == 0
    large, small, again = (read_video(tmp_path / name).frames for name in ("large", "small", "small-again"))
    assert np.array_equal(small, large[:, 2:62, 3:93])
    assert np.array_equal(again, small)


@pytest.mark.parametrize(("width", "height", "canvas"), [(1920, 1080, (1920, 1088)), (1080, 1920, (1088, 1920))])
def test_the_planner_counts_the_canvas(width: int, height: int, canvas: tuple[int, int]) -> None:
    asked, whole = (
        plan_request("wan2.1-t2v-14b", gpu="h200", width=w, height=h, num_frames=17)
        for w, h in ((width, height), canvas)
    )
    assert (asked.width, asked.height, asked.canvas) == (width, height, canvas)
    assert replace(asked, width=whole.width, height=whole.height) == whole
    assert f"{width}x{height} made at {canvas[0]}x{canvas[1]}" in runtime.prediction.table(asked)


def test_a_picture_may_have_any_size(tmp_path: Path) -> None:
    command = ["image", PROMPT, "--steps", "1", "--size", "33x47", "--quiet", "-o"]
    assert main([*command, str(tmp_path / "a.png")]) == 0
    assert read_video(tmp_path / "a.png").frames.shape == (1, 47, 33, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "a", "--size", "33x32"], "the width and height of a video are even: take 32x32 or 34x32"),
        (["generate", "a", "--size", "14x32"], "demo makes 16x16 at least: take 16x32"),
        (["image", "a", "--size", "33x32"], "mp4 needs even sizes, given width 33"),
    ],
)
def test_refused(arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "-o", str(tmp_path / "a.mp4")]) == 2
    assert sentence in capsys.readouterr().err


@settings(deadline=None)
@given(frame=arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))), more=st.integers(0, 40))
def test_a_frame_comes_back_from_its_canvas(frame: np.ndarray, more: int) -> None:
    height, width, _ = frame.shape
    canvas = on_canvas(frame, height + more, width + more // 2)
    assert set(np.unique(canvas)) == set(np.unique(frame))
    video = Video(canvas[None], fps=1, num_frames=1, height=canvas.shape[0], width=canvas.shape[1])
    assert np.array_equal(framed(video, height, width).frames[0], frame)
    with pytest.raises(ValueError, match="legal: up to the canvas"):
        framed(video, height + more + 1, width)
