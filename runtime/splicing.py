"""Made frames and given frames -> one clip: given ones in their places unchanged, made ones led up to them.

Three things make a step where made frames meet given ones: the autoencoder loses detail of the given ones, guidance
shifts the colour of the made ones, and the decoder moves more between two latent frames than inside one. So what the
decoder lost of the nearest given frame is added to the made ones, and of the step that is left, what is more than a
step inside the clip is taken off; both fade with distance. What was measured and done stands in `seams`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

FADE = 8  # frames over which a correction fades
LEAST = 0.1, 0.5  # levels of 255 below which a step of the pixels, of their mean colour, is none


@dataclass(frozen=True)
class Seam:
    """What was measured and corrected where made frames meet given ones.

    In levels of 255; steps in medians of those inside the calmer of the two sides.
    """

    frame: int  # place in the result of the frame that the step leads to
    colour: tuple[float, float, float]  # mean of given less decoded: red, green, blue
    detail: float  # root mean square of given less decoded
    step: float  # what the decoder made of the two frames: their mean absolute difference
    colour_step: float  # and that of their mean colours, in the channel where it is largest
    kept: float  # share of the step that was left
    fade: int  # frames over which both corrections fade


@dataclass(frozen=True)
class _Edge:
    """A given frame next to made ones: its place, and what is added to the made frame beside it, [H, W, 3]."""

    place: int
    correction: np.ndarray


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
            far = abs(place - edge.place) - 1
            share = max(0.0, 1 - far / length) if length else 1 / len(edges)
            total += share * edge.correction
        return np.clip(np.rint(total), 0, 255).astype(np.uint8)

    def _edge(self, place: int, decoded: np.ndarray, beside: tuple[int, np.ndarray]) -> _Edge:
        """Measure the seam between a given frame and the made one `beside` it, and say what evens it out."""
        given = self.given[place].astype(np.float32)
        lost, jump = given - decoded, beside[1].astype(np.float32) - decoded
        sides = [np.median(side, axis=0) for side in (self._given_steps, self._made_steps) if side]
        typical = np.maximum(np.min(sides, axis=0) if sides else np.inf, LEAST)  # of the calmer side
        found = np.maximum(step(jump), LEAST)
        kept = float(min(1.0, *(typical / found)))
        red, green, blue = (round(float(v), 3) for v in lost.mean(axis=(0, 1)))
        detail = float(np.sqrt(np.square(lost).mean()))
        size, colour = (round(float(v), 3) for v in np.where(np.isinf(typical), 0, found / typical))
        frame = max(place, beside[0]) + self.offset
        self.seams.append(Seam(frame, (red, green, blue), round(detail, 3), size, colour, round(kept, 3), FADE))
        return _Edge(place, lost - (1 - kept) * jump)


def step(difference: np.ndarray) -> tuple[float, float]:
    """Return the mean absolute difference of two frames, and that of their mean colours in the largest channel."""
    return float(np.abs(difference).mean()), float(np.abs(difference.mean(axis=(0, 1))).max())
