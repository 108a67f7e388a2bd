"""Measures of clips from their pixels alone: frames are uint8 or float [F, H, W, 3]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def steps(frames: np.ndarray) -> np.ndarray:
    """Return the mean absolute difference of each frame to the one before [F - 1], in levels."""
    return np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))


def colour_steps(frames: np.ndarray) -> np.ndarray:
    """Return by how much the mean colour of each frame differs from the one before [F - 1]: largest channel, levels."""
    return np.abs(np.diff(frames.mean(axis=(1, 2), dtype=float), axis=0)).max(axis=1)


def seam_ratio(found: np.ndarray, seams: Sequence[int], *, least: float = 1e-9) -> float:
    """Return the largest of steps [F - 1] into a frame of `seams`, in medians of those elsewhere, `least` at least."""
    inside = np.delete(found, [place - 1 for place in seams])
    return float(max(found[place - 1] for place in seams) / max(np.median(inside), least))


def loop_ratio(frames: np.ndarray) -> float:
    """Return the step from the last frame to the first, in medians of the steps inside."""
    closing = np.abs(frames[0].astype(float) - frames[-1]).mean()
    return float(closing / max(np.median(steps(frames)), 1e-9))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite where they are equal."""
    error = float(np.mean((one.astype(float) - other) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def low_pass(frames: np.ndarray, cell: int) -> np.ndarray:
    """Return the means of cell x cell pixels."""
    count, height, width, _ = frames.shape
    return frames.reshape(count, height // cell, cell, width // cell, cell, 3).mean(axis=(2, 4), dtype=float)


def ground_drift(frames: np.ndarray, count: int = 8) -> float:
    """Return by how much the ground's colour moves from the first `count` frames to the last: largest channel, levels.

    The median over the border of each pixel's own change, so that neither what passes by nor where the sky ends counts.
    """
    edge = max(2, frames.shape[1] // 16)
    border = np.ones(frames.shape[1:3], bool)
    border[edge:-edge, edge:-edge] = False
    first, last = (np.median(part[:, border].astype(float), axis=0) for part in (frames[:count], frames[-count:]))
    return float(np.abs(np.median(last - first, axis=0)).max())


def velocity(places: np.ndarray) -> np.ndarray:
    """Return the velocity [2] of a track [F, 2] per frame, by a line through it; NaN where less than 3 are seen."""
    seen = ~np.isnan(places[:, 0])
    if seen.sum() < 3:
        return np.full(2, np.nan)
    return np.polyfit(np.arange(len(places))[seen], places[seen], 1)[0]


def sheet(clips: Sequence[np.ndarray], columns: int = 8) -> np.ndarray:
    """Return a picture [H, W, 3] with a row per clip: `columns` frames of it from first to last."""
    height, width = clips[0].shape[1:3]
    rows = []
    for clip in clips:
        picks = np.linspace(0, len(clip) - 1, columns).round().astype(int)
        cells = [np.pad(clip[i][:height, :width], ((0, 2), (0, 2), (0, 0)), constant_values=255) for i in picks]
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows)
