"""gate_residual: add a gated branch to the residual stream, alone or fused with the norm that follows.

    out = x + gate * y
    h   = modulate(out, scale, shift)          # gate_residual_modulate returns (out, h)

x, y [B, L, D] any float dtype; gate, scale, shift [1 or B, M, D] float32 (gate may be None: a plain sum); out and h
[B, L, D] in x's dtype. Arithmetic is float32.
"""

from __future__ import annotations

import torch

from .checks import expect_floating, expect_groups, expect_shape
from .modulate import modulate


def gate_residual_ref(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """The definition, float32 inside."""
    if gate is None:
        return x + y
    if gate.shape[1] == 1:
        return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)
    rows, length, width = x.shape
    grouped = (rows, gate.shape[1], length // gate.shape[1], width)
    out = torch.addcmul(x.float().view(grouped), y.float().view(grouped), gate.unsqueeze(2))
    return out.view(rows, length, width).to(x.dtype)


def gate_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """Return x + gate * y, [B, L, D]; ValueError for shapes that do not fit together."""
    expect_floating("x", x)
    expect_shape("x", x, (None, None, None))
    expect_shape("y", y, tuple(x.shape))
    if gate is not None:
        expect_groups("gate", gate, x)
    return gate_residual_ref(x, y, gate)


def gate_residual_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x + gate * y, modulate(x + gate * y, scale, shift)), both [B, L, D]; ValueError as its two parts."""
    out = gate_residual(x, y, gate)
    return out, modulate(out, scale, shift, weight=weight, bias=bias, eps=eps)
