"""What each operation must reach on an H200 at published shapes, and what a result of `kernels` holds of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.pairs import PAIR, pair_cases
from runtime.kernels.cases import cases

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

    @property
    def name(self) -> str:
        """What is judged: "qk_norm_rope wan-14b 480p dense"."""
        return " ".join(self.place[1:]).removesuffix(" 16 bits") + (f", {self.which}" if self.which else "")

    def most(self, work: float, others: dict[str, float]) -> float | None:
        """Return the seconds that just reach it; None where what it is compared with was not measured."""
        if self.seconds is not None:
            return self.seconds
        if self.rate is not None:
            return work / self.rate
        rival = others.get(self.over) if self.over else min(others.values(), default=None)
        return None if rival is None else self.ratio * rival

    def met(self, ours: float, work: float, others: dict[str, float]) -> bool | None:
        """Tell whether a time reaches it; None where what it is compared with was not measured."""
        most = self.most(work, others)
        return None if most is None else ours <= most


@dataclass(frozen=True)
class Measured:
    """What a place holds: seconds of ours and of others, the limit, the work that a rate is of, our version's name."""

    ours: float | None
    others: dict[str, float]
    floor: float | None
    work: float = 0.0
    version: str = ""


def kernel(operation: str, case: str, published: str, **bar: Any) -> Bar:
    """Return a bar of an operation."""
    return Bar(("kernels", operation, case), published, **bar)


SHAPE = "wan-14b 480p"
RATE, FASTER = {"rate": 3.7e12}, {"over": "torch.compile", "ratio": 1 / 1.2}
QK_NORM = "about 1.2 TB/s (sglang)"
NORM = "0.63 TB/s (sglang)"


def cases_of(operation: str) -> list[str]:
    """Return the names of an operation's cases at published shapes."""
    return [case.name for case in cases(operation, real=True)]


def convolutions_of(decoder: str) -> list[tuple[str, str]]:
    """Return a decoder's convolutions, (operation, case): with the norm before them where they read a normed clip."""
    normed = [case.name for case in pair_cases()]
    every = [case for case in cases_of("causal_conv3d") if case.startswith(f"{decoder} ")]
    return [(PAIR if case in normed else "causal_conv3d", case) for case in every]


BARS = (
    *(kernel("qk_norm_rope", f"{SHAPE} {tables}", QK_NORM, seconds=360e-6) for tables in ("dense", "axes")),
    kernel("gate_residual_modulate", SHAPE, "4.99 x eager (sglang)", seconds=360e-6),
    *(
        kernel(operation, case, published, **bar)
        for operation, case, published in (
            ("qk_norm_rope", f"{SHAPE} dense", QK_NORM),
            ("qk_norm_rope", f"{SHAPE} axes", QK_NORM),
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
        kernel(operation, case, "374 TFLOP/s (sglang)", over="", ratio=1 / 1.5)
        for operation, case in convolutions_of("wan-vae 480p")
    ),
)


def measured_of(bar: Bar, record: dict[str, Any]) -> Measured | None:
    """Return what a record of `kernels` holds at a bar's place, None where nothing."""
    for each in record["kernels"]:
        if (each["operation"], each["case"]) == bar.place[1:] and each.get("seconds"):
            return kernel_times(each, bar.which)
    return None


def kernel_times(each: dict[str, Any], which: str) -> Measured:
    """Read one case of `kernels`."""
    medians = {name: statistics.median(samples) for name, samples in each["seconds"].items()}
    mine = [name for name in OURS if name in medians and which in ("", name)]
    if which == "picked" and not mine:  # a pick of our own kernel is timed as that
        mine = [name for name in ("triton",) if name in medians]
    version = min(mine, key=medians.__getitem__, default="")
    others = {name: seconds for name, seconds in medians.items() if name not in ASIDE or name == "torch.compile"}
    work = each["bytes" if each["bound"] == "memory" else "flops"]
    return Measured(medians.get(version), others, each["least_us"] / 1e6, work, version)


def missed_by(ours: float, most: float) -> str:
    """Return by how much a time misses: "missed by 8.3 %"."""
    return f"missed by {ours / most - 1:.1%}".replace("%", " %")


def duration(seconds: float) -> str:
    """Return seconds with three digits, in us or ms where they are few."""
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
