"""The few modules and tables that families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from runtime.kernels import (
    attention_fp8,
    gate_residual,
    gate_residual_modulate,
    gate_residual_modulate_fp8,
    linear_fp8,
    mlp,
    modulate,
    modulate_fp8,
    quantise_rows,
)
from runtime.models.spec import Stretch

# What a linear layer reads, [..., D]: numbers; or for one in 8 bits its codes, and the scale [...] of each token.
Read = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class LinearFp8(nn.Module):
    """A linear layer in 8-bit floating point: its weights scaled per output channel, x per token as it comes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise_rows(linear.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)  # [E, D] e4m3
        self.scale = nn.Parameter(scale, requires_grad=False)  # [E] float32
        self.bias = linear.bias
        self.dtype = linear.weight.dtype  # of what it returns for codes

    def forward(self, x: Read, *, gelu: bool = False) -> torch.Tensor:
        """x, or GELU_tanh(x), [..., D] -> [..., E] in x's dtype."""
        if isinstance(x, tuple):
            codes, scale = x
            return linear_fp8(codes, self.weight, self.scale, self.bias, gelu=gelu, x_scale=scale, dtype=self.dtype)
        return linear_fp8(x, self.weight, self.scale, self.bias, gelu=gelu)


class FullAttention(nn.Module):
    """Attention by a function, as a layer of its own, whose place one in 8 bits may take."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [B, L, N, K], k and v [B, S, N, K] -> [B, L, N * K]."""
        return self.function(q, k, v)


class AttentionFp8(nn.Module):
    """Attention with both of its products in 8-bit floating point."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [B, L, N, K], k and v [B, S, N, K] -> [B, L, N * K]."""
        return attention_fp8(q, k, v)


def in_8_bits(layer: nn.Module) -> bool:
    """Tell whether a layer is in 8 bits."""
    return isinstance(layer, LinearFp8 | AttentionFp8)


def modulated(
    reader: nn.Module,
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    **norm: Any,
) -> Read:
    """Return `kernels.modulate` of the same arguments, as the linear layer `reader` reads it."""
    return (modulate_fp8 if isinstance(reader, LinearFp8) else modulate)(x, scale, shift, **norm)


def added_and_modulated(
    reader: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    **norm: Any,
) -> tuple[torch.Tensor, Read]:
    """Return `kernels.gate_residual_modulate` of the same arguments: the sum, and as `reader` reads it its norm."""
    if isinstance(reader, LinearFp8):
        out, codes, rows = gate_residual_modulate_fp8(x, y, gate, scale, shift, **norm)
        return out, (codes, rows)
    return gate_residual_modulate(x, y, gate, scale, shift, **norm)


def feed_forward(
    x: Read, first: nn.Module, second: nn.Module, residual: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """Return residual + gate * second(GELU_tanh(first(x))), [B, L, D]; each layer may be in 8 bits."""
    if isinstance(x, torch.Tensor) and isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return mlp(x, first.weight, first.bias, second.weight, second.bias, residual=residual, gate=gate)
    inner = first(x)
    if isinstance(second, LinearFp8):
        return gate_residual(residual, second(inner, gelu=True), gate)
    return gate_residual(residual, second(F.gelu(inner, approximate="tanh")), gate)


def timestep_embedding(time: torch.Tensor, width: int) -> torch.Tensor:
    """Return the sinusoids [n, width] float32 of times [n], cosines first; periods 2 pi to 10000 * 2 pi."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@lru_cache(maxsize=32)
def _axis_table(size: int, length: int, theta: float, kind: str | None = None, trained: int = 0) -> torch.Tensor:
    """(cos, sin) of one axis, [length, size / 2, 2] float32, computed in float64 as published."""
    if kind == "ntk" and length > trained and size > 2:
        theta *= (length / trained) ** (size / (size - 2))
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    if kind == "riflex" and length > trained:
        own = int((2 * math.pi / frequencies - trained).abs().argmin())  # the one that would begin again
        frequencies[own] = 0.9 * 2 * math.pi / length
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=2).float()


def rotary_table(
    head_size: int,
    grid: Sequence[int],
    max_positions: int,
    theta: float = 10000.0,
    stretch: Stretch | None = None,
) -> torch.Tensor:
    """Return (cos, sin) [L, K/2, 2] float32 for a (t, h, w) grid of tokens; t takes what h and w leave of the head.

    `stretch` spreads positions where the grid is larger than weights were trained on: "ntk" slows low frequencies down
    on each axis (https://arxiv.org/abs/2309.00071, section 3.1), "riflex" the one that would repeat in time
    (https://arxiv.org/abs/2502.15894). Raises ValueError where the grid is longer than `max_positions` on an axis.
    Source: Wan `rope_params`: h and w get 2 * (K // 6) each.
    """
    if max(grid) > max_positions:
        raise ValueError(f"{tuple(grid)} tokens in (time, height, width); the model's table has {max_positions}")
    side = 2 * (head_size // 6)
    t, h, w = grid
    kind, trained = (None, (0, 0, 0)) if stretch is None else (stretch.kind, stretch.trained)
    space = kind if kind == "ntk" else None
    tables = [
        _axis_table(head_size - 2 * side, t, theta, kind, trained[0]).view(t, 1, 1, -1, 2),
        _axis_table(side, h, theta, space, trained[1]).view(1, h, 1, -1, 2),
        _axis_table(side, w, theta, space, trained[2]).view(1, 1, w, -1, 2),
    ]
    return torch.cat([table.expand(t, h, w, -1, 2) for table in tables], dim=3).flatten(0, 2).contiguous()
