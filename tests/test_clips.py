"""Clips and pictures as people have them: any size, rate, direction, format; and files that are none."""

from __future__ import annotations

import io
import json
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

import runtime
from runtime.clips import Clip, conformed, fit_frame, natural_size
from runtime.reading import read_video
from runtime.request import Request
from runtime.storyboard import Card, card_of
from runtime.video import Video

RANDOM = np.random.default_rng(0)


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
    assert w >= 32 and h >= 16 and w % 2 == h % 2 == 0
    if width >= 32 and height >= 16 and width * height <= 4 * 832 * 480:
        assert (w, h) == (width // 2 * 2, height // 2 * 2)  # one line less at most
    if min(width, height) > 200 and max(width, height) / min(width, height) < 4:
        assert 0.8 < (w / h) / (width / height) < 1.25
        assert w * h <= 4 * 832 * 480


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(9))
def test_pictures_stand_up(tmp_path: Path, orientation: int, suffix: str) -> None:
    """All eight ways of EXIF, and one that is none, as Pillow turns and mirrors them."""
    picture = np.full((32, 48, 3), 40, np.uint8)
    picture[:16, :24], picture[16:, :12] = (220, 40, 40), (40, 40, 220)  # no two ways look alike
    exif, file = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[0x0112] = orientation
    Image.fromarray(picture).save(file, exif=exif, quality=95)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    read = read_video(file).frames
    assert read.shape == (1, *upright.shape)
    assert np.abs(read[0].astype(int) - upright).mean() < 6  # in YUV, colour has half the resolution


PHOTOS = {
    "jpg": ("RGB", "L", "CMYK", "1"), "png": ("RGB", "L", "P", "LA", "RGBA", "1", "I;16"), "webp": ("RGB", "RGBA"),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in PHOTOS.items() for mode in modes])
def test_photos_are_read_as_pillow_reads_them(tmp_path: Path, suffix: str, mode: str) -> None:
    """Of some kilobytes, as photos are, in every way to keep colours; what is transparent is shown."""
    x, y = np.meshgrid(np.linspace(0, 255, 256), np.linspace(0, 255, 256))
    grain = np.random.default_rng(0).normal(0, 6, x.shape)
    colours = np.stack([x, y, np.clip(255 - x + grain, 0, 255)], -1).astype(np.uint8)
    deep = Image.fromarray((x * 257).astype(np.uint16))
    picture, file = deep if mode == "I;16" else Image.fromarray(colours).convert(mode), tmp_path / f"a.{suffix}"
    picture.save(file, quality=95)
    kept = Image.open(file)
    meant = np.asarray(kept)[..., None] / 257 if kept.mode.startswith("I") else np.asarray(kept.convert("RGB"))
    (read,) = read_video(file).frames
    assert np.abs(read.astype(float) - meant).mean() < 6


def test_an_animated_webp_is_named(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match="animated"):
        read_video(tmp_path / "a.webp")


MATRICES = {
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
    5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip


def test_numbered_pictures_stand_up_each_in_its_own_way(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, orientation in enumerate((6, 8, 1, 4)):
        shape = (12, 8, 3) if orientation in (6, 8) else (8, 12, 3)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / f"{number:05}.png", exif=exif)
    files = sorted(tmp_path.glob("*.png"))
    meant = [np.asarray(ImageOps.exif_transpose(Image.open(file))) for file in files]
    video = read_video(tmp_path)
    assert (video.height, video.width) == (8, 12)
    assert np.array_equal(video.frames, np.stack(meant))


@pytest.mark.parametrize("way", MATRICES)
def test_clips_stand_up(tmp_path: Path, way: int) -> None:
    """The display matrix of an mp4 (ISO 14496-12, tkhd), which says by numbers what EXIF has a number for."""
    clip, file = np.full((2, 32, 48, 3), 40, np.uint8), tmp_path / "a.mp4"
    clip[:, :16, :24], clip[:, 16:, :12] = 220, 120
    Video(clip, fps=8, num_frames=2, height=32, width=48).save(file)
    content = bytearray(file.read_bytes())
    at = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[at : at + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (each << 16 for each in MATRICES[way])
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    file.write_bytes(content)
    exif = Image.Exif()
    exif[0x0112] = way
    still = Image.fromarray(clip[0])
    still.getexif()[0x0112] = way
    meant = np.asarray(ImageOps.exif_transpose(still))
    read = read_video(file).frames
    assert read.shape[1:] == meant.shape
    assert np.abs(read[1].astype(int) - meant).mean() < 3


def test_a_receipt_holds_the_mask(tmp_path: Path) -> None:
    """One from a file is opened again, and refused where it changed; one in memory is told by its hash."""
    half = np.zeros((16, 16), np.uint8)
    half[:, 8:] = 255
    numbered(3).save(tmp_path / "clip/")
    Image.fromarray(half).resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    record = Clip(tmp_path / "clip", mask=tmp_path / "mask.png").record()
    assert np.array_equal(Clip(**record).masked, half > 0)
    assert Clip(numbered(3), mask=half > 0).record()["mask_hash"] == record["mask_hash"]
    assert Clip(numbered(3), mask=half == 0).record()["mask_hash"] != record["mask_hash"]
    assert card_of(json.loads(json.dumps(Card(0, 1, "a", Clip(**record)).record())), tmp_path).clip.record() == record
    Image.fromarray(255 - half).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="is another than the receipt's"):
        assert Clip(**record).masked is not None


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


def test_a_clip_that_breaks_off(tmp_path: Path) -> None:
    """A file that was cut off while it was fetched: said when it is opened, or at the frame that lacks."""
    Video(RANDOM.integers(0, 256, (24, 64, 64, 3), dtype=np.uint8), fps=8, num_frames=24, height=64, width=64).save(
        tmp_path / "a.mp4"
    )
    whole = (tmp_path / "a.mp4").read_bytes()
    for share in (0.1, 0.5, 0.95):
        (tmp_path / "b.mp4").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"b\.mp4"):
            Clip(tmp_path / "b.mp4").video.frames  # noqa: B018


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_clips_whose_sizes_and_rates_disagree(fit: str) -> None:
    """The first clip says size and rate; the second is brought to them, and stands in the result as that."""
    first = Video(RANDOM.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8), fps=8, num_frames=9, height=64, width=64)
    second = Video(RANDOM.integers(0, 256, (10, 50, 90, 3), dtype=np.uint8), fps=20, num_frames=10, height=50, width=90)
    request = Request(
        prompt="a", clips=(Clip(first), Clip(second)), direction="between", num_frames=4, steps=1, guidance=1, fit=fit
    )
    video = runtime.generate(runtime.load("demo"), request)
    expected = conformed(Clip(second), 64, 64, 8, fit).frames
    assert (video.fps, len(expected)) == (8, 4)
    assert np.array_equal(video.frames, np.concatenate([first.frames, video.frames[9:13], expected]))


@pytest.mark.parametrize(("frames", "fps"), [(1, 8), (6, 30), (40, 12)])
@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_editing_clips_of_any_length_and_rate(frames: int, fps: float, strength: float) -> None:
    clip = Video(
        RANDOM.integers(0, 256, (frames, 50, 70, 3), dtype=np.uint8), fps=fps, num_frames=frames, height=50, width=70
    )
    request = Request(
        prompt="a", clips=(Clip(clip),), strength=strength, fps=8, width=64, height=48, steps=2, guidance=1, seed=1
    )
    edited = runtime.generate(runtime.load("demo"), request).frames
    fitted = conformed(Clip(clip), 64, 48, 8 if frames > 1 else fps, "crop").frames
    assert edited.shape == fitted.shape
    again = runtime.decode(runtime.load("demo"), runtime.encode(runtime.load("demo"), whole_latents(fitted))).frames
    near = np.abs(edited.astype(float) - again[: len(edited)]).mean()
    assert near < 12 if strength < 0.1 else near > 12


def whole_latents(frames: np.ndarray) -> np.ndarray:
    """Return frames with the last repeated until they fill whole latent frames."""
    return np.concatenate([frames, frames[-1:].repeat(-(len(frames) - 1) % 4, axis=0)])


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


def large_png() -> bytes:
    """A picture of 60000x60000 pixels that is small as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 6, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def enlarged(kind: str, mark: bytes, skip: int, layout: str, size: int) -> bytes:
    """A picture of 16x16 pixels whose header says size x size."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    place = data.index(mark) + skip
    data[place : place + 4] = struct.pack(layout, size, size)
    return bytes(data)


BOMBS = {
    "a.png": large_png,
    "a.jpg": lambda: enlarged("JPEG", b"\xff\xc0", 5, ">HH", 65000),
    "a.gif": lambda: enlarged("GIF", b"GIF", 6, "<HH", 65000),
    "a.webp": lambda: enlarged("WEBP", b"\x9d\x01\x2a", 3, "<HH", 16383),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_would_fill_the_memory(tmp_path: Path, name: str) -> None:
    """What the header says is refused before anything of that size is made."""
    (tmp_path / name).write_bytes(BOMBS[name]())
    code = (
        "from runtime.reading import read_video\n"
        f"try: print(read_video({str(tmp_path / name)!r}))\n"
        "except ValueError as error:\n"
        "    print(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1], error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, sentence = done.stdout.split(" ", 1)
    assert "pixels" in sentence or "can be read" in sentence
    assert int(peak) < 2**19  # KiB
