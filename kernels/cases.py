"""The shapes that matter, named once: tests, benchmarks, the compile report and tuning all draw from here.

A new operation is tested, timed and compiled ahead by adding its file and its cases. Small cases run in Triton's
interpreter on a CPU; real ones are a published model at a published resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of one operation; `bytes` and `flops` are the least that it can take, for the roofline."""

    operation: str
    name: str
    make: Callable[[Maker], Arguments]  # keyword arguments of the operation
    real: bool = False
    bytes: int = 0
    flops: int = 0


@dataclass
class Maker:
    """Makes a case's tensors: seeded, on a device, in a dtype; on the meta device only their shapes."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        """Return normal numbers; drawn in float32 and rounded, so that all dtypes see the same ones."""
        kind = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=kind, device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.seed)
        self.seed += 1
        return (torch.randn(shape, generator=generator, device=self.device) * scale).to(kind)

    def vector(self, *shape: int) -> torch.Tensor:
        """Return float32 numbers around zero, as modulation vectors are."""
        return self.tensor(*shape, dtype=torch.float32, scale=0.5)

    def gain(self, *shape: int) -> torch.Tensor:
        """Return float32 numbers around one, as norm weights are."""
        return 1.0 + self.tensor(*shape, dtype=torch.float32, scale=0.2)

    def turns(self, length: int, pairs: int) -> torch.Tensor:
        """Return a rotary table [L, K/2, 2] float32."""
        if self.device.type == "meta":
            return torch.empty(length, pairs, 2, device=self.device)
        angle = torch.outer(
            torch.arange(length, device=self.device, dtype=torch.float32),
            10000.0 ** -(torch.arange(pairs, device=self.device) / pairs),
        )
        return torch.stack([angle.cos(), angle.sin()], 2)


@dataclass(frozen=True)
class Transformer:
    """The widths of a published transformer."""

    name: str
    width: int
    heads: int
    ffn: int


@dataclass(frozen=True)
class Resolution:
    """A token grid (t, h, w) of a published size."""

    name: str
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Number of video tokens, L."""
        return self.grid[0] * self.grid[1] * self.grid[2]


WAN_1B = Transformer("wan-1.3b", 1536, 12, 8960)
WAN_14B = Transformer("wan-14b", 5120, 40, 13824)
WAN_5B = Transformer("wan-5b", 3072, 24, 14336)
P480 = Resolution("480p", (21, 30, 52))  # 832x480, 81 frames
P720 = Resolution("720p", (21, 45, 80))  # 1280x720, 81 frames
P704 = Resolution("704p", (31, 22, 40))  # 1280x704, 121 frames, the 16x16 autoencoder

REAL = ((WAN_1B, P480), (WAN_1B, P720), (WAN_14B, P480), (WAN_14B, P720), (WAN_5B, P704))
HALF = 2  # bytes of bfloat16, in which real cases are counted


def modulate_cases() -> Iterator[Case]:
    """Plain, per sample, per token group, affine; a width that is no power of 2."""
    for rows, length, width, groups, shared, affine in (
        (1, 7, 33, 1, True, False), (2, 12, 96, 3, False, False), (2, 12, 65, 12, True, True), (1, 5, 130, 0, True, True),
        (0, 4, 16, 1, True, False),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, width: int = width, groups: int = groups,
            shared: bool = shared, affine: bool = affine,
        ) -> Arguments:  # fmt: skip
            vectors = (1 if shared else rows, groups, width)
            return {
                "x": m.tensor(rows, length, width),
                "scale": m.vector(*vectors) if groups else None,
                "shift": m.vector(*vectors) if groups else None,
                "weight": m.gain(width) if affine else None,
                "bias": m.vector(width) if affine else None,
            }

        yield Case("modulate", f"{rows}x{length}x{width} groups {groups} affine {affine}", make)

    def strided(m: Maker) -> Arguments:
        return {"x": m.tensor(5, 2, 48).transpose(0, 1), "scale": m.vector(1, 1, 48), "shift": m.vector(1, 1, 48)}

    yield Case("modulate", "transposed", strided)
    for model, size in REAL:

        def real(m: Maker, width: int = model.width, tokens: int = size.tokens) -> Arguments:
            return {"x": m.tensor(1, tokens, width), "scale": m.vector(1, 1, width), "shift": m.vector(1, 1, width)}

        moved = 2 * HALF * size.tokens * model.width
        yield Case("modulate", f"{model.name} {size.name}", real, real=True, bytes=moved)


CASES: dict[str, Callable[[], Iterator[Case]]] = {"modulate": modulate_cases}


def cases(operation: str | None = None, *, real: bool | None = None) -> list[Case]:
    """Return the cases of an operation (of all where None), the small or the real ones (both where None)."""
    names = [operation] if operation else list(CASES)
    return [case for name in names for case in CASES[name]() if real is None or case.real == real]
