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
from runtime.kernels.cases import cases

REPORTS = {
    "kernels": "kernels",
    "published": "published_report",
    "latency": "latency_report",
}  # where their tables are made
OURS = ("triton", "cuda", "picked")
ASIDE = ("reference", "torch.compile", *OURS)  # versions that are no library's


@dataclass(frozen=True)
class Bar:
    """A bar: where it stands in the results (benchmark, then operation and case or part and version), and its text.

    `which` is the version of ours that is judged; "" is the fastest.

    One of: `seconds` at most; `rate` per second at least, of the case's bytes or FLOPs; `ratio` of the time of the
    version `over` (of the fastest one that is not ours where that is "") at most.
    """

    place: tuple[str, str, str]
    published: str
    seconds: float | None = None
    rate: float | None = None
    over: str | None = None
    ratio: float = 1.0
    which: str = ""

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"<= {duration(self.seconds)}"
        if self.rate is not None:
            return f">= {self.rate / 1e12:g} T/s"
        return f"<= {self.ratio:.3g} x {self.over or 'best library'}"

    def met(self, ours: float, work: float, others: dict[str, float]) -> bool | None:
        """Tell whether a time reaches it; None where what it is compared with was not measured."""
        if self.seconds is not None:
            return ours <= self.seconds
        if self.rate is not None:
            return work / ours >= self.rate
        rival = others.get(self.over) if self.over else min(others.values(), default=None)
        return None if rival is None else ours <= self.ratio * rival


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
    return statistics.median(run[0] / run[-1] for run in runs) if runs else None


def kernel(operation: str, case: str, published: str, **bar: Any) -> Bar:
    """Return a bar of an operation."""
    return Bar(("kernels", operation, case), published, **bar)


@dataclass(frozen=True)
class Figure:
    """A bar of something else than a time: `benchmark` and what `read` finds in a record of it, None for nothing."""

    what: str
    benchmark: str
    bar: str
    read: Callable[[dict[str, Any]], float | None]
    met: Callable[[float], bool]
    unit: str = ""


SHAPE = "wan-14b 480p"
RATE, FASTER = {"rate": 3.7e12}, {"over": "torch.compile", "ratio": 1 / 1.2}
NORM, COMPILED = "0.63 TB/s (sglang)", "diffusers, compiled"


def cases_of(operation: str) -> list[str]:
    """Return the names of an operation's cases at published shapes."""
    return [case.name for case in cases(operation, real=True)]


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
    kernel("qk_norm_rope", f"{SHAPE} dense", "about 1.2 TB/s (sglang)", seconds=360e-6),
    kernel("gate_residual_modulate", SHAPE, "4.99 x eager (sglang)", seconds=360e-6),
    *(
        kernel(operation, case, published, **bar)
        for operation, case, published in (
            ("qk_norm_rope", f"{SHAPE} dense", "about 1.2 TB/s (sglang)"),
            ("modulate", SHAPE, "3.76 TB/s (cuDNN RMS norm)"),
            ("gate_residual", SHAPE, "not found"),
            ("gate_residual_modulate", SHAPE, "4.99 x eager (sglang)"),
            *(("norm_silu", case, NORM) for case in cases_of("norm_silu") if case.startswith("wan-vae 480p")),
        )
        for bar in (RATE, FASTER)
    ),
    *(
        kernel(
            "attention", case, "693 TFLOP/s (cuDNN 9.19)" * case.endswith("itself"), over="", ratio=1.01, which="picked"
        )
        for case in cases_of("attention")
    ),
    kernel("attention", f"{SHAPE} over itself", "395 to 477 TFLOP/s (Triton, H100)", rate=480e12, which="triton"),
    kernel("attention_fp8", SHAPE, "1062 TFLOP/s (cuDNN 9.19)", over="bf16 attention", ratio=1.0),
    *(kernel("mlp", case, "cuBLASLt epilogue", over="bare GEMMs", ratio=1.02) for case in cases_of("mlp")),
    *(
        kernel("linear_fp8", case, "1102 TFLOP/s (FBGEMM, H100)", over="bf16 linear", ratio=1 / 1.4)
        for case in cases_of("linear_fp8")
        if case.startswith("wan-14b")
    ),
    *(
        kernel("causal_conv3d", case, "374 TFLOP/s (sglang)", over="", ratio=1 / 1.5)
        for case in cases_of("causal_conv3d")
        if case.startswith("wan-vae 480p")
    ),
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


@dataclass(frozen=True)
class Measured:
    """What a place holds: seconds of ours and of others, the limit, and the work that a rate is of."""

    ours: float | None
    others: dict[str, float]
    floor: float | None
    work: float = 0.0


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
    what = " ".join(bar.place[1:]).removesuffix(" 16 bits") + (f", {bar.which}" if bar.which else "")
    if measured is None or measured.ours is None:
        return f"| {what} | | {bar.published} | {bar} | not measured | | | | |"
    met = bar.met(measured.ours, measured.work, measured.others)
    floor = "" if measured.floor is None else duration(measured.floor)
    share = "" if measured.floor is None else f"{measured.floor / measured.ours:.0%}"
    shown = {name: s for name, s in measured.others.items() if not name.startswith("ours") or name == bar.over}
    theirs = [name for name in shown if name.startswith("diffusers")]
    groups = theirs, [name for name in shown if name not in theirs]
    beside = " | ".join(", ".join(f"{name} {duration(shown[name])}" for name in names) for names in groups)
    verdict = {True: "met", False: "missed", None: "not measured"}[met]
    return (
        f"| {what} | {floor} | {bar.published} | {bar} | {duration(measured.ours)} | {share} | {beside} | {verdict} |"
    )


def found(bar: Bar, records: Sequence[dict[str, Any]]) -> Measured | None:
    """Return what the records hold at a bar's place, None where nothing."""
    benchmark, name, which = bar.place
    for record in reversed(records):
        if record.get("benchmark") != benchmark:
            continue
        for each in record["kernels"] if benchmark == "kernels" else record["parts"]:
            key = (each["operation"], each["case"]) if benchmark == "kernels" else (each["name"], which)
            if key == (name, which) and each.get("seconds"):
                return kernel_times(each, bar.which) if benchmark == "kernels" else part_times(each, which)
    return None


def kernel_times(each: dict[str, Any], which: str) -> Measured:
    """Read one case of `kernels`."""
    medians = {name: statistics.median(samples) for name, samples in each["seconds"].items()}
    ours = min((medians[name] for name in OURS if name in medians and which in ("", name)), default=None)
    others = {name: seconds for name, seconds in medians.items() if name not in ASIDE or name == "torch.compile"}
    return Measured(ours, others, each["least_us"] / 1e6, each["bytes" if each["bound"] == "memory" else "flops"])


def part_times(each: dict[str, Any], which: str) -> Measured:
    """Read one part of `published`: the fastest of ours in 16 bits, or the version named."""
    medians = {name: statistics.median(samples) for name, samples in each["seconds"].items()}
    in_16_bits = [name for name in medians if name.startswith("ours") and name not in each["bars"]]
    mine = in_16_bits if which == "16 bits" else [which]
    ours = min((medians[name] for name in mine if name in medians), default=None)
    return Measured(ours, {name: s for name, s in medians.items() if name not in mine}, each["floor"])


def duration(seconds: float) -> str:
    """Return seconds with three digits, in us or ms where they are few."""
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
