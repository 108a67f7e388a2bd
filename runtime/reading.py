"""Clips in: a file or a folder of numbered pictures as a `Video` whose frames are decoded when asked for."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from runtime.kinds import READERS, READING, kind_of
from runtime.sound import Sound
from runtime.upright import frame_way, lies, picture_way, upright
from runtime.video import Frames, Video

MAX_PIXELS = 2**25  # of one frame that is read: 8K (7680x4320) just fits
PQ, HLG = 16, 18  # codes of high dynamic range in ITU-T H.273
# swscale's flags (PyAV names them only from version 18): bicubic, accurate rounding, full chroma output
YUV_TO_RGB = 0x4 | 0x40000 | 0x2000


def read_video(path: str | os.PathLike[str], *, fps: float = 24.0, max_pixels: int = MAX_PIXELS) -> Video:
    """Open an mp4, webm, gif, png, jpeg, webp, or a folder of numbered PNG files; frames are decoded when asked for.

    `fps` is the rate of a picture or a folder, which carry none. Frames of a varying rate are taken at its average, the
    one that is shown at each tick; what is stored turned is turned upright. Transparency is dropped. Raises
    FileNotFoundError, and ValueError for a file that is no video, is damaged, or has frames of more than `max_pixels`
    pixels.
    """
    path = Path(path)
    if path.is_dir():
        files = numbered_files(path)
        numbers = sorted(files)
        for before, after in pairwise(numbers):
            if after != before + 1:
                raise ValueError(
                    f"{path} lacks frame {before + 1}: after {files[before].name} comes {files[after].name}"
                )
        return read_pictures([files[number] for number in numbers], fps=fps, max_pixels=max_pixels)
    with _open_for_reading(path) as container:
        width, height = _frame_size(path, container, max_pixels)
        stream = container.streams.video[0]
        packets = [
            (packet.duration or 0, packet.pts)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        durations = [duration for duration, _ in packets]
        stamps = sorted(stamp for _, stamp in packets if stamp is not None)
        times = [float((stamp - stamps[0]) * (stream.time_base or 0)) for stamp in stamps]
        if container.format.name == "gif" and stream.time_base and sum(durations):
            fps = float(len(durations) / (sum(durations) * stream.time_base))  # average_rate is a rough guess there
        elif not container.format.name.endswith("_pipe") and stream.average_rate:
            fps = float(stream.average_rate)
        heard = bool(container.streams.audio)
    num_frames = len(durations)
    if num_frames == 0:
        raise ValueError(f"{path} holds no frame")
    way = _look(path)
    frames: Callable[[], Iterable[np.ndarray]] = partial(_decode_file, path, width, height, num_frames, way)
    if lies(way):
        width, height = height, width
    if (shown := _steady(times, fps)) is not None:
        frames = partial(_picked, frames, shown)
        num_frames = len(shown)
    sounds = [Sound(path.absolute(), 0.0, num_frames / fps)] if heard else []
    video = Video(frames, fps=fps, num_frames=num_frames, height=height, width=width, sounds=sounds)
    video.origin = path
    return video


def _look(path: Path) -> int:
    """Return in which way, of EXIF's, frames are stored, as the first one says."""
    with _open_for_reading(path) as container:
        stream, picture = container.streams.video[0], container.format.name.endswith("_pipe")
        first = None
        with suppress(av.FFmpegError):  # what is damaged is told when it is decoded
            first = next(container.decode(stream), None)
    if first is not None and first.color_trc in (PQ, HLG):
        warnings.warn(f"{path} is HDR and is read without tone mapping; convert it for right colours", stacklevel=3)
    return picture_way(path) if picture else 1 if first is None else frame_way(first)


def _steady(times: list[float], fps: float) -> list[int] | None:
    """Return which frame is shown at each tick of a steady rate, or None where the frames are steady already."""
    if all(abs(seconds - i / fps) <= 0.5 / fps for i, seconds in enumerate(times)):
        return None
    count = max(len(times), round(times[-1] * fps) + 1)
    ticks = np.arange(count) / fps + 1e-6
    return [int(i) for i in np.clip(np.searchsorted(times, ticks, side="right") - 1, 0, len(times) - 1)]


def _picked(frames: Callable[[], Iterable[np.ndarray]], indices: list[int]) -> Frames:
    """Yield the frames at rising indices; one may be there again."""
    source = enumerate(frames())
    index, frame = next(source)
    for wanted in indices:
        while index < wanted:
            index, frame = next(source)
        yield frame


def read_pictures(files: list[Path], *, fps: float = 24.0, max_pixels: int = MAX_PIXELS) -> Video:
    """Open PNG files as the frames of a video, in their order; raises what `read_video` raises."""
    with _open_for_reading(files[0]) as container:
        width, height = _frame_size(files[0], container, max_pixels)
    if lies(picture_way(files[0])):
        width, height = height, width
    frames = partial(_decode_files, files, width, height)
    return Video(frames, fps=fps, num_frames=len(files), height=height, width=width)


def numbered_files(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the PNG files of a folder whose names are numbers, by number; ValueError where there are none."""
    files = {int(file.stem): file for file in Path(folder).glob("*.png") if file.stem.isdecimal()}
    if not files:
        raise ValueError(f"{folder} holds no numbered PNG files (00000.png, 00001.png, ...)")
    return files


@contextmanager
def _open_for_reading(path: Path) -> Iterator[InputContainer]:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"{path} does not exist or is no file")
    try:
        container = av.open(str(path.absolute()), format=READERS.get(kind_of(path) or ""), options=READING)
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"{path} is no mp4, webm, gif, png, jpeg or webp that can be read ({error.strerror})"
        ) from error
    with container:
        if not container.streams.video:
            raise ValueError(f"{path} has no video stream")
        yield container


def _frame_size(path: Path, container: InputContainer, max_pixels: int) -> tuple[int, int]:
    context = container.streams.video[0].codec_context
    if not context.width * context.height:
        if container.format.name == "webp_pipe":
            raise ValueError(
                f"{path} is a webp that is animated or says no size; none can be read: take a still one, gif or mp4"
            )
        raise ValueError(f"{path} says no size that can be read; at most {max_pixels} pixels of a frame are read")
    if context.width * context.height > max_pixels:
        raise ValueError(f"{path} has frames of {context.width}x{context.height}; at most {max_pixels} pixels are read")
    return context.width, context.height


def _decode_file(path: Path, width: int, height: int, num_frames: int = 1, way: int = 1) -> Frames:
    reformatter, done = VideoReformatter(), 0
    with _open_for_reading(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                yield upright(_to_rgb(reformatter, frame, width, height), way)
                done += 1
        except av.FFmpegError as error:
            raise ValueError(f"{path} is damaged: frame {done} cannot be decoded ({error.strerror})") from error
    if done < num_frames:
        raise ValueError(f"{path} is damaged: only {done} of {num_frames} frames can be decoded")


def _decode_files(files: list[Path], width: int, height: int) -> Frames:
    for file in files:
        way = picture_way(file)
        stored = (height, width) if lies(way) else (width, height)
        yield from _decode_file(file, *stored, way=way)


def _to_rgb(reformatter: VideoReformatter, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    matrix = None
    if frame.colorspace == 2 and not frame.format.is_rgb:  # unspecified: the players' convention
        matrix = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    rgb = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=matrix,
        dst_color_range=ColorRange.JPEG,
        interpolation=YUV_TO_RGB,
    )
    return rgb.to_ndarray()
