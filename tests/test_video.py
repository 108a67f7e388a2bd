"""Videos survive the round trip through real files, and a failed run leaves nothing behind."""

import errno
import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime import video as video_module
from runtime.reading import read_video
from runtime.video import Video, check_writable
from runtime.writing import exact_rate

FILE_NAMES = ["clip.mp4", "clip.webm", "clip.gif", "clip/"]
ENCODED = [("clip.mp4", "h264"), ("clip.webm", "vp9")]


def smooth_clip(num_frames=8, height=64, width=96):
    """Slow waves of saturated colour, uint8 [F, H, W, 3]."""
    t, y, x = np.mgrid[:num_frames, :height, :width].astype(np.float32)
    waves = [np.sin((x + 3 * t) / 25), np.cos((y - 2 * t) / 30), np.sin((x + y + t) / 40)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def make_video(num_frames=8, height=64, width=96, fps=24.0):
    frames = smooth_clip(num_frames, height, width)
    return Video(frames, fps=fps, num_frames=num_frames, height=height, width=width)


def lazy_video(frames, pulled, fps=24.0, fail_at=None, error=KeyboardInterrupt):
    """A video whose source appends to `pulled` what it decodes, and raises `error` instead of frame `fail_at`."""

    def decode():
        for index, frame in enumerate(frames):
            if index == fail_at:
                raise error
            pulled.append(index)
            yield frame

    num_frames, height, width, _ = frames.shape
    return Video(decode, fps=fps, num_frames=num_frames, height=height, width=width)


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2)))


def file_bytes(path):
    return [file.read_bytes() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


# Formats


@pytest.mark.parametrize(("name", "codec"), ENCODED)
@pytest.mark.parametrize(
    ("fps", "rate"), [(24.0, Fraction(24)), (23.976, Fraction(24000, 1001)), (12.5, Fraction(25, 2))]
)
def test_encoded_file_states_codec_rate_size_and_colours(tmp_path, name, codec, fps, rate):
    path = make_video(num_frames=7, fps=fps).save(tmp_path / name)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == (codec, "yuv420p", 96, 64)
        assert stream.average_rate == rate
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert len(container.streams) == 1
        times = [frame.time for frame in container.decode(stream)]
    assert times == pytest.approx([index / rate for index in range(7)], abs=0.00051)


def test_mp4_starts_playing_before_it_is_loaded_and_has_exact_times(tmp_path):
    path = make_video(fps=23.976).save(tmp_path / "clip.mp4")
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.frames == 8
        assert stream.duration * stream.time_base == Fraction(8 * 1001, 24000)
        assert [frame.pts * frame.time_base * Fraction(24000, 1001) for frame in container.decode(stream)] == list(
            range(8)
        )


@pytest.mark.parametrize("name", FILE_NAMES)
def test_smooth_colours_survive(tmp_path, name):
    video = make_video()
    back = read_video(video.save(f"{tmp_path}/{name}"))
    assert (back.num_frames, back.height, back.width) == (8, 64, 96)
    assert psnr(back.frames, video.frames) >= (30 if name == "clip.gif" else 35)  # 256 colours


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif"])
@pytest.mark.parametrize("height", [64, 720])  # readers guess another matrix from 720 lines up where a file has no tag
def test_saturated_patches_keep_their_colour(tmp_path, name, height):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]], np.uint8)
    frames = np.broadcast_to(np.repeat(colours, 32, axis=0), (2, height, 192, 3))
    path = Video(frames, fps=24, num_frames=2, height=height, width=192).save(tmp_path / name)
    shown = read_video(path).frames[:, 32, 16::32].astype(int)
    assert np.abs(shown - colours).max() <= 2


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
def test_stored_values_follow_bt709(tmp_path, name):
    red = np.broadcast_to(np.array([255, 0, 0], np.uint8), (1, 64, 96, 3))
    with av.open(str(Video(red, fps=24, num_frames=1, height=64, width=96).save(tmp_path / name))) as container:
        frame = next(container.decode(video=0))
    luma, blue, red_difference = (bytes(plane)[20 * plane.line_size + 20] for plane in frame.planes)
    assert luma == pytest.approx(16 + 219 * 0.2126, abs=1)
    assert blue == pytest.approx(128 - 224 * 0.2126 / 1.8556, abs=1)
    assert red_difference == pytest.approx(128 + 224 * 0.5, abs=1)


@pytest.mark.parametrize(("fps", "num_frames"), [(24.0, 48), (16.0, 16), (23.976, 24), (50.0, 10), (8.0, 1)])
def test_gif_loops_and_its_durations_add_up(tmp_path, fps, num_frames):
    path = make_video(num_frames, 16, 24, fps).save(tmp_path / "clip.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == num_frames
        assert gif.info["loop"] == 0 or num_frames == 1
        durations = []
        for index in range(num_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
    assert sum(durations) == pytest.approx(1000 * num_frames / fps, abs=5.1)
    assert all(abs(duration - 1000 / fps) <= 10 for duration in durations)
    assert read_video(path).fps == pytest.approx(fps, rel=0.006 + 0.005 * fps / num_frames)


def test_gif_of_a_still_clip_keeps_every_frame(tmp_path):
    frames = np.full((5, 20, 30, 3), 77, np.uint8)
    path = Video(frames, fps=10, num_frames=5, height=20, width=30).save(tmp_path / "still.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == 5
    assert np.abs(read_video(path).frames.astype(int) - 77).max() <= 1


def test_png_is_exact(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (1, 33, 47, 3), dtype=np.uint8)
    path = Video(frames, fps=24, num_frames=1, height=33, width=47).save(tmp_path / "picture.png")
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), frames[0])
    assert np.array_equal(read_video(path).frames, frames)


@pytest.mark.parametrize(
    ("name", "make_first"), [("frames/", False), ("frames", False), ("frames", True), ("v1.5", True)]
)
def test_folder_of_pictures_is_exact(tmp_path, name, make_first):
    if make_first:
        (tmp_path / name).mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (3, 33, 47, 3), dtype=np.uint8)
    path = Video(frames, fps=24, num_frames=3, height=33, width=47).save(f"{tmp_path}/{name}")
    assert sorted(file.name for file in path.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    back = read_video(path, fps=12)
    assert back.fps == 12
    assert np.array_equal(back.frames, frames)
    assert len(os.listdir(tmp_path)) == 1


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    suffix=st.sampled_from([".mp4", ".webm", ".gif"]),
    num_frames=st.integers(1, 6),
    height=st.integers(1, 24).map(lambda half: 2 * half),
    width=st.integers(1, 24).map(lambda half: 2 * half),
    fps=st.sampled_from([1.0, 7.3, 16.0, 23.976, 29.97, 50.0]),
)
def test_any_size_rate_and_count_comes_back(tmp_path_factory, suffix, num_frames, height, width, fps):
    path = tmp_path_factory.mktemp("any") / f"clip{suffix}"
    back = read_video(make_video(num_frames, height, width, fps).save(path))
    assert back.frames.shape == (num_frames, height, width, 3)
    if suffix != ".gif":
        assert back.fps == pytest.approx(fps, rel=1e-4)


@pytest.mark.parametrize("name", FILE_NAMES)
def test_same_frames_give_the_same_bytes(tmp_path, name):
    runs = [file_bytes(make_video(20).save(f"{tmp_path}/{run}{name}")) for run in range(6)]
    assert runs == [runs[0]] * 6


def test_better_quality_is_a_bigger_file(tmp_path):
    good, bad = (make_video().save(tmp_path / f"{crf}.mp4", quality=crf).stat().st_size for crf in (10, 40))
    assert good > bad
    for name, quality, words in [("a.mp4", 0, "1 .* 51"), ("a.webm", 64, "1 .* 63"), ("a.gif", 5, "without")]:
        with pytest.raises(ValueError, match=words):
            make_video().save(tmp_path / name, quality=quality)


@pytest.mark.parametrize(
    ("fps", "rate"),
    [(16, "16"), (23.976, "24000/1001"), (23.98, "24000/1001"), (29.97, "30000/1001"), (59.94, "60000/1001"),
     (24, "24"), (12.5, "25/2"), (30.5, "61/2"), (0.1, "1/10")],
)  # fmt: skip
def test_exact_rate(fps, rate):
    assert exact_rate(fps) == Fraction(rate)


# Laziness


@pytest.mark.parametrize("name", FILE_NAMES)
def test_frames_are_written_as_they_arrive(tmp_path, name):
    pulled, calls = [], []
    video = lazy_video(smooth_clip(30, 32, 48), pulled)
    video.save(f"{tmp_path}/{name}", on_frame=lambda done, total: calls.append((done, total, len(pulled))))
    assert calls == [
        (done, 30, done) for done in range(1, 31)
    ]  # nothing is pulled before the frame before it is written


@pytest.mark.parametrize("name", ["clip.gif", "clip/"])
def test_file_grows_as_frames_arrive(tmp_path, name):
    frames = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3), dtype=np.uint8)
    written = []

    def measure(done, total):
        written.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))

    path = Video(frames, fps=24, num_frames=100, height=64, width=64).save(f"{tmp_path}/{name}", on_frame=measure)
    total = sum(map(len, file_bytes(path)))
    assert total - written[-1] <= 2**18 + total / 50  # ffmpeg's write buffer and two frames


def test_writing_does_not_hold_the_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "KEEP_BYTES", 0)
    frame = smooth_clip(1, 256, 256)[0]
    video = Video(lambda: (frame.copy() for _ in range(40)), fps=24, num_frames=40, height=256, width=256)
    tracemalloc.start()
    try:
        video.save(tmp_path / "clip.mp4")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * frame.nbytes


def test_a_short_clip_is_decoded_once(tmp_path):
    pulled = []
    frames = smooth_clip(4, 16, 16)
    video = lazy_video(frames, pulled)
    assert len(video) == 4
    assert next(iter(video)).shape == (16, 16, 3)
    assert pulled == [0]  # a half iteration is not kept
    assert np.array_equal(np.stack(list(video)), frames)
    assert np.array_equal(video.frames, frames)
    video.save(tmp_path / "clip.gif")
    assert pulled == [0, 0, 1, 2, 3]


def test_a_long_clip_is_decoded_anew(monkeypatch):
    monkeypatch.setattr(video_module, "KEEP_BYTES", 4 * 16 * 16 * 3 - 1)
    pulled = []
    video = lazy_video(smooth_clip(4, 16, 16), pulled)
    for _ in range(2):
        assert len(list(video)) == 4
    assert len(pulled) == 8
    assert video.frames is video.frames  # asked for as a whole: kept
    assert len(pulled) == 12


def test_kept_frames_are_not_the_buffer_of_the_source():
    buffer = np.zeros((4, 4, 3), np.uint8)

    def decode():
        for value in range(3):
            buffer[:] = value
            yield buffer

    video = Video(decode, fps=1, num_frames=3, height=4, width=4)
    assert video.frames[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_abandoned_iteration_closes_the_source():
    closed = []

    def decode():
        try:
            while True:
                yield np.zeros((4, 4, 3), np.uint8)
        finally:
            closed.append(True)

    frames = iter(Video(decode, fps=1, num_frames=3, height=4, width=4))
    next(frames)
    frames.close()
    assert closed == [True]


def test_importing_does_not_load_torch():
    code = "import sys; from runtime.video import Video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Sources that break their promise


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([np.zeros((4, 6, 3), np.uint8)] * 2, "ended after 2 of the 3"),
        ([np.zeros((4, 6, 3), np.uint8)] * 4, "more than the 3"),
        ([np.zeros((6, 4, 3), np.uint8)] * 3, r"frame 0 .* uint8 \[6, 4, 3\], not uint8 \[4, 6, 3\]"),
        ([np.zeros((4, 6, 3), np.float32)] * 3, "frame 0 .* float32"),
        (["frame"] * 3, "frame 0 .* str"),
    ],
)
def test_broken_source(tmp_path, frames, words):
    video = Video(lambda: iter(frames), fps=24, num_frames=3, height=4, width=6)
    with pytest.raises(RuntimeError, match=words):
        video.save(tmp_path / "clip.mp4")
    with pytest.raises(RuntimeError, match=words):
        _ = video.frames
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "nan"),
        ({"num_frames": 0}, "0 frames"),
        ({"width": 7}, "must be uint8"),
    ],
)
def test_illegal_construction(change, words):
    arguments = {"fps": 24, "num_frames": 2, "height": 4, "width": 6} | change
    with pytest.raises(ValueError, match=words):
        Video(np.zeros((2, 4, 6, 3), np.uint8), **arguments)


# Safety


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("decoder"), GeneratorExit])
@pytest.mark.parametrize("fail_at", [0, 5])
@pytest.mark.parametrize("name", [*FILE_NAMES, "clip.png"])
def test_interrupted_run_leaves_no_file(tmp_path, name, fail_at, error):
    frames = smooth_clip(8, 32, 48)[: 1 if name == "clip.png" else None]
    video = lazy_video(frames, [], fail_at=min(fail_at, len(frames) - 1), error=error)
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        video.save(f"{tmp_path}/{name}")
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == handles


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip.png"])
def test_interrupted_run_leaves_the_old_file(tmp_path, name):
    def cancel(done, total):
        raise KeyboardInterrupt

    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        make_video(num_frames=1).save(path, on_frame=cancel)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]
    make_video(num_frames=1).save(path)
    assert path.read_bytes() != b"old"
    assert os.listdir(tmp_path) == [name]


def test_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    seen = []
    make_video().save(path, on_frame=lambda done, total: seen.append(path.read_bytes()))
    assert set(seen) == {b"old"}


def test_awkward_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ["a:b.mp4", "100%.png", "x" * 251 + ".mp4", "ü ✓.GIF", "concat:a|b.webm"]:
        assert read_video(make_video(num_frames=1).save(name)).num_frames == 1


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of the given number of bytes; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount a small file system: {error}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("share", [0.1, 0.7, 0.98])  # full early, in the middle, and only when the file is closed
@pytest.mark.parametrize("name", FILE_NAMES)
def test_full_disk(tmp_path, small_disk, name, share):
    frames = np.random.default_rng(0).integers(0, 256, (8, 96, 128, 3), dtype=np.uint8)
    video = Video(frames, fps=24, num_frames=8, height=96, width=128)
    needed = sum(map(len, file_bytes(video.save(f"{tmp_path}/{name}"))))
    disk = small_disk(max(12288, int(needed * share) // 4096 * 4096))
    with pytest.raises(
        OSError, match=rf"no space left on the disk: {disk}/clip.* MB free in {disk}; make room"
    ) as caught:
        video.save(f"{disk}/{name}")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(disk) == []


def test_full_disk_without_mounting(tmp_path, monkeypatch):
    def no_space(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    for name in FILE_NAMES:
        with pytest.raises(OSError, match=r"no space left on the disk: .*make room") as caught:
            make_video().save(f"{tmp_path}/{name}")
        assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


# Targets


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_never_reach_the_encoder(tmp_path, suffix):
    with pytest.raises(ValueError, match=r"width 33 \(nearest 32 and 34\) and height 17 \(nearest 16 and 18\)"):
        make_video(1, 17, 33).save(tmp_path / f"clip{suffix}")
    with pytest.raises(ValueError, match=r"width 33 \(nearest 32 and 34\);"):
        check_writable(tmp_path / f"clip{suffix}", height=16, width=33)
    for name in ("clip.gif", "clip.png"):
        back = read_video(make_video(1, 17, 33).save(tmp_path / name))
        assert (back.height, back.width) == (17, 33)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("clip.avi", ValueError, r"unknown suffix .avi; use .mp4, .webm, .gif, .png, or a folder"),
        ("missing/clip.mp4", FileNotFoundError, "missing does not exist; create it"),
        ("missing/frames/", FileNotFoundError, "missing does not exist; create it"),
        ("picture.png", ValueError, "one picture, 9 frames given; name a folder, like picture/"),
        ("folder.mp4", IsADirectoryError, "is a folder; name a file"),
        ("file", NotADirectoryError, "is a file without a legal suffix"),
        ("full", ValueError, "not empty; name a new or an empty folder"),
        ("link", ValueError, "link or a mount point"),
        ("fast.gif", ValueError, "at most 50 frames per second, 60 given"),
    ],
)
def test_illegal_targets(tmp_path, name, error, words):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "full.empty")
    (tmp_path / "full.empty").mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=words):
        check_writable(f"{tmp_path}/{name}", num_frames=9, height=16, width=16, fps=60)
    pulled = []
    with pytest.raises(error, match=words):
        lazy_video(smooth_clip(9, 16, 16), pulled, fps=60).save(f"{tmp_path}/{name}")
    assert pulled == []
    assert sorted(os.listdir(tmp_path)) == before


def test_unwritable_folder(monkeypatch, tmp_path):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(video_module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"is not writable \(Read-only file system\); choose another"):
        check_writable(tmp_path / "clip.mp4")


def test_system_folder_is_not_writable():
    with pytest.raises(PermissionError, match="/proc is not writable"):
        check_writable("/proc/clip.mp4")


def test_legal_targets_leave_no_trace(tmp_path):
    for name in ["clip.mp4", "CLIP.MP4", "clip.webm", "clip.gif", "clip.png", "frames", "frames/"]:
        check_writable(f"{tmp_path}/{name}", num_frames=1, height=16, width=16, fps=24)
        check_writable(f"{tmp_path}/{name}")
    assert os.listdir(tmp_path) == []


# Reading


def test_reading_is_lazy_and_repeatable(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "KEEP_BYTES", 0)
    back = read_video(make_video().save(tmp_path / "clip.mp4"))
    first = next(iter(back))
    assert np.array_equal(first, next(iter(back)))
    assert len(list(back)) == len(list(back)) == 8


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4 does not exist"):
        read_video(tmp_path / "nothing.mp4")
    (tmp_path / "text.mp4").write_text("not a video at all " * 100)
    with pytest.raises(ValueError, match=r"text\.mp4 is no mp4, webm, gif, png, jpeg or webp"):
        read_video(tmp_path / "text.mp4")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match=r"list\.mp4 is no mp4"):
        read_video(tmp_path / "list.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no numbered PNG"):
        read_video(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"96x64; at most 6143 pixels"):
        read_video(make_video().save(tmp_path / "clip.mp4"), max_pixels=6143)


def test_sound_without_pictures(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no video stream"):
        read_video(tmp_path / "sound.mp4")


def test_damaged_video(tmp_path):
    path = make_video(20).save(tmp_path / "clip.mp4")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 1200
    data[start:] = bytes(len(data) - start)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"clip\.mp4 is damaged"):
        _ = read_video(path).frames


def test_missing_picture_of_a_folder(tmp_path):
    folder = make_video(4).save(f"{tmp_path}/frames/")
    (folder / "00002.png").unlink()
    with pytest.raises(ValueError, match=r"lacks frame 2: after 00001\.png comes 00003\.png"):
        read_video(folder)
