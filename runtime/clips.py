"""Clip: frames that a request brings; here they become what the model takes: one size, one rate, uint8."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from runtime.reading import numbered_files, read_pictures, read_video
from runtime.sound import cut
from runtime.video import Video

FITS = ("crop", "pad", "stretch")
BICUBIC_EXACT = 0x4 | 0x40000  # swscale's flags: bicubic, accurate rounding


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames that are known: a Video, a uint8 array [F, H, W, 3] or [H, W, 3], or the path of a clip or picture.

    `at` is the frame of the result where it begins, "end" so that it ends there. `hold` says how firmly it is kept: 1
    is unchanged, less lets it go once the noise is below 1 - hold. `mask` [F, H, W] or [H, W] is true where the clip is
    to be made anew, for models that take one, or the path of a picture or clip that is white there; `mask_hash` is what
    a receipt says of it. Raises ValueError for anything else, and what `read_video` raises for a file.
    """

    frames: Video | np.ndarray | str | os.PathLike[str]
    at: int | Literal["end"] = 0
    hold: float = 1.0
    mask: np.ndarray | str | os.PathLike[str] | None = None
    mask_hash: str | None = None

    def __post_init__(self) -> None:
        if self.at != "end" and (isinstance(self.at, bool) or not isinstance(self.at, int) or self.at < 0):
            raise ValueError(f"a clip stands at {self.at!r}; legal: a frame number of at least 0, or 'end'")
        if isinstance(self.hold, bool) or not isinstance(self.hold, int | float) or not 0 < self.hold <= 1:
            raise ValueError(f"a clip's hold is {self.hold!r}; legal: more than 0, up to 1 (unchanged)")
        if isinstance(self.frames, np.ndarray):
            shape, kind = self.frames.shape, self.frames.dtype
            if kind != np.uint8 or len(shape) not in (3, 4) or shape[-1] != 3 or 0 in shape:
                raise ValueError(
                    f"a clip's frames are {kind} {list(shape)}; legal: uint8 [frames, height, width, 3] or [height, "
                    "width, 3], a Video, or a path"
                )
        elif not isinstance(self.frames, Video | str | os.PathLike):
            raise ValueError(f"a clip's frames are {type(self.frames).__name__}; legal: a Video, a uint8 array, a path")

    def masks(self, width: int, height: int, fps: float, fit: str) -> Video:
        """Return the mask as frames at a size and a rate, as `conformed` does; white is to be made anew.

        ValueError for a mask of another size or number of frames than the clip's, or another than `mask_hash` says.
        """
        video = self.video
        mask = np.broadcast_to(self.masked, (video.num_frames, video.height, video.width))
        white = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=3)
        frames = Video(white, fps=video.fps, num_frames=len(white), height=video.height, width=video.width)
        return conformed(Clip(white if self.fps is None else frames), width, height, fps, fit)

    @cached_property
    def masked(self) -> np.ndarray:
        """The mask, bool [F, H, W] or [H, W]; one from a file is scaled to the clip's size. ValueError as `masks`."""
        assert self.mask is not None
        video, which = self.video, "the mask"
        if isinstance(self.mask, np.ndarray):
            mask = self.mask.astype(bool)
        else:
            which = f"the mask {os.fspath(self.mask)}"
            frames = [fit_frame(f, video.width, video.height, "stretch")[..., 1] > 127 for f in read_video(self.mask)]
            mask = np.stack(frames) if len(frames) > 1 else frames[0]
        if mask.shape not in ((video.height, video.width), (video.num_frames, video.height, video.width)):
            raise ValueError(
                f"{which} is {list(mask.shape)}; legal for this clip: [{video.height}, {video.width}], or "
                f"[{video.num_frames}, {video.height}, {video.width}]"
            )
        if self.mask_hash not in (None, mask_hash(mask)):
            raise ValueError(f"{which} is another than the receipt's; legal: the same, or no mask_hash")
        return mask

    @cached_property
    def video(self) -> Video:
        """The frames as a Video; a path is opened, not yet decoded."""
        if isinstance(self.frames, Video):
            return self.frames
        if isinstance(self.frames, np.ndarray):
            array = self.frames if self.frames.ndim == 4 else self.frames[None]
            count, height, width, _ = array.shape
            return Video(np.ascontiguousarray(array), fps=24, num_frames=count, height=height, width=width)
        return read_video(self.frames)

    @property
    def fps(self) -> float | None:
        """Frames per second, or None for what carries no rate: a picture, an array."""
        return None if isinstance(self.frames, np.ndarray) or self.video.num_frames == 1 else self.video.fps

    def count(self, fps: float) -> int:
        """Return how many frames it has at a rate; what carries no rate has the frames it has."""
        if self.fps is None or self.fps == fps:
            return self.video.num_frames
        return max(1, round(self.video.num_frames * fps / self.fps))

    def record(self) -> dict[str, Any]:
        """Return what a receipt says of it; Clip(**record) opens it again where it came from a file."""
        frames = os.fspath(self.frames) if isinstance(self.frames, str | os.PathLike) else f"{self.video!r} in memory"
        found: dict[str, Any] = {"frames": frames, "at": self.at, "hold": self.hold}
        if self.mask is None:
            return found
        mask = "in memory" if isinstance(self.mask, np.ndarray) else os.fspath(self.mask)
        return found | {"mask": mask, "mask_hash": mask_hash(self.masked)}


def mask_hash(mask: np.ndarray) -> str:
    """Return the SHA-256 of a mask, bool, its shape included."""
    return "sha256:" + hashlib.sha256(f"{mask.shape} ".encode() + np.packbits(mask).tobytes()).hexdigest()


def conformed(clip: Clip, width: int, height: int, fps: float, fit: str) -> Video:
    """Return a clip's frames at a size and a rate; frames that fit already are passed on as they are.

    Another rate takes the nearest frame in time. Another shape is scaled to fill and cut in the middle ("crop"), scaled
    to fit with black beside it ("pad"), or scaled in each direction alone ("stretch").
    """
    video, count = clip.video, clip.count(fps)
    if (video.width, video.height, video.num_frames) == (width, height, count):
        return video

    def frames() -> Iterator[np.ndarray]:
        ratio = video.num_frames / count
        wanted = [min(int((i + 0.5) * ratio), video.num_frames - 1) for i in range(count)]
        taken = 0
        for index, frame in enumerate(video):
            fitted = None
            while taken < count and wanted[taken] == index:
                fitted = fit_frame(frame, width, height, fit) if fitted is None else fitted
                yield fitted
                taken += 1
            if taken == count:
                return

    return Video(frames, fps=fps, num_frames=count, height=height, width=width, sounds=video.sounds)


def fit_frame(frame: np.ndarray, width: int, height: int, fit: str) -> np.ndarray:
    """Return a frame [H, W, 3] at a size, as `conformed` says."""
    rows, columns = frame.shape[:2]
    if (columns, rows) == (width, height):
        return frame
    if fit == "crop":
        scale = max(width / columns, height / rows)
        kept_rows, kept_columns = min(rows, round(height / scale)), min(columns, round(width / scale))
        top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
        return scaled(frame[top : top + kept_rows, left : left + kept_columns], width, height)
    if fit == "pad":
        scale = min(width / columns, height / rows)
        inner = scaled(frame, max(1, round(columns * scale)), max(1, round(rows * scale)))
        canvas = np.zeros((height, width, 3), np.uint8)
        top, left = (height - inner.shape[0]) // 2, (width - inner.shape[1]) // 2
        canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
        return canvas
    return scaled(frame, width, height)


def scaled(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a frame [H, W, 3] scaled bicubically."""
    source = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    reformatter = VideoReformatter()
    result = reformatter.reformat(source, width=width, height=height, format="rgb24", interpolation=BICUBIC_EXACT)
    return result.to_ndarray()


def part_of(video: Video, start: int, count: int) -> Iterator[np.ndarray]:
    """Yield `count` frames of a video from `start` on."""
    return islice(iter(video), start, start + count)


def cut_clip(path: str | os.PathLike[str], start: int, stop: int) -> Video:
    """Return the frames of a clip from `start` up to before `stop`, and their sound; ValueError where it lacks them."""
    whole = read_video(path)
    if not 0 <= start < stop <= whole.num_frames:
        raise ValueError(
            f"frames {start} to {stop} of a clip are asked for; legal: onward, within its {whole.num_frames} frames"
        )
    return _cut(whole, start, stop)


def _cut(whole: Video, start: int, stop: int) -> Video:
    part = Video(
        partial(part_of, whole, start, stop - start),
        fps=whole.fps, num_frames=stop - start, height=whole.height, width=whole.width,
        sounds=cut(whole.sounds, start / whole.fps, (stop - start) / whole.fps, 0.0),
    )  # fmt: skip
    part.origin = whole.origin
    return part


def runs(path: str | os.PathLike[str], missing: set[int]) -> tuple[tuple[Clip, ...], int]:
    """Return the clips of what is there of a clip or a folder of numbered pictures, and how many frames it has in all.

    Frames are counted from 0, a folder's from its lowest number on; those in `missing` are left out, and so are
    numbers that the folder lacks. ValueError where nothing is left, or nothing is missing.
    """
    if Path(path).is_dir():
        files = numbered_files(path)
        first, last = min(files), max(files)
        total = last - first + 1
        there = [place for place in range(total) if place + first in files and place not in missing]
    else:
        whole = read_video(path)
        total = whole.num_frames
        there = [place for place in range(total) if place not in missing]
    if missing and max(missing) >= total:
        raise ValueError(f"frame {max(missing)} is missing, but {path} has frames 0 to {total - 1}")
    if not there or len(there) == total:
        state = "all frames are" if not there else "no frame is"
        raise ValueError(f"{state} missing in {path}; legal: some, so name them with --missing, such as 12-20,33")
    clips = []
    for _, group in groupby(enumerate(there), key=lambda pair: pair[1] - pair[0]):
        places = [place for _, place in group]
        if Path(path).is_dir():
            frames = read_pictures([files[place + first] for place in places])
        else:
            frames = _cut(whole, places[0], places[-1] + 1)
        clips.append(Clip(frames, at=places[0]))
    return tuple(clips), total


def natural_size(width: int, height: int, multiple: tuple[int, int], area: int) -> tuple[int, int]:
    """Return the (width, height) of what is made of a clip: its own, in even numbers, up to four times `area` pixels.

    One that is larger still is brought to about `area`, in multiples of (down, across), and so is what is smaller than
    one of them, which is as small as it gets.
    """
    down, across = multiple
    if width >= across and height >= down and width * height <= 4 * area:
        return width - width % 2, height - height % 2
    scale = min(1.0, math.sqrt(area / (width * height)))
    return max(1, round(width * scale / across)) * across, max(1, round(height * scale / down)) * down
