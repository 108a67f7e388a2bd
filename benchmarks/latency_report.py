"""Latency per resolution as a table."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.machine import told
from benchmarks.measure import median_ratio
from benchmarks.plot import Bar

COLUMNS = ("load", "cold", "total", "text", "step", "decode", "encode")


def table(record: dict[str, Any]) -> str:
    """Return the rows of `latency` as Markdown, the machine above, how to read them below."""
    head = ["size x frames", "by", "steps", *COLUMNS, "peak memory", "of the floor", "peer / ours", "usual steps"]
    title = f"**{record['asked']['model']} on {told(record['machine'])}**"
    lines = [title, "", _row(head), _row(["---", "---", *["---:"] * (len(head) - 2)])]
    lines += [_row(cells(each, record["rows"])) for each in record["rows"]]
    return "\n".join([*lines, "", method(record["rows"])])


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Return one row: medians, or the reason why there is none."""
    first = [f"{row['size']} x {row['frames']}", row["engine"] or row["side"]]
    if "seconds" not in row:
        return [*first, f"not measured: {row['reason']}", *[""] * (len(COLUMNS) + 4)]
    times = [duration(row["seconds"].get(name)) for name in COLUMNS]
    memory = row["memory"] and f"{(row['memory']['before'] + row['memory']['growth']) / 2**30:.2f} GiB"
    floor = row["floor"] and f"{row['floor']['predicted']['total'] / statistics.median(row['seconds']['total']):.0%}"
    return [*first, str(row["steps"]), *times, memory or "-", floor or "-", ratio(row, rows), extrapolated(row)]


def extrapolated(row: dict[str, Any]) -> str:
    """Return what a request of the model's usual steps would take, by the step measured alone; "-" if it has them."""
    more = row.get("usual_steps", row["steps"]) - row["steps"]
    if not more or "step" not in row["seconds"]:
        return "-"
    seconds = statistics.median(row["seconds"]["total"]) + more * statistics.median(row["seconds"]["step"])
    return f"{row['usual_steps']}: {seconds:.3g} s, extrapolated"


def ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return how often ours fits into each peer's whole request at the same size; empty without one."""
    peers = [
        each["seconds"]["total"]
        for each in rows
        if not each["engine"] and "seconds" in each and (each["size"], each["frames"]) == (row["size"], row["frames"])
    ]
    ratios = [f"{median_ratio(row['seconds']['total'], peer):.2f}" for peer in peers]
    return ", ".join(ratios) if row["engine"] else ""


def duration(samples: list[float] | None) -> str:
    """Return the median of samples, in ms below a second; - for none."""
    if not samples:
        return "-"
    middle = statistics.median(samples)
    return f"{middle:.2f} s" if middle >= 1 else f"{middle * 1e3:.1f} ms"


def method(rows: list[dict[str, Any]]) -> str:
    """Return how to read the numbers."""
    bases = {each["floor"]["basis"] for each in rows if each.get("floor")}
    floor = {
        frozenset(): "no floor is known for this device",
        frozenset({"ideal"}): "floor: published arithmetic and traffic at the device's peaks",
        frozenset({"measured"}): "floor: what the planner predicts from this machine's calibration, no ideal",
    }[frozenset(bases)]
    compiled = sorted({each["engine"] for each in rows} & {"inductor", "tensorrt"})
    made = f" {' and '.join(compiled)}: what is compiled for the first row is kept for the later ones." * bool(compiled)
    return (
        "Medians. Each row is a new process: load, then cold, its first request, then total, further ones with new "
        f"prompts, then the stages by themselves (step: one guided step; encode: the clip back to latents).{made} Peak "
        f"memory is that of the first request, weights included; {floor}. Peer / ours: of whole requests, each "
        "peer below. Usual steps: the request with the model's own number of steps, by the step measured alone."
    )


def bars(record: dict[str, Any]) -> list[Bar]:
    """Return a bar per measured row: text, steps, decoding, and the rest of the request."""
    found = []
    for each in record["rows"]:
        if "seconds" not in each:
            continue
        middle = {name: statistics.median(times) for name, times in each["seconds"].items()}
        parts = {
            "text": middle.get("text", 0.0),
            "steps": middle.get("step", 0.0) * each["steps"],
            "decode": middle.get("decode", 0.0),
        }
        parts["rest"] = max(middle["total"] - sum(parts.values()), 0.0)
        label = f"{each['size']} x {each['frames']} {each['engine'] or each['side']}"
        found.append(Bar(label, parts, each["floor"] and each["floor"]["predicted"]["total"]))
    return found


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
