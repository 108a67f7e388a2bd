"""How a hung worker is told from a slow one: by the lines it writes while it works."""

from __future__ import annotations

import statistics
import time
from collections import deque

TIMES = 10  # the median between two signs of life, and what is foreseen of the first
SETTING_UP = 3  # times `silence` at least before the first sign, where libraries and weights are read


class Pulse:
    """What a worker's lines say: "job" when it takes one, "first S" what it foresees until the first step, in seconds,
    "step" at each step and frame, "idle" when it is through.

    It is hung where it works and has said nothing for `silence` seconds, or for 10 times the median pause of this
    job where that is more; before the first step for 10 times what it foresees, or thrice `silence` where that is more.
    """

    def __init__(self, silence: float) -> None:
        self.silence, self.busy, self.heard = silence, False, time.monotonic()
        self.foreseen: float | None = None  # seconds until the first sign of this job
        self.pauses: deque[float] = deque(maxlen=64)  # seconds between the signs of this job

    def hear(self, line: str, now: float | None = None) -> None:
        """Take note of a line."""
        now = time.monotonic() if now is None else now
        word, _, number = line.partition(" ")
        if word == "first":
            self.foreseen = float(number)
        if word == "step":
            self.pauses.append(now - self.heard)
        if word in ("job", "idle"):
            self.busy, self.foreseen = word == "job", None
            self.pauses.clear()
        self.heard = now

    def limit(self) -> float:
        """Return the seconds that it may be silent now."""
        if self.pauses:
            return max(self.silence, TIMES * statistics.median(self.pauses))
        if self.foreseen is None:
            return TIMES * self.silence
        return max(SETTING_UP * self.silence, TIMES * self.foreseen)

    def hung(self, now: float | None = None) -> bool:
        """Tell whether it is hung."""
        return self.busy and (time.monotonic() if now is None else now) - self.heard > self.limit()
