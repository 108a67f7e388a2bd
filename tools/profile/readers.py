"""What profilers write, as one Timeline: Nsight Systems' SQLite export, Chrome traces of PyTorch, Nsight Compute's CSV.

Source of the schemas: the exporter chapter of the Nsight Systems User Guide (tables NVTX_EVENTS, StringIds,
CUPTI_ACTIVITY_KIND_*), the Nsight Compute CLI guide (page raw as CSV: a line of names, one of units, one per kernel).
"""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOMAIN = "dit-runtime"
PUSH_POP, DOMAIN_CREATED = 59, 75  # NVTX_EVENTS.eventType
DURATION = "gpu__time_duration.sum"
COMPUTE = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
UNITS = {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3, "second": 1.0, "s": 1.0}
COPIES = ("CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_MEMSET")


@dataclass(frozen=True)
class Range:
    """One of our spans on the host's clock; times in seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Work:
    """A kernel or copy on the GPU, and when the host launched it (None: not known)."""

    name: str
    start: float
    end: float
    launched: float | None = None


@dataclass(frozen=True)
class Timeline:
    """Ranges of the host, work of the GPU, and where there is none, seconds of the CPU's own operators."""

    ranges: list[Range]
    work: list[Work]
    operators: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Counted:
    """One launch of a kernel under the counters: seconds, percent of the peaks of arithmetic and of memory."""

    name: str
    seconds: float
    compute: float
    memory: float


def read_nsys(file: Path) -> Timeline:
    """Read an export of Nsight Systems."""
    with sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True) as base:
        base.row_factory = sqlite3.Row
        tables = {row["name"] for row in base.execute("SELECT name FROM sqlite_master")}
        strings = dict(tuple(row) for row in base.execute("SELECT id, value FROM StringIds"))
        ranges = nsys_ranges(base, strings) if "NVTX_EVENTS" in tables else []
        calls = {}
        if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
            calls = dict(
                tuple(row) for row in base.execute("SELECT correlationId, start FROM CUPTI_ACTIVITY_KIND_RUNTIME")
            )
        work = []
        if "CUPTI_ACTIVITY_KIND_KERNEL" in tables:
            query = "SELECT start, end, shortName, correlationId FROM CUPTI_ACTIVITY_KIND_KERNEL"
            work += [nsys_work(row, strings[row["shortName"]], calls) for row in base.execute(query)]
        for table in sorted(tables & set(COPIES)):
            name = table.rpartition("_")[2].lower()
            rows = base.execute(f"SELECT start, end, correlationId FROM {table}")
            work += [nsys_work(row, name, calls) for row in rows]
    return Timeline(ranges, sorted(work, key=lambda each: each.start))


def nsys_ranges(base: sqlite3.Connection, strings: dict[int, str]) -> list[Range]:
    """Return the ranges of our domain, which each process numbers; a text stands in the row or among the strings."""
    query = "SELECT start, end, eventType, text, textId, domainId, globalTid >> 24 AS process FROM NVTX_EVENTS"
    rows = list(base.execute(query))
    text = {id(row): row["text"] or strings.get(row["textId"], "") for row in rows}
    domain = {id(row): (row["process"], row["domainId"]) for row in rows}
    ours = {domain[id(row)] for row in rows if row["eventType"] == DOMAIN_CREATED and text[id(row)] == DOMAIN}
    return [
        Range(text[id(row)], row["start"] * 1e-9, row["end"] * 1e-9)
        for row in rows
        if row["eventType"] == PUSH_POP and domain[id(row)] in ours and row["end"] is not None
    ]


def nsys_work(row: sqlite3.Row, name: str, calls: dict[int, int]) -> Work:
    """Return a row of GPU activity, with the call that launched it."""
    launched = calls.get(row["correlationId"])
    return Work(name, row["start"] * 1e-9, row["end"] * 1e-9, None if launched is None else launched * 1e-9)


def read_chrome(file: Path) -> Timeline:
    """Read a Chrome trace that PyTorch's profiler wrote."""
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("ph") == "X"]
    of = defaultdict(list)
    for event in events:
        of[event.get("cat")].append(event)
    ranges = [Range(event["name"], *times(event)) for event in of["user_annotation"]]
    calls = {
        event["args"]["correlation"]: event["ts"] * 1e-6
        for event in of["cuda_runtime"] + of["cuda_driver"]
        if "correlation" in event.get("args", {})
    }
    work = [
        Work(event["name"], *times(event), calls.get(event.get("args", {}).get("correlation")))
        for kind in ("kernel", "gpu_memcpy", "gpu_memset")
        for event in of[kind]
    ]
    own = [each for each in ranges if not each.name.startswith("ProfilerStep")]
    return Timeline(own, sorted(work, key=lambda each: each.start), {} if work else own_times(of["cpu_op"]))


def times(event: dict[str, Any]) -> tuple[float, float]:
    """Return an event's begin and end in seconds."""
    return event["ts"] * 1e-6, (event["ts"] + event["dur"]) * 1e-6


def own_times(events: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return per operator the seconds of each call without those of the operators that it calls."""
    found: dict[str, list[float]] = defaultdict(list)
    threads = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    for each in threads.values():
        open_calls: list[tuple[float, str, int]] = []  # end, name, place in `found`
        for event in sorted(each, key=lambda e: (e["ts"], -e["dur"])):
            begin, end = times(event)
            while open_calls and open_calls[-1][0] <= begin:
                open_calls.pop()
            if open_calls:
                _, caller, place = open_calls[-1]
                found[caller][place] -= end - begin
            found[event["name"]].append(end - begin)
            open_calls.append((end, event["name"], len(found[event["name"]]) - 1))
    return dict(found)


def read_ncu(text: str) -> list[Counted]:
    """Read page raw of Nsight Compute as CSV; ValueError where a counter is missing."""
    units, rows = rows_of_ncu(text)
    if missing := [name for name in (DURATION, COMPUTE, MEMORY) if name not in units]:
        raise ValueError(f"Nsight Compute's table lacks {', '.join(missing)}; this version names them otherwise")
    scale = UNITS[units[DURATION]]
    return [
        Counted(row["Kernel Name"], number(row[DURATION]) * scale, number(row[COMPUTE]), number(row[MEMORY]))
        for row in rows
    ]


def rows_of_ncu(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return units by column and the launches of page raw as CSV; lines before the header are messages.

    Raises ValueError where no kernel was counted.
    """
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise ValueError("Nsight Compute's table has no header line that begins with ID; it counted no kernel")
    units, *rows = csv.DictReader(io.StringIO("\n".join(lines[head:])))
    return units, rows


def number(text: str) -> float:
    """Return a number that may have separators of thousands."""
    return float(text.replace(",", ""))
