"""Made frames and given frames -> one clip: given ones in their places unchanged, made ones led up to them.

Three things make a step where made frames meet given ones: the autoencoder loses detail of the given ones, guidance
shifts the colour of the made ones, and the decoder moves more between two latent frames than inside one. So where the
picture stands still, a made frame begins as the given one is; where things move, it is left alone, for a correction
would be seen as their ghost. What is left of the step and is more than usual inside the clip is taken off: of the mean
colour evenly, of the rest by letting the given frame last a little. All fades with distance, and stands in `seams`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

FADE = 8  # frames over which a correction fades
LAST = 3  # frames over which what lasts of the given frame fades
EVEN = 1.2  # a step is as usual up to so many medians
LEAST = 0.1, 0.5  # levels of 255 below which a step of the pixels, of their mean colour, is not seen
MOVING = 16.0  # levels by which a place differs from the given frame where something moved
THRESHOLDS = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], np.float32) / 16 + 1 / 32
AROUND = 32  # a place is a square of the frame's height divided by this, to each side


@dataclass(frozen=True)
class Seam:
    """What was measured and corrected where made frames meet given ones.

    In levels of 255; steps in medians of those inside the calmer of the two sides.
    """

    frame: int  # place in the result of the frame that the step leads to
    colour: tuple[float, float, float]  # mean of given less decoded: red, green, blue
    detail: float  # root mean square of given less decoded
    usual: tuple[float, float] | None  # those medians, no less than LEAST: of the pixels, of their mean colour
    step: float  # what the decoder made of the two frames: their mean absolute difference
    colour_step: float  # and that of their mean colours, in the channel where it is largest
    shift: tuple[float, float, float]  # added to all of the made frame
    lasting: float  # share of the rest of the step that was taken off by letting the given frame last
    fade: int  # frames over which the corrections fade


@dataclass(frozen=True)
class _Edge:
    """A given frame next to made ones: its place, what the decoder made of it, and what is added to made frames."""

    place: int
    decoded: np.ndarray
    still: np.ndarray  # where a frame is as the given one was [H, W, 3]
    shift: np.ndarray  # everywhere [3]
    lasting: np.ndarray  # what lasts of the given frame [H, W, 3]

    def correction(self, frame: np.ndarray, far: int, length: int) -> np.ndarray:
        """Return what is added to a made frame `far` frames from the first, where corrections fade over `length`."""
        share, short = (max(0.0, 1 - far / n) if n else 0.5 for n in (length, min(LAST, length)))
        if not share:
            return np.zeros(3, np.float32)
        return share * (stillness(frame - self.decoded) * self.still + self.shift) + short * self.lasting


class Splicer:
    """Puts the frames of a window together: given ones as they are, made ones corrected; `seams` says what was done."""

    def __init__(self, decoded: Iterable[np.ndarray], given: Mapping[int, np.ndarray], offset: int = 0) -> None:
        self.decoded, self.given, self.offset = decoded, given, offset
        self.seams: list[Seam] = []
        pairs = [(given[place - 1], given[place]) for place in given if place - 1 in given]
        self._given_steps = [step(frame - before.astype(np.float32)) for before, frame in pairs]
        self._made_steps: list[tuple[float, float]] = []
        self._waiting: deque[tuple[int, np.ndarray]] = deque()
        self._last: tuple[int, np.ndarray] | None = None  # the last given frame, and what the decoder made of it
        self._before: _Edge | None = None  # that of the made frames that wait

    def frames(self) -> Generator[np.ndarray, None, None]:
        """Yield all frames of the window, uint8 [H, W, 3]; at most FADE wait for a given one behind them."""
        for place, frame in enumerate(self.decoded):
            if place in self.given:
                yield from self._rest(place, frame)
                self._last, self._before = (place, frame), None
                yield self.given[place]
                continue
            if self._waiting:
                self._made_steps.append(step(frame - self._waiting[-1][1].astype(np.float32)))
            self._waiting.append((place, frame))
            if len(self._waiting) > FADE:
                yield self._next()
        yield from self._rest()

    def _rest(self, place: int | None = None, decoded: np.ndarray | None = None) -> Generator[np.ndarray, None, None]:
        """Yield the made frames that wait, the last of them before the given one at `place`, if there is one."""
        if not self._waiting:
            return
        self._meet_last()
        after = None
        if place is not None and decoded is not None:
            after = self._edge(place, decoded, self._waiting[-1])
        while self._waiting:
            yield self._next(after)

    def _meet_last(self) -> None:
        """Measure how the first of the made frames that wait follows the last given one."""
        if self._before is None and self._last is not None:
            self._before = self._edge(*self._last, self._waiting[0])

    def _next(self, after: _Edge | None = None) -> np.ndarray:
        """Return the first of the made frames that wait, corrected towards the given ones before and after."""
        self._meet_last()
        place, frame = self._waiting.popleft()
        edges = [edge for edge in (self._before, after) if edge is not None]
        if not edges:
            return frame
        length = FADE
        if len(edges) == 2:  # the corrections of a short gap end where the other one's given frame begins
            length = min(FADE, edges[1].place - edges[0].place - 2)
        total = frame.astype(np.float32)
        for edge in edges:
            total = total + edge.correction(frame, abs(place - edge.place) - 1, length)
        return dithered(total)

    def _edge(self, place: int, decoded: np.ndarray, beside: tuple[int, np.ndarray]) -> _Edge:
        """Measure the seam between a given frame and the made one `beside` it, and say what evens it out."""
        given, decoded = self.given[place].astype(np.float32), decoded.astype(np.float32)
        lost, jump = given - decoded, beside[1] - decoded
        sides = [np.median(side, axis=0) for side in (self._given_steps, self._made_steps) if side]
        usual = np.maximum(np.min(sides, axis=0) if sides else np.inf, LEAST)  # of the calmer side
        stands = stillness(jump)
        still = lost - stands * jump  # what moves now may stand as it did later on
        rest = beside[1] + stands * still - given
        mean = rest.mean(axis=(0, 1))
        shift = -mean * (1 - min(1.0, usual[1] / max(np.abs(mean).max(), 1e-9)))
        rest = rest + shift
        lasting = 1 - min(1.0, *(EVEN * usual / np.maximum(step(rest), LEAST)))
        size, colour = np.where(np.isinf(usual), 0, np.maximum(step(jump), LEAST) / usual)
        self.seams.append(
            Seam(
                frame=max(place, beside[0]) + self.offset,
                colour=levels(lost.mean(axis=(0, 1))),
                detail=round(float(np.sqrt(np.square(lost).mean())), 3),
                usual=None if np.isinf(usual).any() else (round(float(usual[0]), 3), round(float(usual[1]), 3)),
                step=round(float(size), 3),
                colour_step=round(float(colour), 3),
                shift=levels(shift),
                lasting=round(float(lasting), 3),
                fade=FADE,
            )
        )
        return _Edge(place, decoded, still, shift, -lasting * rest)


def dithered(frame: np.ndarray) -> np.ndarray:
    """Return a float frame [H, W, 3] in whole levels of uint8 whose mean is its own.

    Rounding would lose a shift of less than half a level; the thresholds (Bayer's, 1973) are the same in every frame,
    so what stands still does not flicker, and whole levels stay as they are.
    """
    height, width, _ = frame.shape
    rows, columns = np.arange(height) % len(THRESHOLDS), np.arange(width) % len(THRESHOLDS)
    return np.clip(np.floor(frame + THRESHOLDS[rows][:, columns, None]), 0, 255).astype(np.uint8)


def step(difference: np.ndarray) -> tuple[float, float]:
    """Return the mean absolute difference of two frames, and that of their mean colours in the largest channel."""
    return float(np.abs(difference).mean()), float(np.abs(difference.mean(axis=(0, 1))).max())


def stillness(difference: np.ndarray) -> np.ndarray:
    """Return [H, W, 1] by how much the places of a frame that differs [H, W, 3] from another stand still, 0 to 1."""
    size = torch.from_numpy(np.abs(difference).max(axis=2))[None, None]
    around = 2 * (difference.shape[0] // AROUND) + 1
    for kernel in ((around, 1), (1, around)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        size = F.avg_pool2d(size, kernel, stride=1, padding=padding, count_include_pad=False)
    return (1 / (1 + (size[0, 0, :, :, None] / MOVING) ** 4)).numpy()


def levels(colour: np.ndarray) -> tuple[float, float, float]:
    """Return a colour [3] rounded to thousandths of a level."""
    red, green, blue = (round(float(value), 3) for value in colour)
    return red, green, blue
