"""Made frames and given frames -> one clip: given ones in their places unchanged, made ones corrected next to them.

A decoded frame is not quite the given one that it stands for: the autoencoder loses detail, and colours drift. Where
made frames meet a given one, that difference is added to them and fades with distance, so nothing jumps at the seam.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

FADE = 8  # frames over which a correction fades


@dataclass(frozen=True)
class Seam:
    """What was corrected where made frames meet given ones, in levels of 255."""

    frame: int  # the given frame's place in the result
    colour: tuple[float, float, float]  # mean of given less decoded: red, green, blue
    detail: float  # root mean square of given less decoded
    fade: int  # frames over which it was added to the made ones


class Splicer:
    """Puts the frames of a window together: given ones as they are, made ones corrected; `seams` says what was done."""

    def __init__(self, decoded: Iterable[np.ndarray], given: Mapping[int, np.ndarray], offset: int = 0) -> None:
        self.decoded, self.given, self.offset = decoded, given, offset
        self.seams: list[Seam] = []
        self._differences: dict[int, np.ndarray] = {}

    def frames(self) -> Generator[np.ndarray, None, None]:
        """Yield all frames of the window, uint8 [H, W, 3]; at most FADE wait for a given one behind them."""
        waiting: deque[tuple[int, np.ndarray]] = deque()
        for place, frame in enumerate(self.decoded):
            if place in self.given:
                self._differences[place] = self.given[place].astype(np.float32) - frame
                self._forget(place)
                while waiting:
                    yield self._corrected(*waiting.popleft())
                yield self.given[place]
            else:
                waiting.append((place, frame))
                if len(waiting) > FADE:
                    yield self._corrected(*waiting.popleft())
        while waiting:
            yield self._corrected(*waiting.popleft())

    def _forget(self, place: int) -> None:
        """Keep the differences that frames from the last given one before `place` on may need."""
        before = [p for p in self._differences if p < place]
        for old in before[:-1]:
            del self._differences[old]

    def _corrected(self, place: int, frame: np.ndarray) -> np.ndarray:
        weights = {p: 1 - abs(place - p) / FADE for p in self._differences if abs(place - p) < FADE}
        before, after = [p for p in weights if p < place], [p for p in weights if p > place]
        used = {p: weights[p] for p in (*before[-1:], *after[:1])}
        if not used:
            return frame
        for p in used:
            self._note(p)
        whole = max(1.0, sum(used.values()))
        total = frame + sum((weight / whole) * self._differences[p] for p, weight in used.items())
        return np.clip(np.rint(total), 0, 255).astype(np.uint8)

    def _note(self, place: int) -> None:
        if any(seam.frame == place + self.offset for seam in self.seams):
            return
        difference = self._differences[place]
        red, green, blue = (round(float(v), 3) for v in difference.mean(axis=(0, 1)))
        detail = round(float(np.sqrt(np.square(difference).mean())), 3)
        self.seams.append(Seam(place + self.offset, (red, green, blue), detail, FADE))
