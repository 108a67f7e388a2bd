"""A profile in words: time per range, what takes it, gaps of the GPU, and where the host is what is waited for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tools.profile.readers import Counted, Range, Timeline, Work

TOP = 12
GAP = 20e-6  # seconds; shorter ones lie between any two kernels
Named = TypeVar("Named", Range, Work, Counted)
NOWHERE = "no range"
HOST_BOUND = 0.5  # of a range's time, below which the GPU does not keep up with its host


def timeline_report(timeline: Timeline) -> str:
    """Return the summary of a timeline."""
    if not timeline.ranges and not timeline.work:
        return "the profile holds no range of ours and no GPU work"
    parts = [range_table(timeline)]
    if timeline.work:
        parts += [work_table(timeline.work), gap_table(timeline), host_table(timeline)]
    else:
        parts += [operator_table(timeline.operators), "no GPU work was recorded: all of it is the host's own"]
    return "\n\n".join(parts)


def range_table(timeline: Timeline) -> str:
    """Return the time per range; GPU is that of the work launched inside."""
    rows = []
    for name, ranges in by_name(timeline.ranges).items():
        total = sum(each.end - each.start for each in ranges)
        busy = launched_within(timeline.work, ranges)
        rows.append([name, str(len(ranges)), ms(total), ms(total / len(ranges)), ms(busy) if timeline.work else "-"])
    rows.sort(key=lambda row: -float(row[2]))
    return table("time per range", ["range", "calls", "ms", "ms each", "ms of GPU work"], rows)


def work_table(work: Sequence[Work]) -> str:
    """Return the kernels and copies that take longest."""
    total = sum(each.end - each.start for each in work)
    rows = []
    for name, launches in by_name(work).items():
        seconds = sum(each.end - each.start for each in launches)
        rows.append([name[:60], str(len(launches)), ms(seconds), f"{seconds / total:.1%}"])
    rows.sort(key=lambda row: -float(row[2]))
    return table(
        "top kernels (percent of the roofline: the profiler ncu)", ["kernel", "calls", "ms", "share"], rows[:TOP]
    )


def operator_table(operators: dict[str, list[float]]) -> str:
    """Return the CPU's operators that take longest by themselves."""
    total = sum(map(sum, operators.values())) or 1.0
    rows = [[name, str(len(each)), ms(sum(each)), f"{sum(each) / total:.1%}"] for name, each in operators.items()]
    rows.sort(key=lambda row: -float(row[2]))
    return table("top operators, without those that they call", ["operator", "calls", "ms", "share"], rows[:TOP])


def gap_table(timeline: Timeline) -> str:
    """Return the longest times in which the GPU did nothing, and the range that the host was in then."""
    found = gaps(timeline.work)
    whole = max(each.end for each in timeline.work) - timeline.work[0].start
    idle = sum(end - start for start, end in found)
    rows = [
        [ms(end - start), ms(start - timeline.work[0].start), innermost(timeline.ranges, start)]
        for start, end in sorted(found, key=lambda gap: gap[0] - gap[1])
        if end - start >= GAP
    ]
    title = f"gaps on the GPU: idle {idle / whole:.1%} of {ms(whole)} ms; those of {GAP * 1e6:.0f} us and more"
    return table(title, ["ms", "at ms", "the host was in"], rows[:TOP])


def host_table(timeline: Timeline) -> str:
    """Return the ranges whose GPU work takes less than half of their time."""
    rows = []
    for name, ranges in by_name(timeline.ranges).items():
        total = sum(each.end - each.start for each in ranges)
        busy = launched_within(timeline.work, ranges)
        if busy < HOST_BOUND * total:
            rows.append([name, ms(total), f"{busy / total:.1%}"])
    rows.sort(key=lambda row: -float(row[1]))
    return table("bound by the host: GPU work takes less than half of the range", ["range", "ms", "GPU"], rows)


def kernel_report(launches: Sequence[Counted]) -> str:
    """Return the kernels by time with their percent of the roofline: the higher of both peaks' percentages."""
    total = sum(each.seconds for each in launches)
    rows = []
    for name, each in by_name(launches).items():
        seconds = sum(one.seconds for one in each)
        compute = sum(one.compute * one.seconds for one in each) / seconds
        memory = sum(one.memory * one.seconds for one in each) / seconds
        bound = "arithmetic" if compute > memory else "memory"
        shares = [f"{seconds / total:.1%}", f"{max(compute, memory):.0f} %", bound]
        rows.append([name[:60], str(len(each)), ms(seconds), *shares])
    rows.sort(key=lambda row: -float(row[2]))
    head = ["kernel", "calls", "ms", "share", "of roofline", "bound by"]
    return table(f"top kernels of {len(launches)} launches", head, rows[:TOP])


def by_name(each: Iterable[Named]) -> dict[str, list[Named]]:
    """Return what has a name in lists, one per name."""
    found: dict[str, list[Named]] = defaultdict(list)
    for one in each:
        found[one.name].append(one)
    return found


def launched_within(work: Sequence[Work], ranges: Sequence[Range]) -> float:
    """Return the GPU seconds of what was launched inside ranges."""
    return sum(
        each.end - each.start
        for each in work
        if each.launched is not None and any(one.start <= each.launched <= one.end for one in ranges)
    )


def gaps(work: Sequence[Work]) -> list[tuple[float, float]]:
    """Return (start, end) of the times without work, over all streams."""
    found, busy_until = [], work[0].end
    for each in work:
        if each.start > busy_until:
            found.append((busy_until, each.start))
        busy_until = max(busy_until, each.end)
    return found


def innermost(ranges: Sequence[Range], moment: float) -> str:
    """Return the name of the shortest range around a moment."""
    around = [each for each in ranges if each.start <= moment <= each.end]
    return min(around, key=lambda each: each.end - each.start).name if around else NOWHERE


def ms(seconds: float) -> str:
    """Return milliseconds."""
    return f"{seconds * 1e3:.3f}"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows below a title, in columns: words to the left, numbers to the right."""
    if not rows:
        return f"{title}\n  none"
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if rows[0][i][:1].isdigit() else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  " + "  ".join(cells).rstrip()

    return "\n".join([title, *map(line, [head, *rows])])
