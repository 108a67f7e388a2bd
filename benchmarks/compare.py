"""python -m benchmarks compare A.json B.json: what changed between two files of results by more than its noise."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = (
    "model",
    "name",
    "case",
    "operation",
    "size",
    "frames",
    "num_frames",
    "steps",
    "engine",
    "side",
    "dtype",
    "rate",
)
ALONE = 0.05  # of change that a single sample may have by chance
LEAST = 0.02  # of change that is never told


def add_command(commands: Any) -> None:
    """Add `compare` to the command line."""
    parser = commands.add_parser("compare", help="what changed between two files of results, beyond noise")
    parser.set_defaults(run=run)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)


def run(args: argparse.Namespace) -> int:
    """Print the changes; 1 where something got slower."""
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (args.before, args.after))
    if before.get("benchmark") != after.get("benchmark"):
        raise ValueError(f"one file holds {before.get('benchmark')!r}, the other {after.get('benchmark')!r}")
    for what, file in ((before, args.before), (after, args.after)):
        machine = what.get("machine", {})
        print(f"{file}: {machine.get('name')}, commit {machine.get('commit')}, {machine.get('date')}")
    found, common = changes(dict(samples(before)), dict(samples(after)))
    print(f"{common} measurements in both, {len(found)} changed beyond noise")
    for name, old, new in found:
        print(f"{new / old:6.3f} x  {number(old)} -> {number(new)}  {name}")
    return int(any(new > old for _, old, new in found))


def samples(record: Any, place: tuple[str, ...] = (), inside: bool = False) -> Iterator[tuple[str, list[float]]]:
    """Yield (name, samples in seconds) of all that stands below a key "seconds", named by what is around it."""
    if isinstance(record, dict):
        named = (*place, *(str(record[key]) for key in NAMES if isinstance(record.get(key), str | int | float)))
        for key, value in record.items():
            yield from samples(value, (*named, key), inside or key == "seconds")
    elif isinstance(record, list) and inside and record and all(isinstance(each, int | float) for each in record):
        yield " ".join(part for part in place if part != "seconds"), [float(each) for each in record]
    elif isinstance(record, list):
        for each in record:
            yield from samples(each, place, inside)


def changes(
    before: dict[str, list[float]], after: dict[str, list[float]]
) -> tuple[list[tuple[str, float, float]], int]:
    """Return (name, median before, median after) of what lies apart, the largest change first; and how many are common.

    Apart means that no sample of one side lies within the other's range; of single samples, by over ALONE.
    """
    found, common = [], before.keys() & after.keys()
    for name in sorted(common):
        old, new = before[name], after[name]
        middle = statistics.median(old), statistics.median(new)
        change = abs(middle[1] / middle[0] - 1)
        apart = max(old) < min(new) or max(new) < min(old)
        if apart and change > (ALONE if min(len(old), len(new)) == 1 else LEAST):
            found.append((name, *middle))
    return sorted(found, key=lambda each: -abs(each[2] / each[1] - 1)), len(common)


def number(seconds: float) -> str:
    """Return seconds, in ms below one."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"
