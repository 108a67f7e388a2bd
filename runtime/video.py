"""A video: a lazy iterator of frames, saved to mp4, webm, gif or png as the frames arrive.

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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from runtime.sound import Sound
from runtime.writing import ENCODINGS, write_encoded, write_gif, write_png

if TYPE_CHECKING:
    import torch

Frames = Generator[np.ndarray, None, None]  # uint8 [H, W, 3] each

KEEP_BYTES = 512 * 2**20  # a clip up to this size stays in memory after its first whole iteration
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
        check_encodable(kind, height, width)
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


def check_encodable(kind: str, height: int | None, width: int | None) -> None:
    """ValueError for a size that ".mp4" or ".webm" cannot hold, or where this PyAV does not write it."""
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
