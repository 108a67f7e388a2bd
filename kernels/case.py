"""A case: one call of one operation, and how its tensors are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .qk_norm_rope import AxisTables

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

    def axes(self, grid: tuple[int, int, int], pairs: int) -> AxisTables:
        """Return rotary tables by axis; t takes of the pairs what h and w leave, as in Wan."""
        side = pairs // 3
        t, h, w = grid
        return AxisTables(self.turns(t, pairs - 2 * side), self.turns(h, side), self.turns(w, side))
