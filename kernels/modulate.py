"""modulate: normalise each token, then scale and shift it (adaptive layer norm).

    h = LayerNorm(x; weight, bias, eps) * (1 + scale) + shift

x [B, L, D] any float dtype; scale, shift [1 or B, M, D] float32, one vector per L/M consecutive tokens, or None for
no modulation; weight, bias [D] float32 or None; returns h [B, L, D] in x's dtype. Arithmetic is float32.
Source: adaLN of DiT, https://arxiv.org/abs/2212.09748; Wan computes it in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .backend import is_opaque, jit, launch, next_power_of_2, pick, register, tl
from .checks import expect_floating, expect_groups, expect_shape
from .cuda import modulate_cuda
from .tuning import tuned


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
def adapt(values, lanes, vector, scale, shift, weight, bias, eps, D: tl.constexpr):
    """The formula on one token's values, float32 and zero from D on; `vector` is where its modulation stands."""
    inside = lanes < D
    mean = tl.sum(values, axis=0) / D
    centred = tl.where(inside, values - mean, 0.0)
    h = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    if weight is not None:
        h = h * tl.load(weight + lanes, mask=inside, other=0.0)
    if bias is not None:
        h = h + tl.load(bias + lanes, mask=inside, other=0.0)
    if scale is not None:
        places = vector + lanes
        gain = 1.0 + tl.load(scale + places, mask=inside, other=0.0)
        h = h * gain + tl.load(shift + places, mask=inside, other=0.0)
    return h


@jit
def modulate_kernel(
    x, scale, shift, weight, bias, out,
    x_row, x_token, vector_row, length, group, eps,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token: read it once, write it once."""
    token = tl.program_id(0)
    row = (token // length).to(tl.int64)  # offsets may pass 2^31; the divisions are cheap in 32 bits
    place = token % length
    lanes = tl.arange(0, BLOCK)
    inside = lanes < D
    values = tl.load(x + row * x_row + place.to(tl.int64) * x_token + lanes, mask=inside, other=0.0).to(tl.float32)
    vector = row * vector_row + (place // group).to(tl.int64) * D
    h = adapt(values, lanes, vector, scale, shift, weight, bias, eps, D)
    tl.store(out + token.to(tl.int64) * D + lanes, h.to(out.dtype.element_ty), mask=inside)


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
        num_warps=tuned("modulate", str(width), x.device).get("num_warps", max(1, min(16, block // 512))),
    )  # fmt: skip
    return out


def modulate_picked(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """What runs eagerly, and behind `torch.ops.runtime.modulate`."""
    found = tuned("modulate", str(x.shape[2]), x.device)
    return pick(x, found, ref=modulate_ref, triton=modulate_triton, cuda=modulate_cuda)(x, *others)


register(
    "modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    modulate_picked,
    lambda x, *_: x.new_empty(x.shape),
)


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
    expect_modulation(x, scale, shift, weight, bias)
    if is_opaque():
        return torch.ops.runtime.modulate(x, scale, shift, weight, bias, eps)
    return modulate_picked(x, scale, shift, weight, bias, eps)


def expect_modulation(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Raise ValueError unless these are arguments of `modulate` that fit together."""
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
