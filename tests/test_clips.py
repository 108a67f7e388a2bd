"""Clips and pictures as people have them: any size, rate, direction, format; and files that are none."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from runtime.clips import Clip, conformed, fit_frame, natural_size
from runtime.video import Video, read_video


def numbered(count: int, fps: float = 8) -> Video:
    """Frames that show their number as their grey."""
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)
    return Video(frames * 8, fps=fps, num_frames=count, height=16, width=16)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (8, [0, 1, 2, 3, 4, 5]),
        (4, [1, 3, 5]),
        (16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (12, [0, 1, 1, 2, 3, 3, 4, 5, 5]),
    ],
)
def test_rates(fps: float, expected: list[int]) -> None:
    frames = conformed(Clip(numbered(6)), 16, 16, fps, "crop").frames
    assert [int(f[0, 0, 0]) // 8 for f in frames] == expected


def test_what_fits_is_passed_on_as_it_is() -> None:
    video = numbered(5)
    assert conformed(Clip(video), 16, 16, 8, "crop") is video
    assert Clip(video.frames).count(30) == 5  # an array has no rate


def test_fits() -> None:
    frame = np.zeros((20, 40, 3), np.uint8)
    frame[:, :10], frame[:, 10:30], frame[:, 30:] = 50, 100, 200
    crop, pad, stretch = (fit_frame(frame, 20, 20, fit) for fit in ("crop", "pad", "stretch"))
    assert np.abs(crop.astype(int) - 100).max() <= 1
    assert pad[:5].max() == 0 and pad[15:].max() == 0 and pad[10, 10, 0] == 100
    assert abs(int(stretch[10, 1, 0]) - 50) <= 1 and abs(int(stretch[10, 18, 0]) - 200) <= 1


@settings(deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_natural_sizes_are_legal_and_near(width: int, height: int) -> None:
    w, h = natural_size(width, height, (16, 32), 832 * 480)
    assert w % 32 == 0 and h % 16 == 0 and w > 0 and h > 0
    if min(width, height) > 200 and max(width, height) / min(width, height) < 4:
        assert 0.8 < (w / h) / (width / height) < 1.25
        assert w * h <= 4 * 832 * 480


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_stand_up(tmp_path: Path, orientation: int) -> None:
    ramp = np.linspace(0, 255, 32 * 48).reshape(32, 48).astype(np.uint8)
    picture = Image.fromarray(np.stack([ramp, ramp.T.reshape(32, 48), 255 - ramp], axis=2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    read = read_video(tmp_path / "a.jpg").frames
    assert read.shape == (1, *upright.shape)
    assert np.abs(read[0].astype(int) - upright).mean() < 3


def test_frames_of_a_varying_rate(tmp_path: Path) -> None:
    """Four frames, the second for three ticks: at the average rate it is there for as long."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width = stream.height = 16
        stream.codec_context.time_base = Fraction(1, 10)
        for grey, tick in ((0, 0), (60, 1), (120, 5), (180, 6), (240, 7)):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), grey, np.uint8), format="rgb24")
            frame.pts = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = read_video(tmp_path / "a.mp4")
    shown = [int(f.mean() / 60 + 0.5) for f in video.frames]
    assert shown == sorted(shown)
    assert shown.count(1) >= 2
    assert {0, 1} <= set(shown) and shown[-1] == 4


@pytest.mark.parametrize("kind", ["yuv444p", "yuv420p10le", "gray"])
def test_odd_pixel_formats(tmp_path: Path, kind: str) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, kind
        frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 128, np.uint8), format="rgb24")
        container.mux(stream.encode(frame.reformat(format=kind)))
        container.mux(stream.encode(None))
    assert np.abs(read_video(tmp_path / "a.mkv").frames.astype(int) - 128).max() <= 3


def test_high_dynamic_range_is_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"x264-params": "transfer=smpte2084"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p10le"
        frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 128, np.uint8), format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p10le")))
        container.mux(stream.encode(None))
    with pytest.warns(UserWarning, match="HDR"):
        assert read_video(tmp_path / "a.mp4").num_frames == 1


def test_transparency_is_dropped(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16, 4), (200, 10, 10, 0), np.uint8)).save(tmp_path / "a.png")
    assert read_video(tmp_path / "a.png").frames[0, 0, 0].tolist() == [200, 10, 10]


def test_sound_alone(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no video stream"):
        Clip(tmp_path / "a.mp4").video  # noqa: B018


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff\xd8\xff\xe0" + bytes(60)]
)
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png"):
        read_video(tmp_path / "a.png").frames  # noqa: B018


def test_a_picture_that_would_fill_the_memory(tmp_path: Path) -> None:
    """The header says 60000x60000: refused before anything of that size is made."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 6, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    code = (
        "import resource, sys; from runtime.video import read_video\n"
        f"try: read_video({str(tmp_path / 'bomb.png')!r})\n"
        "except ValueError as error: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, sentence = done.stdout.split(" ", 1)
    assert "pixels are read" in sentence or "can be read" in sentence
    assert int(peak) < 2**20  # KiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
