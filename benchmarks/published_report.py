"""Steps, decodes and requests of published models at their true size as tables."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import savings
from benchmarks.machine import told
from benchmarks.measure import PSNR_LIMIT
from benchmarks.profiled import Profile

METHOD = (
    "Random weights of the published sizes, bfloat16, versions in turns; those that diffusers compiled is beside take "
    "new turns with it. A step asks both prompts; a decode ends with bytes in the host's memory; a request is all of "
    "it. Apart: steps relative, frames in dB."
)


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown: a row per version, then the profiles."""
    lines = [
        f"**{told(record['machine'])}**", "",
        "| what | by | median | runs | of the floor | bar | apart from ours |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]  # fmt: skip
    for found in record["parts"]:
        lines += rows(found)
    if record["left_out"]:
        lines += ["", f"Left out when the time was up: {', '.join(record['left_out'])}."]
    lines += ["", METHOD]
    for found in record["parts"]:
        if "profile" in found:
            shown = Profile(**found["profile"]).table(found["floor"], found.get("floors", {}))
            lines += ["", f"**{found['name']}, profiled**", "", shown]
    return "\n".join(lines)


def rows(found: dict[str, Any]) -> list[str]:
    """Return the lines of one part."""
    if "cpu" in found:
        return savings.rows(found)
    lines = []
    medians = {name: statistics.median(samples) for name, samples in found.get("seconds", {}).items()}
    best = min(sixteen_bits(found), key=medians.__getitem__, default=None)
    for name, seconds in medians.items():
        share = f"{found['floor'] / seconds:.0%}" if found["floor"] else "-"
        bar = found["bars"].get("16 bits" if name == best else name)
        bar = "" if bar is None else f"{bar:g} s: {'met' if seconds <= bar else 'missed'}"
        apart = f"{found['difference'][name]:.3g}"
        count = len(found["seconds"][name])
        lines.append(f"| {found['name']} | {name} | {seconds:.3f} s | {count} | {share} | {bar} | {apart} |")
    if "psnr" in found:
        met = "met" if found["psnr"] >= PSNR_LIMIT else "missed"
        what = "ours beside float32, a short clip"
        lines.append(f"| {found['name']} | {what} | {found['psnr']:.1f} dB | 1 | | {PSNR_LIMIT:g} dB: {met} | |")
    if "peaks" in found:
        peaks = list(found["peaks"].values())
        met = "met" if max(peaks) <= 1.05 * min(peaks) else "missed"
        lengths, sizes = ", ".join(map(str, found["peaks"])), ", ".join(f"{peak / 2**30:.2f}" for peak in peaks)
        what = f"ours, memory of {lengths} frames"
        lines.append(f"| {found['name']} | {what} | {sizes} GiB | 1 | | within 5 %: {met} | |")
    return lines + [f"| {found['name']} | {name} | left out: {why} | | | | |" for name, why in found["skipped"].items()]


def sixteen_bits(found: dict[str, Any]) -> list[str]:
    """Return our measured versions in 16 bits, which the part's bar is of."""
    return [name for name in found.get("seconds", {}) if name.startswith("ours") and name not in found["bars"]]
