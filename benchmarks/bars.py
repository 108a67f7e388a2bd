"""python -m benchmarks bars FILE...: what was to be reached on an H200, beside what was measured: one table.

Reads results of `kernels`, `published` and `warm`. Limits are arithmetic and traffic at 790 TFLOP/s and 4.3 TB/s, which
such a GPU reaches; best published figures are of the same GPU and shape where no other is named.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import savings
from benchmarks.measure import PSNR_LIMIT
from benchmarks.operation_bars import BARS as OPERATIONS
from benchmarks.operation_bars import Bar, Measured, duration, measured_of, missed_by
from benchmarks.warm import first_to_tenth

REPORTS = {
    "kernels": "kernels",
    "published": "published_report",
    "latency": "latency_report",
}  # where their tables are made


def part_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a part of `published`; empty where it was not measured."""
    return next((each for each in record["parts"] if each["name"] == name), {})


def psnr_of(name: str, record: dict[str, Any]) -> float | None:
    """Return what a rounded decode keeps, in dB."""
    return part_of(record, name).get("psnr")


def spread_of(record: dict[str, Any]) -> float | None:
    """Return how many times the memory of the least a decode takes at most, over clips of several lengths."""
    peaks = part_of(record, "decode-480p").get("peaks", {}).values()
    return max(peaks) / min(peaks) if peaks else None


def saved_of(quality: str, record: dict[str, Any]) -> float | None:
    """Return the part of the CPU's times faster that a quality reaches."""
    found = part_of(record, "qualities-1.3b-480p")
    return savings.kept(found, quality) if "cpu" in found else None


def first_of(record: dict[str, Any]) -> float | None:
    """Return how many times the tenth request's seconds the first takes after a warm start."""
    runs = record["seconds"]["warm"]
    return first_to_tenth(runs) if runs else None


@dataclass(frozen=True)
class Figure:
    """A bar of something else than a time: `benchmark` and what `read` finds in a record of it, None for nothing."""

    what: str
    benchmark: str
    bar: str
    read: Callable[[dict[str, Any]], float | None]
    met: Callable[[float], bool]
    unit: str = ""


COMPILED = "diffusers, compiled"


def steps_of(name: str, published: str, seconds: float) -> tuple[Bar, ...]:
    """Return the bars of a guided step in 16 bits."""
    place = ("published", name, "16 bits")
    return (
        Bar(place, published, seconds=seconds),
        Bar(place, "", over="diffusers", ratio=1 / 1.5),
        Bar(place, "", over=COMPILED, ratio=1 / 1.15),
    )


# Of the texts: operations, then decoding, steps, speed under a budget.
BARS = (
    *OPERATIONS,
    Bar(("published", "decode-480p", "16 bits"), "1.56 s (sglang)", seconds=0.9),
    Bar(("published", "decode-480p", "16 bits"), "", over=COMPILED),
    Bar(("published", "decode-720p", "16 bits"), "not found", seconds=2.0),
    Bar(("published", "decode-720p", "16 bits"), "", over=COMPILED),
    Bar(("published", "decode-720p", "ours, in tiles"), "1.65 x the pixels (diffusers)", over="ours", ratio=1.25),
    *steps_of("step-1.3b-480p", "not found", 0.85),
    *steps_of("step-14b-480p", "5.18 s (LightX2V, H100)", 5.0),
    Bar(("published", "step-14b-480p", "ours, fp8"), "not found", seconds=3.9),
    Bar(("published", "step-14b-480p", "ours, fp8, attention too"), "not found", over="ours, fp8"),
)
FIGURES = (
    Figure(
        "decode-480p in bfloat16 beside float32",
        "published",
        f">= {PSNR_LIMIT:g} dB",
        partial(psnr_of, "decode-480p"),
        lambda found: found >= PSNR_LIMIT,
        " dB",
    ),
    Figure(
        "decode-480p, most memory of 17, 81, 321 frames / least",
        "published",
        "<= 1.05",
        spread_of,
        lambda found: found <= 1.05,
    ),
    *(
        Figure(
            f"quality {name}, times faster / the CPU's",
            "published",
            f">= {savings.KEEPS:g}",
            partial(saved_of, name),
            lambda found: found >= savings.KEEPS,
        )
        for name in savings.QUALITIES
    ),
    Figure("first request after a warm start / tenth", "warm", "<= 1.1", first_of, lambda found: found <= 1.1),
)


def add_command(commands: Any) -> None:
    """Add `bars` to the command line."""
    parser = commands.add_parser("bars", help="the bars of an H200 beside results, in one table")
    parser.set_defaults(run=run)
    parser.add_argument("files", type=Path, nargs="+", help="results of kernels, published, latency and warm")
    parser.add_argument("--tables", action="store_true", help="each file's own table before it")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in args.files]
    for record in records if args.tables else ():
        if record["benchmark"] in REPORTS:
            print(import_module(f"benchmarks.{REPORTS[record['benchmark']]}").table(record), end="\n\n")
    print(table(records))


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the bars as Markdown; a later record's numbers take the place of an earlier one's."""
    heads = {record["benchmark"]: record["machine"] for record in records}
    lines = [
        f"{name}: {machine['name']}, torch {machine['versions'].get('torch')}, driver "
        f"{(machine.get('clocks') or {}).get('driver_version')}, commit {machine['commit']}, {machine['date']}"
        for name, machine in heads.items()
    ]
    lines += [
        "",
        "| what | limit | best published | bar | ours | of the limit | diffusers in the run | others in it | |",
        "| --- | ---: | --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    lines += [row(bar, found(bar, records)) for bar in BARS]
    return "\n".join(lines + [figure_row(figure, records) for figure in FIGURES])


def figure_row(figure: Figure, records: Sequence[dict[str, Any]]) -> str:
    """Return the line of a bar that is not of a time; the newest record that has it counts."""
    values = (figure.read(each) for each in reversed(records) if each.get("benchmark") == figure.benchmark)
    value = next((each for each in values if each is not None), None)
    shown = "not measured" if value is None else f"{value:.3g}{figure.unit}"
    verdict = "" if value is None else "met" if figure.met(value) else "missed"
    return f"| {figure.what} | | | {figure.bar} | {shown} | | | | {verdict} |"


def row(bar: Bar, measured: Measured | None) -> str:
    """Return one bar's line."""
    if measured is None or measured.ours is None:
        return f"| {bar.name} | | {bar.published} | {bar} | not measured | | | | |"
    most = bar.most(measured.work, measured.others)
    floor = "" if measured.floor is None else duration(measured.floor)
    share = "" if measured.floor is None else f"{measured.floor / measured.ours:.0%}"
    shown = {name: s for name, s in measured.others.items() if not name.startswith("ours") or name == bar.over}
    theirs = [name for name in shown if name.startswith("diffusers")]
    groups = theirs, [name for name in shown if name not in theirs]
    beside = " | ".join(", ".join(f"{name} {duration(shown[name])}" for name in names) for names in groups)
    verdict = "not measured" if most is None else "met" if measured.ours <= most else missed_by(measured.ours, most)
    cells = [bar.name, floor, bar.published, str(bar), duration(measured.ours), share, beside, verdict]
    return f"| {' | '.join(cells)} |"


def found(bar: Bar, records: Sequence[dict[str, Any]]) -> Measured | None:
    """Return what the records hold at a bar's place, None where nothing."""
    benchmark, name, which = bar.place
    for record in reversed(records):
        if record.get("benchmark") != benchmark:
            continue
        if benchmark == "kernels":
            measured = measured_of(bar, record)
        else:
            each = part_of(record, name)
            measured = part_times(each, which) if each.get("seconds") else None
        if measured is not None:
            return measured
    return None


def part_times(each: dict[str, Any], which: str) -> Measured:
    """Read one part of `published`: the fastest of ours in 16 bits, or the version named."""
    medians = {name: statistics.median(samples) for name, samples in each["seconds"].items()}
    in_16_bits = [name for name in medians if name.startswith("ours") and name not in each["bars"]]
    mine = in_16_bits if which == "16 bits" else [which]
    ours = min((medians[name] for name in mine if name in medians), default=None)
    return Measured(ours, {name: s for name, s in medians.items() if name not in mine}, each["floor"])
