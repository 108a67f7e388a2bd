"""Cutting a frame into tiles with a halo, so that the tiles' cores give the same numbers as the whole frame."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

PARTS = ((1, 2), (2, 2), (4, 4), (8, 8))  # that a frame is cut into, along its shorter and its longer side
SMALLER = 0.8  # of the tile before: else the halo eats what cutting saves


def finer(
    height: int, width: int, tile_of: Callable[[int, int, tuple[int, int]], tuple[int, int]], below: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield ever smaller tiles (height, width) in pixels of a frame, the first well below `below` pixels (None: all).

    `tile_of` is the autoencoder's.
    """
    last = height * width if below is None else below
    for short, long in PARTS:
        tile = tile_of(height, width, (short, long) if height <= width else (long, short))
        if tile[0] * tile[1] < SMALLER * last:
            yield tile
            last = tile[0] * tile[1]


@dataclass(frozen=True)
class Span:
    """A tile along one axis, in cells: its core, and the core with as much halo as the frame has."""

    start: int
    stop: int
    low: int
    high: int

    def whole(self, scale: int) -> slice:
        """The core and its halo in a frame with `scale` pixels per cell."""
        return slice(self.low * scale, self.high * scale)

    def core(self, scale: int) -> slice:
        """The core inside the tile's own result, which has `scale` pixels per cell."""
        return slice((self.start - self.low) * scale, (self.stop - self.low) * scale)

    def place(self, scale: int) -> slice:
        """The core inside the whole result."""
        return slice(self.start * scale, self.stop * scale)


@dataclass(frozen=True)
class Tile:
    """A rectangle of a frame."""

    rows: Span
    columns: Span

    def cut(self, x: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """Return the tile with its halo of x [..., H, W], which has `scale` pixels per cell."""
        return x[..., self.rows.whole(scale), self.columns.whole(scale)]

    def paste(self, result: torch.Tensor, into: torch.Tensor, scale: int) -> None:
        """Copy the core of the tile's result [..., h, w] to its place in the whole result [..., H, W]."""
        into[..., self.rows.place(scale), self.columns.place(scale)] = result[
            ..., self.rows.core(scale), self.columns.core(scale)
        ]


def spans(length: int, size: int, halo: int) -> list[Span]:
    """Cut `length` cells into the fewest tiles of at most `size` cells with their halo, cores of nearly equal length.

    `size` must be more than twice the halo.
    """
    for count in range(1, length + 1):
        edges = [i * length // count for i in range(count + 1)]
        cut = [Span(a, b, max(a - halo, 0), min(b + halo, length)) for a, b in itertools.pairwise(edges)]
        if all(span.high - span.low <= size for span in cut):
            return cut
    raise AssertionError(f"{length} cells cannot be cut into tiles of {size} with a halo of {halo}")


def tiles(frame: tuple[int, int], size: tuple[int, int] | None, halo: int) -> list[Tile]:
    """Return the tiles of a frame (height, width), row by row; one for the whole frame where `size` is None."""
    rows, columns = (spans(n, most, halo) for n, most in zip(frame, size or frame, strict=True))
    return [Tile(r, c) for r in rows for c in columns]
