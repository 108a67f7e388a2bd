"""Videos in and out: a lazy iterator of frames, saved to mp4, webm, gif or png as the frames arrive; and reading them.

A file is published in one step: it is written beside the final name and renamed when all is on disk, so a reader sees
the whole video or none.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from runtime.kinds import READING
from runtime.sound import Sound
from runtime.writing import ENCODINGS, write_encoded, write_gif, write_png

if TYPE_CHECKING:
    import torch

Frames = Generator[np.ndarray, None, None]  # uint8 [H, W, 3] each

KEEP_BYTES = 512 * 2**20  # a clip up to this size stays in memory after its first whole iteration
MAX_PIXELS = 2**25  # of one frame that is read: 8K (7680x4320) just fits
PQ, HLG = 16, 18  # codes of high dynamic range in ITU-T H.273
# swscale's flags (PyAV names them only from version 18): bicubic, accurate rounding, full chroma output
YUV_TO_RGB = 0x4 | 0x40000 | 0x2000
GIF_MAX_FPS = 50  # viewers slow frames shorter than 20 ms down to 100 ms


SUFFIXES = (*ENCODINGS, ".gif", ".png")


class Video:
    """Iterator of uint8 frames [H, W, 3] with fps, latents and receipt; decodes lazily.

    `source` is a uint8 array [F, H, W, 3], or a callable that returns a fresh iterator of uint8 frames [H, W, 3] (each
    call decodes anew). The frames of a whole iteration are kept if the clip is at most `KEEP_BYTES`, so that a later
    `frames` or `save` does not decode again. `latents` and `receipt` are only carried;
    `sounds` are written to mp4 and webm.

    Raises ValueError for an illegal fps or size; iterating raises RuntimeError if the source yields other frames than
    promised.
    """

    def __init__(
        self,
        source: np.ndarray | Callable[[], Iterable[np.ndarray]],
        *,
        fps: float,
        num_frames: int,
        height: int,
        width: int,
        latents: torch.Tensor | None = None,
        receipt: Any = None,
        sounds: Sequence[Sound] = (),
    ) -> None:
        if not 0.01 <= fps <= 1000:  # also refuses NaN
            raise ValueError(f"fps is {fps}; it must be between 0.01 and 1000")
        shape = (int(num_frames), int(height), int(width), 3)
        if min(shape) < 1:
            raise ValueError(f"{num_frames} frames of {width}x{height} given; each number must be at least 1")
        if isinstance(source, np.ndarray) and (source.shape != shape or source.dtype != np.uint8):
            raise ValueError(f"source is {source.dtype} {list(source.shape)}; it must be uint8 {list(shape)}")
        self.fps, (self.num_frames, self.height, self.width, _) = float(fps), shape
        self.latents, self.receipt, self.sounds = latents, receipt, tuple(sounds)
        self.origin: Path | None = None  # the file that the frames are read from
        self._shape = shape
        self._frames = source if isinstance(source, np.ndarray) else None
        self._source = None if isinstance(source, np.ndarray) else source

    def __len__(self) -> int:
        return self.num_frames

    def __repr__(self) -> str:
        return f"Video({self.num_frames} frames, {self.width}x{self.height}, {self.fps:g} fps)"

    def __iter__(self) -> Frames:
        """Yield the frames, uint8 [H, W, 3], each as soon as it is decoded."""
        return self._decode(keep=math.prod(self._shape) <= KEEP_BYTES)

    @property
    def frames(self) -> np.ndarray:
        """All frames, uint8 [F, H, W, 3]; decoded on the first use and kept from then on, whatever their size."""
        if self._frames is None:
            for _ in self._decode(keep=True):
                pass
        assert self._frames is not None
        return self._frames

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        quality: int | None = None,
        on_frame: Callable[[int, int], None] | None = None,
        seal: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write the video in the format that the suffix names, and return the path.

        `.mp4` is H.264, `.webm` is VP9, `.gif` loops forever, `.png` holds a single frame; a folder (an existing empty
        one, or a name that ends in "/" or has no suffix) gets numbered PNG files. `quality` is the encoder's CRF, lower
        is better: 1 to 51 for mp4 (default 18), 1 to 63 for webm (default 24). `on_frame(done, total)` is called after
        each frame written. `seal(file)` is called with the finished file before it gets its name.

        The file appears under its name only when complete; after any failure an older file of that name is still there.
        Raises what `check_writable` raises, ValueError for an illegal quality, OSError (ENOSPC) when the disk is full.
        """
        check_writable(path, self.num_frames, self.height, self.width, self.fps)
        target, kind = Path(path).absolute(), output_kind(path)
        if quality is not None:
            _check_quality(kind, quality)
        reported = closing(self._reporting(on_frame))
        with _explained_disk_full(target), _published(target) as unfinished, reported as frames:
            if kind in ENCODINGS:
                write_encoded(unfinished, frames, self, ENCODINGS[kind], quality)
            elif kind == ".gif":
                write_gif(unfinished, frames, self)
            else:
                write_png(unfinished, frames, numbered=kind == "folder")
            if seal is not None:
                seal(unfinished)
        return Path(path)

    def _decode(self, keep: bool) -> Frames:
        if self._frames is not None:
            yield from self._frames
            return
        assert self._source is not None
        kept = np.empty(self._shape, np.uint8) if keep else None
        decoded = iter(self._source())
        done = 0
        try:
            for frame in decoded:
                if done == self.num_frames:
                    raise RuntimeError(f"the source yields more than the {self.num_frames} frames it promised")
                if getattr(frame, "dtype", None) != np.uint8 or frame.shape != self._shape[1:]:
                    given = f"{getattr(frame, 'dtype', type(frame).__name__)} {list(getattr(frame, 'shape', []))}"
                    raise RuntimeError(f"frame {done} of the source is {given}, not uint8 {list(self._shape[1:])}")
                if kept is not None:
                    kept[done] = frame
                done += 1
                yield frame
        finally:
            if hasattr(decoded, "close"):
                decoded.close()
        if done < self.num_frames:
            raise RuntimeError(f"the source ended after {done} of the {self.num_frames} frames it promised")
        if kept is not None:
            self._frames, self._source = kept, None  # lets go of the decoder and the model behind it

    def _reporting(self, on_frame: Callable[[int, int], None] | None) -> Frames:
        with closing(iter(self)) as frames:
            for done, frame in enumerate(frames, 1):
                yield frame
                if on_frame is not None:
                    on_frame(done, self.num_frames)


def output_kind(path: str | os.PathLike[str]) -> str:
    """The format a path names: ".mp4", ".webm", ".gif", ".png" or "folder"; ValueError if none."""
    text, suffix = os.fspath(path), Path(path).suffix.lower()
    if text.endswith("/"):
        return "folder"
    if suffix in SUFFIXES:
        return suffix
    if not suffix or Path(path).is_dir():
        return "folder"
    raise ValueError(f"{text}: unknown suffix {suffix}; use {', '.join(SUFFIXES)}, or a folder for numbered pictures")


def check_writable(
    path: str | os.PathLike[str],
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
) -> None:
    """Raise now what `Video.save` would raise about its target later; meant to be called before any model is loaded.

    ValueError: suffix, size, frame count or rate that the format cannot hold, or a folder that is not empty.
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError: a target that cannot be written.
    """
    target, kind = Path(path).absolute(), output_kind(path)
    if kind in ENCODINGS:
        _check_encodable(kind, height, width)
    elif kind == ".gif" and fps is not None and fps > GIF_MAX_FPS:
        raise ValueError(f"gif shows at most {GIF_MAX_FPS} frames per second, {fps:g} given; write .mp4 or .webm")
    elif kind == ".png" and num_frames is not None and num_frames > 1:
        folder = target.with_suffix("").name
        raise ValueError(f"{path} holds one picture, {num_frames} frames given; name a folder, like {folder}/, or .mp4")

    if kind != "folder" and target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder; name a file, or add a / for numbered pictures")
    if kind == "folder" and target.exists():
        if not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{path} is a file without a legal suffix ({', '.join(SUFFIXES)})")
        if any(target.iterdir()):
            raise ValueError(f"{path} is not empty; name a new or an empty folder for the numbered pictures")
        if target.is_symlink() or target.is_mount():
            raise ValueError(f"{path} is a link or a mount point and cannot be replaced; name a new folder inside it")
    _check_parent(target.parent)


def _check_encodable(kind: str, height: int | None, width: int | None) -> None:
    sizes = (("width", width), ("height", height))
    odd = [f"{name} {size} (nearest {size - 1 or 2} and {size + 1})" for name, size in sizes if size and size % 2]
    if odd:
        raise ValueError(f"{kind} needs even sizes, given {' and '.join(odd)}; .gif and .png take any size")
    codec = ENCODINGS[kind].codec
    if codec not in av.codecs_available:
        raise ValueError(f"this PyAV lacks {codec}, which writes {kind}; install PyAV's own wheel: pip install av")


def _check_parent(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder {folder} does not exist; create it, or write somewhere else")
    with _explained_disk_full(folder):
        try:
            tempfile.TemporaryFile(dir=folder).close()  # only the file system knows: a superuser passes every access()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = f"the folder {folder} is not writable ({error.strerror}); choose another one"
            raise PermissionError(errno.EACCES, message) from error


def _check_quality(kind: str, quality: int) -> None:
    if kind not in ENCODINGS:
        raise ValueError(f"quality is for {' and '.join(ENCODINGS)}; {kind} is written without it")
    worst = ENCODINGS[kind].worst_quality
    if not 1 <= quality <= worst:
        raise ValueError(f"quality is {quality}; for {kind} it must be between 1 (best) and {worst}")


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """Yield a name beside `target` to write to; rename it to `target` on success, remove it on any exception."""
    unfinished = target.with_name(f".{target.stem[:32]}.{secrets.token_hex(4)}.partial{target.suffix}")
    try:
        yield unfinished
        if unfinished.is_file():
            _sync(unfinished)
        unfinished.replace(target)
    except BaseException:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained_disk_full(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = target if target.is_dir() else target.parent
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(
            error.errno,
            f"no space left on the disk: {target} needs more than the {free:.1f} MB free in {folder}; "
            "make room there, or write to another disk",
        ) from error


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
        durations = [
            packet.duration or 0 for packet in container.demux(stream) if packet.size and not packet.is_discard
        ]
        if container.format.name == "gif" and stream.time_base and sum(durations):
            fps = float(len(durations) / (sum(durations) * stream.time_base))  # average_rate is a rough guess there
        elif not container.format.name.endswith("_pipe") and stream.average_rate:
            fps = float(stream.average_rate)
        heard = bool(container.streams.audio)
    num_frames = len(durations)
    if num_frames == 0:
        raise ValueError(f"{path} holds no frame")
    times, turns = _look(path)
    frames: Callable[[], Iterable[np.ndarray]] = partial(_decode_file, path, width, height, num_frames, turns)
    if turns % 2:
        width, height = height, width
    if (shown := _steady(times, fps)) is not None:
        frames = partial(_picked, frames, shown)
        num_frames = len(shown)
    sounds = [Sound(path.absolute(), 0.0, num_frames / fps)] if heard else []
    video = Video(frames, fps=fps, num_frames=num_frames, height=height, width=width, sounds=sounds)
    video.origin = path
    return video


def _look(path: Path) -> tuple[list[float], int]:
    """Return when each frame is shown, in seconds, and by how many quarter turns frames must be turned to stand up."""
    with _open_for_reading(path) as container:
        stream = container.streams.video[0]
        first = None
        with suppress(av.FFmpegError):  # what is damaged is told when it is decoded
            first = next(container.decode(stream), None)
    if first is not None and first.color_trc in (PQ, HLG):
        warnings.warn(f"{path} is HDR and is read without tone mapping; convert it for right colours", stacklevel=3)
    turns = 0 if first is None else round(first.rotation / 90) % 4
    with _open_for_reading(path) as container:
        stream = container.streams.video[0]
        stamps = sorted(p.pts for p in container.demux(stream) if p.size and not p.is_discard and p.pts is not None)
        return [float((stamp - stamps[0]) * (stream.time_base or 0)) for stamp in stamps], turns


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
        container = av.open(str(path.absolute()), options=READING)
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
        raise ValueError(f"{path} says no size that can be read; at most {max_pixels} pixels of a frame are read")
    if context.width * context.height > max_pixels:
        raise ValueError(f"{path} has frames of {context.width}x{context.height}; at most {max_pixels} pixels are read")
    return context.width, context.height


def _decode_file(path: Path, width: int, height: int, num_frames: int = 1, turns: int = 0) -> Frames:
    reformatter, done = VideoReformatter(), 0
    with _open_for_reading(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                picture = _to_rgb(reformatter, frame, width, height)
                yield np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture
                done += 1
        except av.FFmpegError as error:
            raise ValueError(f"{path} is damaged: frame {done} cannot be decoded ({error.strerror})") from error
    if done < num_frames:
        raise ValueError(f"{path} is damaged: only {done} of {num_frames} frames can be decoded")


def _decode_files(files: list[Path], width: int, height: int) -> Frames:
    for file in files:
        yield from _decode_file(file, width, height)


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
