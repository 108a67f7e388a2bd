"""The canvas: what a model paints on where it does not make a frame's own size; the frame is its middle.

A model makes multiples of its step, 16 pixels say: a video of 1920x1080 is made at 1920x1088 (`ModelSpec.canvas`). What
is given is continued beyond the frame by its own edge, and what is made is cut, so given frames come back unchanged.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from runtime.video import Frames, Video


def on_canvas(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a frame [H, W] or [H, W, 3] in the middle of a canvas, its edge repeated up to the canvas's."""
    rows, columns = frame.shape[:2]
    if (rows, columns) == (height, width):
        return frame
    top, left = (height - rows) // 2, (width - columns) // 2
    margins = ((top, height - rows - top), (left, width - columns - left), (0, 0))
    return np.pad(frame, margins[: frame.ndim], mode="edge")


def framed(video: Video, height: int, width: int) -> Video:
    """Return the middle of a video on a canvas, frame by frame; one that has the size already is passed on.

    ValueError for a size that is larger than the canvas.
    """
    if (video.height, video.width) == (height, width):
        return video
    if not (0 < height <= video.height and 0 < width <= video.width):
        raise ValueError(f"the frame is {width}x{height}; legal: up to the canvas, {video.width}x{video.height}")
    top, left = (video.height - height) // 2, (video.width - width) // 2
    return Video(
        partial(_cut, video, slice(top, top + height), slice(left, left + width)),
        fps=video.fps,
        num_frames=video.num_frames,
        height=height,
        width=width,
        latents=video.latents,
        receipt=video.receipt,
        sounds=video.sounds,
    )


def _cut(video: Video, rows: slice, columns: slice) -> Frames:
    for frame in video:
        yield np.ascontiguousarray(frame[rows, columns])
