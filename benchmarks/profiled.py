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
from tools.profile.report import GAP, NOWHERE, TOP, by_name, gaps, innermost, launched_within

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
    """Seconds of the GPU from its first work to its last; the lists hold (name, calls, seconds).

    `within` holds the kinds of work in the innermost range that launched them, and how long the GPU waited for each.
    """

    whole: float
    idle: float
    long_gaps: int  # of 20 us and more
    ranges: list[tuple[str, int, float]]
    kinds: list[tuple[str, int, float]]
    kernels: list[tuple[str, int, float]]
    within: list[tuple[str, int, float, float]]

    def table(self, floor: float | None, floors: Mapping[str, float]) -> str:
        """Return it as Markdown; `floors` are the least seconds of ranges and kinds."""
        head = f"{self.whole * 1e3:.1f} ms on the GPU, {self.idle / self.whole:.1%} of it idle, {self.long_gaps} gaps "
        head += f"of {GAP * 1e6:.0f} us and more" + ("" if floor is None else f"; floor {floor * 1e3:.1f} ms")
        lines = [head, "", "| range, kind or kernel | calls | ms | share | floor, ms | of the floor |"]
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, calls, seconds in [*self.ranges, *self.kinds, *self.kernels]:
            cells = " | ".join(against(floors.get(name), seconds))
            lines.append(f"| {name[:90]} | {calls} | {seconds * 1e3:.2f} | {seconds / self.whole:.1%} | {cells} |")
        lines += ["", "| kind of work in a range | calls | ms | share | floor, ms | of the floor | waited for, ms |"]
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, calls, seconds, waited in self.within:
            cells = " | ".join([*against(floors.get(name), seconds), f"{waited * 1e3:.2f}"])
            lines.append(f"| {name} | {calls} | {seconds * 1e3:.2f} | {seconds / self.whole:.1%} | {cells} |")
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


def against(least: float | None, seconds: float) -> list[str]:
    """Return the cells of a floor in ms and the part of it that is reached; empty ones where none is known."""
    if least is None:
        return ["", ""]
    return [f"{least * 1e3:.2f}", f"{least / seconds:.0%}" if seconds else "-"]


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
    waited = {end: end - start for start, end in gaps(work)}  # by the moment at which work goes on
    within: dict[str, tuple[int, float, float]] = {}
    for one in work:
        place = NOWHERE if one.launched is None else innermost(timeline.ranges, one.launched)
        name = f"{place}: {kind_of(one.name)}"
        count, seconds, idle = within.get(name, (0, 0.0, 0.0))
        within[name] = count + 1, seconds + one.end - one.start, idle + waited.pop(one.start, 0.0)
    return Profile(
        whole=max(each.end for each in work) - work[0].start,
        idle=sum(waits),
        long_gaps=sum(wait >= GAP for wait in waits),
        ranges=sorted(ranges, key=lambda row: -row[2]),
        kinds=sorted(((name, *each) for name, each in kinds.items()), key=lambda row: -row[2]),
        kernels=sorted(kernels, key=lambda row: -row[2])[:TOP],
        within=sorted(((name, *each) for name, each in within.items()), key=lambda row: -row[2]),
    )


def kind_of(kernel: str) -> str:
    """Return which kind of work a kernel does, by its name."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), OTHER)


def floors(machine: Machine, ranges: Mapping[str, Iterable[Operation]]) -> dict[str, float]:
    """Return the least seconds of each range, of each kind of operation and of each kind in its range, every call at
    its own limit; a range NAME/PART counts for NAME too."""
    found: dict[str, float] = {}
    for name, operations in ranges.items():
        outer = [each for each in ranges if each and name.startswith(f"{each}/")]
        for each in operations:
            least, kind = machine.seconds(Work((each,), 0), ""), SAME.get(each.kind, each.kind)
            for place in filter(None, (name, *outer, kind, f"{name or NOWHERE}: {kind}")):
                found[place] = found.get(place, 0.0) + least
    return found
