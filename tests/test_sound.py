"""Sound is kept where frames are kept, and silent where they are made."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.__main__ import main
from runtime.reading import read_video
from runtime.sound import RATE, Sound, blocks, cut


def write_clip(path: Path, frames: int = 9, fps: int = 8) -> Path:
    """A grey clip with a tone of 440 Hz."""
    with av.open(str(path), "w") as container:
        pictures, tone = container.add_stream("libx264", rate=fps), container.add_stream("aac", rate=44100)
        pictures.width = pictures.height = 64
        pictures.pix_fmt = "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90 + index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        wave = np.sin(2 * np.pi * 440 * np.arange(44100 * frames // fps) / 44100).astype(np.float32) / 2
        for start in range(0, len(wave), 1024):
            piece = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = 44100, start, Fraction(1, 44100)
            container.mux(tone.encode(piece))
        container.mux(tone.encode(None))
    return path


def loudness(path: Path, seconds: float) -> list[float]:
    """Return the root mean square of each quarter of a second."""
    heard = np.concatenate(list(blocks([Sound(path, 0, seconds)], seconds)), axis=1)[0]
    return [float(np.sqrt(np.mean(part**2))) for part in np.array_split(heard, round(seconds * 4))]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_extending_keeps_the_clips_sound(tmp_path: Path, suffix: str) -> None:
    clip, target = write_clip(tmp_path / "clip.mp4", frames=8), tmp_path / f"out{suffix}"
    command = ["extend", str(clip), "a ball", "--frames", "8", "--steps", "1", "--quiet", "-o", str(target)]
    assert main([*command, "--guidance", "1"]) == 0
    assert read_video(target).num_frames == 16
    found = loudness(target, 2.0)
    assert min(found[:3]) > 0.2
    assert max(found[5:]) < 0.01


def test_backward_and_edit(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    more = ["--steps", "1", "--guidance", "1", "--quiet", "-o"]
    assert main(["extend", str(clip), "a", "--backward", "--frames", "8", *more, str(tmp_path / "a.mp4")]) == 0
    found = loudness(tmp_path / "a.mp4", 2.0)
    assert max(found[:3]) < 0.01 < 0.2 < min(found[5:])
    assert main(["edit", str(clip), "winter", *more, str(tmp_path / "b.mp4")]) == 0
    assert min(loudness(tmp_path / "b.mp4", 1.0)) > 0.2
    assert main(["generate", "a ball", "--frames", "5", *more, str(tmp_path / "c.mp4")]) == 0
    assert not read_video(tmp_path / "c.mp4").sounds


@given(start=st.floats(0, 10), seconds=st.floats(0.01, 10), at=st.floats(0, 10))
def test_cutting(start: float, seconds: float, at: float) -> None:
    for sound in cut([Sound(Path("a"), 1.0, 4.0, 2.0)], start, seconds, at):
        assert sound.at >= at - 1e-9 and sound.at + sound.seconds <= at + seconds + 1e-9
        assert sound.start >= 1.0 - 1e-9 and sound.start + sound.seconds <= 5.0 + 1e-9
        assert (sound.start - 1.0) - (sound.at - at + start - 2.0) == pytest.approx(0, abs=1e-9)


def test_blocks_are_as_long_as_asked(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    for seconds in (0.5, 3.0):
        heard = sum(block.shape[1] for block in blocks([Sound(clip, 0.2, 0.4, 0.3)], seconds))
        assert 0 <= heard - seconds * RATE < 1024
