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
    left = record.get("left_out")
    lines += ["", f"Left out when the time was up: {'; '.join(left)}."] if left else []
    return "\n".join([*lines, "", method(record["rows"])])


def whole(row: dict[str, Any]) -> list[float]:
    """Return the seconds of whole requests; where none was made, of one put together from its stages."""
    seconds = row["seconds"]
    if "total" in seconds:
        return list(seconds["total"])
    if not {"text", "step", "decode"} <= set(seconds):
        return []
    text, step, decode = (statistics.median(seconds[name]) for name in ("text", "step", "decode"))
    return [text + row["steps"] * step + decode]


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Return one row: medians, or the reason why there is none."""
    first = [f"{row['size']} x {row['frames']}", row["engine"] or row["side"]]
    if "seconds" not in row:
        return [*first, f"not measured: {row['reason']}", *[""] * (len(COLUMNS) + 4)]
    times = [duration(row["seconds"].get(name)) for name in COLUMNS]
    memory = row["memory"] and f"{(row['memory']['before'] + row['memory']['growth']) / 2**30:.2f} GiB"
    if (total := whole(row)) and "total" not in row["seconds"]:
        times[COLUMNS.index("total")] = f"{duration(total)}, combined"
    floor = row["floor"] and total and f"{row['floor']['predicted']['total'] / statistics.median(total):.0%}"
    return [*first, str(row["steps"]), *times, memory or "-", floor or "-", ratio(row, rows), extrapolated(row)]


def extrapolated(row: dict[str, Any]) -> str:
    """Return what a request of the model's usual steps would take, by the step measured alone; "-" if it has them."""
    more = row.get("usual_steps", row["steps"]) - row["steps"]
    if not more or not {"step", "total"} <= set(row["seconds"]):
        return "-"
    seconds = statistics.median(row["seconds"]["total"]) + more * statistics.median(row["seconds"]["step"])
    return f"{row['usual_steps']}: {seconds:.3g} s, extrapolated"


def ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return how often ours fits into each peer's whole request at the same size; empty without one."""
    peers = [
        whole(each)
        for each in rows
        if not each["engine"] and "seconds" in each and (each["size"], each["frames"]) == (row["size"], row["frames"])
    ]
    pairs = [(ours, peer) for peer in peers if (ours := whole(row)) and len(ours) == len(peer)]
    ratios = [f"{median_ratio(*pair):.2f}" for pair in pairs]
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
    way = (
        "Each row is a new process: load, then cold, its first request, then total, further ones with new prompts, "
        "then the stages by themselves (step: one guided step; encode: the clip back to latents)."
    )
    if any("cold" not in each["seconds"] for each in rows if "seconds" in each):
        way = (
            "A side's sizes follow each other in one process, which loads once; each of text, a guided step and a "
            "decode is measured by itself, and total is put together from them for so many steps, not run."
        )
    return (
        f"Medians. {way}{made} Peak memory is that of what was done first, weights included; {floor}. Peer / ours: of "
        "whole requests, each peer below. Usual steps: the request with the model's own number of steps, by the step "
        "measured alone."
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
        parts["rest"] = max(statistics.median(whole(each) or [0.0]) - sum(parts.values()), 0.0)
        label = f"{each['size']} x {each['frames']} {each['engine'] or each['side']}"
        found.append(Bar(label, parts, each["floor"] and each["floor"]["predicted"]["total"]))
    return found


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
