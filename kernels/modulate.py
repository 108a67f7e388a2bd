"""modulate: normalise each token, then scale and shift it (adaptive layer norm).

    h = LayerNorm(x; weight, bias, eps) * (1 + scale) + shift

x [B, L, D] any float dtype; scale, shift [1 or B, M, D] float32, one vector per L/M consecutive tokens, or None for
no modulation; weight, bias [D] float32 or None; returns h [B, L, D] in x's dtype. Arithmetic is float32.
Source: adaLN of DiT, https://arxiv.org/abs/2212.09748; Wan computes it in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import expect_floating, expect_groups, expect_shape


def modulate_ref(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """The definition, float32 inside."""
    rows, length, width = x.shape
    if scale is None or shift is None:
        return F.layer_norm(x.float(), (width,), weight, bias, eps).to(x.dtype)
    if weight is None and bias is None and scale.shape[:2] == (1, 1):
        # One vector for all tokens is an affine layer norm: one pass instead of two.
        return F.layer_norm(x.float(), (width,), scale[0, 0] + 1.0, shift[0, 0], eps).to(x.dtype)
    groups = scale.shape[1]
    h = F.layer_norm(x.float(), (width,), weight, bias, eps).view(rows, groups, length // groups, width)
    return torch.addcmul(shift.unsqueeze(2), h, scale.unsqueeze(2) + 1.0).view(rows, length, width).to(x.dtype)


def modulate(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift, [B, L, D]; ValueError for shapes that do not fit together."""
    expect_floating("x", x)
    expect_shape("x", x, (None, None, None))
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift are given together or not at all; only one of them was given")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            expect_groups(name, vector, x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            expect_shape(name, vector, (x.shape[2],))
    return modulate_ref(x, scale, shift, weight, bias, eps)
