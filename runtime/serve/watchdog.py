"""How a hung worker is told from a slow one: by the lines it writes while it works."""

from __future__ import annotations

import statistics
import time
from collections import deque

TIMES = 10  # the median between two signs of life; and more than `silence` before the first, where weights are read


class Pulse:
    """What a worker's lines say: "job" when it takes one, "step" at each step and frame, "idle" when it is through.

    It is hung where it works and has said nothing for `silence` seconds, or for 10 times the median pause of this
    job where that is more.
    """

    def __init__(self, silence: float) -> None:
        self.silence, self.busy, self.heard = silence, False, time.monotonic()
        self.pauses: deque[float] = deque(maxlen=64)  # seconds between the signs of this job

    def hear(self, line: str, now: float | None = None) -> None:
        """Take note of a line."""
        now = time.monotonic() if now is None else now
        if line == "step":
            self.pauses.append(now - self.heard)
        if line in ("job", "idle"):
            self.busy = line == "job"
            self.pauses.clear()
        self.heard = now

    def limit(self) -> float:
        """Return the seconds that it may be silent now."""
        if not self.pauses:
            return TIMES * self.silence
        return max(self.silence, TIMES * statistics.median(self.pauses))

    def hung(self, now: float | None = None) -> bool:
        """Tell whether it is hung."""
        return self.busy and (time.monotonic() if now is None else now) - self.heard > self.limit()
