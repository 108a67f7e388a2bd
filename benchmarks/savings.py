"""What the qualities save in time on another model than they were calibrated on: a published size with random weights.

The steps that the built-in model's calibration computes are computed, the others predicted; the guard, which random
weights would always alarm, is kept from adding steps. Beside it stands what the same qualities saved on a CPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import runtime
from benchmarks.machine import RESULTS
from benchmarks.quality import speed
from benchmarks.sides import Ours
from runtime.budget import FILE, Calibrated, Setting, read, write
from runtime.model import DEMO
from runtime.request import Request

EXACT, QUALITIES = "exact", ("high", "fast")
KEEPS = 0.9  # of the CPU's times faster, at least
TAKES = 1  # the exact request alone takes 20 s
UNALARMED = 1e9  # times the expected error, which no prediction reaches


def calibrated() -> Calibrated:
    """Return what was measured of the built-in model."""
    return read(DEMO / FILE)[0]


def measured(side: Ours, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the seconds of whole requests of each quality, taken in turns, how many steps each computed, and the
    CPU's."""
    entry = calibrated()
    request = replace(side.case.request, steps=entry.setting.steps)
    rungs = tuple(replace(rung, bound=UNALARMED) for rung in entry.rungs if not rung.fp8)
    write(side.model, replace(entry, setting=Setting.of(side.model, request), rungs=rungs))
    seconds: dict[str, list[float]] = {quality: [] for quality in (EXACT, *QUALITIES)}
    computed: dict[str, int] = {}

    takes = count()  # each with a prompt of its own, so that no text is known already

    def make(quality: str) -> float:
        say(f"a request of {request.steps} steps: {quality}")
        asked: Request = replace(side.case.take(next(takes)), steps=request.steps, quality=quality)
        began = time.perf_counter()
        video = runtime.generate(side.model, asked)
        _ = video.frames
        spent = time.perf_counter() - began
        assert video.receipt is not None and request.steps is not None
        said = video.receipt.quality
        computed[quality] = request.steps if said is None else said["windows"][0]["computed"]
        return spent

    make(QUALITIES[-1])  # compiles kernels
    for _ in range(TAKES):
        for quality, samples in seconds.items():
            samples.append(make(quality))
    return {"seconds": seconds, "steps": request.steps, "computed": computed, "cpu": on_a_cpu()}


def on_a_cpu() -> dict[str, Any]:
    """Return of the newest results there how many times faster each quality is, and the steps it computes on average;
    empty without results."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob("cpu-*/*.json")]
    found = [each for each in records if each.get("benchmark") == "quality"]
    if not found:
        return {}
    newest = max(found, key=lambda each: each["machine"]["date"])
    samples = newest["samples"]
    return {
        "commit": newest["machine"]["commit"], "name": newest["machine"]["name"],
        "faster": {quality: speed(samples, quality) for quality in QUALITIES},
        "computed": {quality: statistics.mean(samples[quality]["asked"]) for quality in QUALITIES},
    }  # fmt: skip


def faster(found: dict[str, Any], quality: str) -> float:
    """Return how many times faster than exact a quality is, the median over the pairs."""
    pairs = zip(found["seconds"][EXACT], found["seconds"][quality], strict=True)
    return statistics.median(exact / own for exact, own in pairs)


def kept(found: dict[str, Any], quality: str) -> float | None:
    """Return the part of the CPU's times faster that is reached; None where the CPU's are not known."""
    there = found["cpu"].get("faster", {}).get(quality)
    return None if there is None else faster(found, quality) / there


def rows(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table of `published`."""
    lines = []
    for quality, samples in found["seconds"].items():
        seconds = statistics.median(samples)
        share = f"{found['floor'] / seconds:.0%}" if found["floor"] and quality == EXACT else "-"
        name = f"{quality}, {found['computed'][quality]} of {found['steps']} steps computed"
        bar = ""
        if quality != EXACT:
            bar = f"{faster(found, quality):.2f} times faster"
            part = kept(found, quality)
            if part is not None:
                there = found["cpu"]["faster"][quality]
                met = "met" if part >= KEEPS else "missed"
                bar += f"; on the CPU, with the built-in model, {there:.2f}; at least {KEEPS:g} of it: {met}"
        lines.append(f"| {found['name']} | {name} | {seconds:.3f} s | {len(samples)} | {share} | {bar} | |")
    return lines + [f"| {found['name']} | {name} | left out: {why} | | | | |" for name, why in found["skipped"].items()]
