"""modulate: normalise each token, then scale and shift it (adaptive layer norm).

    h = LayerNorm(x; weight, bias, eps) * (1 + scale) + shift

x [B, L, D] any float dtype; scale, shift [1 or B, M, D] float32, one vector per L/M consecutive tokens, or None for
no modulation; weight, bias [D] float32 or None; returns h [B, L, D] in x's dtype. Arithmetic is float32.
Source: adaLN of DiT, https://arxiv.org/abs/2212.09748; Wan computes it in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import jit, launch, next_power_of_2, pick, tl
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


@jit
def modulate_kernel(
    x, scale, shift, weight, bias, out,
    x_row, x_token, vector_row, length, group, eps,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token: read it once, write it once."""
    token = tl.program_id(0).to(tl.int64)
    row, place = token // length, token % length
    lanes = tl.arange(0, BLOCK)
    inside = lanes < D
    values = tl.load(x + row * x_row + place * x_token + lanes, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / D
    centred = tl.where(inside, values - mean, 0.0)
    h = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    if weight is not None:
        h = h * tl.load(weight + lanes, mask=inside, other=0.0)
    if bias is not None:
        h = h + tl.load(bias + lanes, mask=inside, other=0.0)
    if scale is not None:
        vector = row * vector_row + (place // group) * D + lanes
        h = h * (1.0 + tl.load(scale + vector, mask=inside, other=0.0)) + tl.load(shift + vector, mask=inside, other=0.0)
    tl.store(out + token * D + lanes, h.to(out.dtype.element_ty), mask=inside)


def modulate_triton(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """One pass over x. x's last dimension and the vectors are contiguous, or are made so."""
    rows, length, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(rows, length, width, dtype=x.dtype, device=x.device)
    if scale is not None and shift is not None:
        scale, shift = scale.contiguous(), shift.contiguous()
    block = next_power_of_2(width)
    launch(
        modulate_kernel,
        (rows * length,),
        {
            "x": x, "scale": scale, "shift": shift, "weight": weight, "bias": bias, "out": out,
            "x_row": x.stride(0), "x_token": x.stride(1),
            "vector_row": 0 if scale is None or scale.shape[0] == 1 else scale.stride(0),
            "length": length, "group": 1 if scale is None else length // scale.shape[1], "eps": eps,
        },
        {"D": width, "BLOCK": block},
        num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return out


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
    return pick(x, ref=modulate_ref, triton=modulate_triton)(x, scale, shift, weight, bias, eps)
