"""One call under PyTorch's profiler: what the GPU did, by range and by kernel, and where it waited."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.profile.capture import torch_profiler
from tools.profile.readers import Timeline, read_chrome
from tools.profile.report import GAP, TOP, by_name, gaps, launched_within


@dataclass(frozen=True)
class Profile:
    """Seconds of the GPU from its first work to its last; `ranges` and `kernels` as (name, calls, seconds)."""

    whole: float
    idle: float
    long_gaps: int  # of 20 us and more
    ranges: list[tuple[str, int, float]]
    kernels: list[tuple[str, int, float]]

    def table(self, floor: float | None) -> str:
        """Return it as Markdown."""
        head = f"{self.whole * 1e3:.1f} ms on the GPU, {self.idle / self.whole:.1%} of it idle, {self.long_gaps} gaps "
        head += f"of {GAP * 1e6:.0f} us and more" + ("" if floor is None else f"; floor {floor * 1e3:.1f} ms")
        lines = [head, "", "| range or kernel | calls | ms | share |", "| --- | ---: | ---: | ---: |"]
        for name, calls, seconds in [*self.ranges, *self.kernels]:
            lines.append(f"| {name[:90]} | {calls} | {seconds * 1e3:.2f} | {seconds / self.whole:.1%} |")
        return "\n".join(lines)


def profiled(call: Callable[[], Any]) -> Profile:
    """Run a call once more under the profiler; ValueError where it recorded no work of a GPU."""
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        begin, end = torch_profiler(trace)
        begin()
        try:
            call()
        finally:
            end()
        return summary(read_chrome(trace))


def summary(timeline: Timeline) -> Profile:
    """Return what a timeline holds."""
    work = timeline.work
    if not work:
        raise ValueError("the profiler recorded no work of a GPU")
    waits = [end - start for start, end in gaps(work)]
    ranges = [(name, len(each), launched_within(work, each)) for name, each in by_name(timeline.ranges).items()]
    kernels = [(name, len(each), sum(one.end - one.start for one in each)) for name, each in by_name(work).items()]
    return Profile(
        whole=max(each.end for each in work) - work[0].start,
        idle=sum(waits),
        long_gaps=sum(wait >= GAP for wait in waits),
        ranges=sorted(ranges, key=lambda row: -row[2]),
        kernels=sorted(kernels, key=lambda row: -row[2])[:TOP],
    )
