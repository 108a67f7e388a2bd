"""What a device can do: published peaks of GPUs, whose times are ideal, and measured rates, whose times are real."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from runtime.models.costs import Operation, Work

VAE_STAGES = ("decode", "encode")
SLACK = 0.08  # of a measured machine's memory that is left free for what is not foreseen
RESERVED = 2**30  # bytes of a GPU that its driver, libraries and fragmentation take


class Machine(Protocol):
    """What the planner asks of a device."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def basis(self) -> str:
        """Either "ideal": arithmetic and traffic at the peaks; or "measured": calibrated on the device."""
        ...

    @property
    def memory(self) -> int:
        """Bytes that may be used in all."""
        ...

    @property
    def capability(self) -> tuple[int, int]:
        """A GPU's compute capability, (0, 0) without one."""
        ...

    def seconds(self, work: Work, stage: str) -> float:
        """Seconds that a stage's work takes."""
        ...

    def bound(self, work: Work, stage: str) -> str:
        """What most of the time goes to: "compute", "memory" or "calls"."""
        ...

    def resident(self, stage: str) -> int:
        """Bytes that the process itself takes in a stage, beside weights and what the work holds."""
        ...

    def transfer(self, count: int) -> float:
        """Seconds to bring so many bytes of weights from where they wait."""
        ...


@dataclass(frozen=True)
class Gpu:
    """A GPU by its peaks: dense bfloat16 FLOP/s, bytes/s of its memory and of its link to the host."""

    name: str
    flops: float
    bandwidth: float
    memory: int
    link: float
    capability: tuple[int, int]
    basis: str = "ideal"

    def seconds(self, work: Work, stage: str) -> float:
        """The larger of arithmetic and traffic, perfectly overlapped: nothing runs faster."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)

    def bound(self, work: Work, stage: str) -> str:
        """The larger of the two."""
        return "compute" if work.flops / self.flops >= work.bytes / self.bandwidth else "memory"

    def resident(self, stage: str) -> int:
        """What PyTorch's allocator does not count."""
        return 0

    def transfer(self, count: int) -> float:
        """Over the link at its peak."""
        return count / self.link


def _gpu(name: str, teraflops: float, terabytes: float, gigabytes: float, link: float, sm: tuple[int, int]) -> Gpu:
    return Gpu(name, teraflops * 1e12, terabytes * 1e12, int(gigabytes * 2**30) - RESERVED, link * 1e9, sm)


# H200: measured products of 8192^3 and a copy. H100: the same chip, so the same rate of products; its memory is the
# vendor's. The others: the vendors' dense bfloat16 peaks (sums in float32) and memory rates. Links: PCIe 4 and 5 x16.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h200", 790, 4.3, 140, 64, (9, 0)),
        _gpu("h100", 790, 3.35, 80, 64, (9, 0)),
        _gpu("a100", 312, 2.039, 80, 32, (8, 0)),
        _gpu("l40s", 362, 0.864, 48, 32, (8, 9)),
        _gpu("4090", 165.2, 1.008, 24, 32, (8, 9)),
        _gpu("5090", 209.5, 1.792, 32, 64, (12, 0)),
    )
}


def peaks_of(name: str) -> Gpu | None:
    """Return the peaks of a GPU by the name that its driver tells, such as "NVIDIA H200"; None for one not known."""
    return next((gpu for known, gpu in GPUS.items() if known in name.lower()), None)


@dataclass(frozen=True)
class Rate:
    """Seconds of one kind of operation, as measured.

    Either `weights` of (call, FLOPs, bytes, scores), times what operations of about that size took of it, as `samples`
    of (FLOPs, bytes, ratio) have it; or a curve of seconds over bytes between `curve`'s points.
    """

    weights: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    curve: tuple[tuple[float, float], ...] = ()
    samples: tuple[tuple[float, float, float], ...] = ()

    def parts(self, operation: Operation) -> tuple[float, float, float]:
        """Seconds of one call that go to (calls, compute, memory)."""
        if self.curve:
            least = self.curve[0][1]
            seconds = interpolated(self.curve, operation.bytes)
            return min(least, seconds), 0.0, max(seconds - least, 0.0)
        call, flops, moved, scores = self.weights
        work = operation.flops + operation.idle
        ratio = ratio_near(self.samples, work, operation.bytes)
        return ratio * call, ratio * (flops * work + scores * operation.scores), ratio * moved * operation.bytes


def interpolated(curve: Sequence[tuple[float, float]], at: float) -> float:
    """Return seconds at so many bytes, straight between the points in logarithms; beyond the last, in proportion."""
    places = [point[0] for point in curve]
    if at <= places[0]:
        return curve[0][1]
    if at >= places[-1]:
        return curve[-1][1] * at / places[-1]
    right = bisect_left(places, at)
    (a, seconds_a), (b, seconds_b) = curve[right - 1], curve[right]
    share = math.log(at / a) / math.log(b / a)
    return math.exp((1 - share) * math.log(seconds_a) + share * math.log(seconds_b))


def ratio_near(samples: Sequence[tuple[float, float, float]], flops: float, moved: float) -> float:
    """Return the mean ratio of samples of (FLOPs, bytes, ratio), those of about this size before the others.

    A normal kernel's mean with a standard deviation of one octave (Nadaraya and Watson, 1964); 1 for no samples.
    """
    if not samples:
        return 1.0
    apart = [math.log2(a / flops) ** 2 + math.log2(b / moved) ** 2 for a, b, _ in samples]
    shares = [math.exp((min(apart) - each) / 2) for each in apart]
    logs = sum(share * math.log(ratio) for share, (_, _, ratio) in zip(shares, samples, strict=True))
    return math.exp(logs / sum(shares))


@dataclass(frozen=True)
class Measured:
    """A device by its calibration."""

    name: str
    memory: int
    rates: Mapping[str, Rate]
    vae_rates: Mapping[str, Rate]  # in the dtype of the autoencoder
    residents: Mapping[str, int] = field(default_factory=dict)  # stage -> bytes of the process itself
    glue: Mapping[str, float] = field(default_factory=dict)  # stage -> seconds around each operation
    read: float = 1e9  # bytes/s of weights from where they wait
    capability: tuple[int, int] = (0, 0)
    brief: bool = False  # to be measured whole by whoever has the time
    basis: str = "measured"

    def seconds(self, work: Work, stage: str) -> float:
        """The sum over all calls."""
        return sum(self._parts(work, stage))

    def bound(self, work: Work, stage: str) -> str:
        """The largest share of the time."""
        calls, compute, moved = self._parts(work, stage)
        return max((compute, "compute"), (moved, "memory"), (calls, "calls"))[1]

    def _parts(self, work: Work, stage: str) -> tuple[float, float, float]:
        glue = self.glue.get(stage, 0.0)
        rates = self.vae_rates if stage in VAE_STAGES else self.rates
        calls = compute = moved = 0.0
        for each in work.operations:
            parts = rates[each.kind].parts(each)
            calls += (parts[0] + glue) * each.count
            compute += parts[1] * each.count
            moved += parts[2] * each.count
        return calls, compute, moved

    def resident(self, stage: str) -> int:
        """As measured with the built-in model."""
        return self.residents.get(stage, 0)

    def transfer(self, count: int) -> float:
        """At the measured rate."""
        return count / self.read


def host_memory() -> int:
    """Bytes that this process may use: what is available now, and what it has."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 + resident_now()
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_now() -> int:
    """Bytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def usable_memory(device: torch.device) -> int:
    """Bytes of a device that this process may use in all: what is free, and what it has already."""
    if device.type != "cuda":
        return host_memory()
    return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device: of a GPU, also what PyTorch's allocator holds and does not use."""
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_now()
    return max(usable_memory(device) - used, 0)
