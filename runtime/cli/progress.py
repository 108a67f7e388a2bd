"""Progress on a terminal as a bar, elsewhere as lines; nothing when quiet."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

LINE_SECONDS = 5.0


class Progress:
    """Counts the units of one stage: `with Progress("denoising", "step") as progress: ... progress(done, total)`."""

    def __init__(self, stage: str, unit: str, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stage, self.unit = stage, unit
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet or self.stream is None  # standard error may be closed
        self.bar: Any = None
        self.first: float | None = None  # when the first unit was done: what came before it may be other work
        self.printed = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, total: int, *_: object) -> None:
        """Say that `done` of `total` units are there."""
        if self.quiet:
            return
        if self.first is None:
            self.first = time.monotonic()
        if self.stream.isatty():
            self._draw(done, total)
        elif done == total or time.monotonic() - self.printed >= LINE_SECONDS:
            self._print(done, total, self.first)

    def _draw(self, done: int, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=done, desc=self.stage, unit=self.unit, file=self.stream, dynamic_ncols=True
            )
        self.bar.update(done - self.bar.n)

    def _print(self, done: int, total: int, first: float) -> None:
        self.printed = time.monotonic()
        told = f"{self.stage}: {self.unit} {done}/{total}"
        if done > 1:
            each = (self.printed - first) / (done - 1)
            told += f", {each:.3g} s each"
            if done < total:
                told += f", {each * (total - done):.0f} s left"
        print(told, file=self.stream, flush=True)
