"""python -m benchmarks bars FILE...: what was to be reached on an H200, beside what was measured: one table.

Reads results of `kernels` and `published`. Limits are arithmetic and traffic at 790 TFLOP/s and 4.3 TB/s, which such a
GPU reaches; best published figures are of the same GPU and shape where no other is named.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

REPORTS = {"kernels": "kernels", "published": "published", "latency": "latency_report"}  # where their tables are made
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


def kernel(operation: str, case: str, published: str, **bar: Any) -> Bar:
    """Return a bar of an operation."""
    return Bar(("kernels", operation, case), published, **bar)


SHAPE = "wan-14b 480p"
BARS = (
    kernel("qk_norm_rope", f"{SHAPE} dense", "about 1.2 TB/s (sglang)", seconds=360e-6),
    kernel("gate_residual_modulate", SHAPE, "4.99 x eager (sglang)", seconds=360e-6),
    kernel("modulate", SHAPE, "3.76 TB/s (cuDNN RMS norm)", rate=3.7e12),
    kernel("gate_residual", SHAPE, "", rate=3.7e12),
    kernel("modulate", SHAPE, "", over="torch.compile", ratio=1 / 1.2),
    kernel("qk_norm_rope", f"{SHAPE} dense", "", over="torch.compile", ratio=1 / 1.2),
    kernel("gate_residual", SHAPE, "", over="torch.compile", ratio=1 / 1.2),
    kernel("gate_residual_modulate", SHAPE, "", over="torch.compile", ratio=1 / 1.2),
    kernel("norm_silu", "wan-vae 480p 96 channels", "0.63 TB/s (sglang)", rate=3.7e12),
    kernel("norm_silu", "wan-vae 480p 96 channels", "", over="torch.compile", ratio=1 / 1.2),
    *(
        kernel(
            "attention",
            f"{model} {size} over {keys}",
            "693 TFLOP/s (cuDNN 9.19)" * (keys == "itself"),
            over="",
            ratio=1.01,
            which="picked",
        )
        for model, size in (
            ("wan-14b", "480p"),
            ("wan-1.3b", "480p"),
            ("wan-14b", "720p"),
            ("wan-1.3b", "720p"),
            ("wan-5b", "704p"),
        )
        for keys in ("itself", "text")
    ),
    kernel("attention", f"{SHAPE} over itself", "395 to 477 TFLOP/s (Triton, H100)", rate=480e12, which="triton"),
    kernel("attention_fp8", SHAPE, "1062 TFLOP/s (cuDNN 9.19)", over="bf16 attention", ratio=1.0),
    kernel("mlp", SHAPE, "", over="bare GEMMs", ratio=1.02),
    kernel("linear_fp8", f"{SHAPE} 5120 to 13824", "1102 TFLOP/s (FBGEMM, H100)", over="bf16 linear", ratio=1 / 1.4),
    kernel("causal_conv3d", "wan-vae 480p 96 to 96 at 832x480x4", "374 TFLOP/s (sglang)", over="", ratio=1 / 1.5),
    Bar(("published", "step-1.3b-480p", "16 bits"), "not found", seconds=0.85),
    Bar(("published", "step-1.3b-480p", "16 bits"), "", over="diffusers", ratio=1 / 1.5),
    Bar(("published", "step-1.3b-480p", "16 bits"), "", over="diffusers, compiled", ratio=1 / 1.15),
    Bar(("published", "step-14b-480p", "16 bits"), "5.18 s (LightX2V, H100)", seconds=5.0),
    Bar(("published", "step-14b-480p", "16 bits"), "", over="diffusers", ratio=1 / 1.5),
    Bar(("published", "step-14b-480p", "16 bits"), "", over="diffusers, compiled", ratio=1 / 1.15),
    Bar(("published", "step-14b-480p", "ours, fp8"), "", seconds=3.9),
    Bar(("published", "step-14b-480p", "ours, fp8, attention too"), "", over="ours, fp8"),
    Bar(("published", "decode-480p", "16 bits"), "1.56 s (sglang)", seconds=0.9),
    Bar(("published", "decode-480p", "16 bits"), "", over="diffusers, compiled"),
    Bar(("published", "decode-720p", "16 bits"), "", seconds=2.0),
    Bar(("published", "decode-720p", "16 bits"), "", over="diffusers, compiled"),
    Bar(("published", "decode-720p", "ours, in tiles"), "", over="ours", ratio=1.25),
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
    parser.add_argument("files", type=Path, nargs="+", help="results of kernels, published and latency")
    parser.add_argument("--tables", action="store_true", help="each file's own table before it")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in args.files]
    for record in records if args.tables else ():
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
        "", "| what | limit | best published | bar | ours | of the limit | beside it in the run | |",
        "| --- | ---: | --- | --- | ---: | ---: | --- | --- |",
    ]  # fmt: skip
    return "\n".join(lines + [row(bar, found(bar, records)) for bar in BARS])


def row(bar: Bar, measured: Measured | None) -> str:
    """Return one bar's line."""
    what = " ".join(bar.place[1:]).removesuffix(" 16 bits") + (f", {bar.which}" if bar.which else "")
    if measured is None or measured.ours is None:
        return f"| {what} | | {bar.published} | {bar} | not measured | | | |"
    met = bar.met(measured.ours, measured.work, measured.others)
    floor = "" if measured.floor is None else duration(measured.floor)
    share = "" if measured.floor is None else f"{measured.floor / measured.ours:.0%}"
    shown = {name: s for name, s in measured.others.items() if not name.startswith("ours") or name == bar.over}
    beside = ", ".join(f"{name} {duration(seconds)}" for name, seconds in shown.items())
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
