"""One run of a call under PyTorch's profiler, in numbers: what the GPU did, by range, by kind and by kernel, beside the
least that each could take, and where it waited."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.machine import Machine
from runtime.models.costs import Operation, Work
from tools.profile.capture import torch_profiler
from tools.profile.readers import Timeline, read_chrome
from tools.profile.report import GAP, TOP, by_name, gaps, launched_within

# Kinds of work by the names of kernels, ours and the libraries': the first that matches.
KINDS = {
    "qk_norm_rope": "qk_norm_rope",
    "gate_residual": "gate_residual",
    "norm_silu": "norm_silu",
    "modulate": "modulate",
    "quantise": "quantise",
    "attention": "attention|sdpa|flash|fmha",
    "convolution": "conv|fprop|dgrad|winograd|implicit",
    "linear": "gemm|nvjet|linear|splitk|cutlass",
    "copies": "memcpy|memset",
}
OTHER = "other"
SAME = {"upsample": "convolution", "narrow": "convolution", "pass": OTHER}  # kinds of the planner's under ours
IDLE = "idle"
FARTHEST = 3


@dataclass(frozen=True)
class Profile:
    """Seconds of the GPU from its first work to its last; the lists hold (name, calls, seconds)."""

    whole: float
    idle: float
    long_gaps: int  # of 20 us and more
    ranges: list[tuple[str, int, float]]
    kinds: list[tuple[str, int, float]]
    kernels: list[tuple[str, int, float]]

    def table(self, floor: float | None, floors: Mapping[str, float]) -> str:
        """Return it as Markdown; `floors` are the least seconds of ranges and kinds."""
        head = f"{self.whole * 1e3:.1f} ms on the GPU, {self.idle / self.whole:.1%} of it idle, {self.long_gaps} gaps "
        head += f"of {GAP * 1e6:.0f} us and more" + ("" if floor is None else f"; floor {floor * 1e3:.1f} ms")
        lines = [head, "", "| range, kind or kernel | calls | ms | share | floor, ms | of the floor |"]
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, calls, seconds in [*self.ranges, *self.kinds, *self.kernels]:
            least = floors.get(name)
            cells = ["", ""] if least is None else [f"{least * 1e3:.2f}", f"{least / seconds:.0%}" if seconds else "-"]
            lines.append(
                f"| {name[:90]} | {calls} | {seconds * 1e3:.2f} | {seconds / self.whole:.1%} | {' | '.join(cells)} |"
            )
        return "\n".join([*lines, "", *self.reading(floors)])

    def reading(self, floors: Mapping[str, float]) -> list[str]:
        """Return the largest distances from the limit in words: what is above its floor, and by which kernel."""
        spent = {name: seconds for name, _, seconds in self.kinds} | {IDLE: self.idle}
        above = {name: seconds - floors.get(name, 0.0) for name, seconds in spent.items()}
        lines = []
        for place, name in enumerate(sorted(above, key=above.__getitem__, reverse=True)[:FARTHEST], start=1):
            least = floors.get(name, 0.0)
            text = f"{place}. {name}: {above[name] * 1e3:.1f} ms above its floor of {least * 1e3:.1f} ms"
            mine = [kernel for kernel in self.kernels if kind_of(kernel[0]) == name]
            text += f", most of it in {mine[0][0][:90]} ({mine[0][2] * 1e3:.1f} ms)" if mine else ""
            lines.append(text)
        return ["Largest distances from the limit:", "", *lines]


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
    kinds: dict[str, tuple[int, float]] = {}
    for name, calls, seconds in kernels:
        before = kinds.get(kind_of(name), (0, 0.0))
        kinds[kind_of(name)] = before[0] + calls, before[1] + seconds
    return Profile(
        whole=max(each.end for each in work) - work[0].start,
        idle=sum(waits),
        long_gaps=sum(wait >= GAP for wait in waits),
        ranges=sorted(ranges, key=lambda row: -row[2]),
        kinds=sorted(((name, *each) for name, each in kinds.items()), key=lambda row: -row[2]),
        kernels=sorted(kernels, key=lambda row: -row[2])[:TOP],
    )


def kind_of(kernel: str) -> str:
    """Return which kind of work a kernel does, by its name."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), OTHER)


def floors(machine: Machine, ranges: Mapping[str, Iterable[Operation]]) -> dict[str, float]:
    """Return the least seconds of each range and of each kind of operation, every call at its own limit."""
    found: dict[str, float] = {}
    for name, operations in ranges.items():
        for each in operations:
            least = machine.seconds(Work((each,), 0), "")
            for place in filter(None, (name, SAME.get(each.kind, each.kind))):
                found[place] = found.get(place, 0.0) + least
    return found
