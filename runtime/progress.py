"""Progress on a terminal as a bar, elsewhere as lines; nothing when quiet."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

LINE_SECONDS = 5.0


class Progress:
    """Counts the units of one stage: `with Progress("denoising", "step") as progress: ... progress(done, total)`."""

    def __init__(self, stage: str, unit: str, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stage, self.unit, self.quiet = stage, unit, quiet
        self.stream = sys.stderr if stream is None else stream
        self.bar: Any = None
        self.began = self.printed = time.monotonic()

    def __enter__(self) -> Progress:
        self.began = self.printed = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, total: int, _: object = None) -> None:
        """Say that `done` of `total` units are there."""
        if self.quiet:
            return
        if self.stream.isatty():
            self._draw(done, total)
        elif done == total or time.monotonic() - self.printed >= LINE_SECONDS:
            self._print(done, total)

    def _draw(self, done: int, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=self.stage, unit=self.unit, file=self.stream, dynamic_ncols=True)
            # The first unit was timed before the bar existed.
            self.bar.start_t = self.bar.last_print_t = time.time() - (time.monotonic() - self.began)
        self.bar.update(done - self.bar.n)

    def _print(self, done: int, total: int) -> None:
        self.printed = time.monotonic()
        each = (self.printed - self.began) / done
        left = f", {each * (total - done):.0f} s left" if done < total else ""
        print(f"{self.stage}: {self.unit} {done}/{total}, {each:.3g} s each{left}", file=self.stream, flush=True)
