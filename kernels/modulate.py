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
def load_token(start, body, tail, D: tl.constexpr):
    """One token's numbers in two tiles, float32; past L1, whose room the vectors need that every token reads."""
    a = tl.load(start + body, mask=body < D, other=0.0, cache_modifier=".cg")
    b = tl.load(start + tail, mask=tail < D, other=0.0, cache_modifier=".cg")
    return a.to(tl.float32), b.to(tl.float32)


@jit
def total(a, b):
    """The sum of both tiles; the larger is folded onto the smaller, so that threads meet once."""
    folded = tl.reshape(a, (a.shape[0] // b.shape[0], b.shape[0]))
    return tl.sum(tl.sum(folded, axis=0) + b, axis=0)


@jit
def normalised(a, b, body, tail, eps, D: tl.constexpr):
    """The layer norm of one token without weights; zeros from D on."""
    mean = total(a, b) / D
    a, b = tl.where(body < D, a - mean, 0.0), tl.where(tail < D, b - mean, 0.0)
    factor = tl.rsqrt(total(a * a, b * b) / D + eps)
    return a * factor, b * factor


@jit
def adapted(h, lanes, vector, scale, shift, weight, bias, D: tl.constexpr):
    """One tile weighed, scaled and shifted; `vector` is where its token's modulation stands."""
    inside = lanes < D
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
    D: tl.constexpr, BODY: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program per token: read it once, write it once.

    Its width is two tiles, BODY and TAIL, both powers of 2: 5120 is 4096 and 1024, where one tile would be 8192.
    """
    token = tl.program_id(0)
    row = (token // length).to(tl.int64)  # offsets may pass 2^31; the divisions are cheap in 32 bits
    place = token % length
    body, tail = tl.arange(0, BODY), BODY + tl.arange(0, TAIL)
    a, b = load_token(x + row * x_row + place.to(tl.int64) * x_token, body, tail, D)
    vector = row * vector_row + (place // group).to(tl.int64) * D
    a, b = normalised(a, b, body, tail, eps, D)
    a = adapted(a, body, vector, scale, shift, weight, bias, D)
    b = adapted(b, tail, vector, scale, shift, weight, bias, D)
    target = out + token.to(tl.int64) * D
    tl.store(target + body, a.to(out.dtype.element_ty), mask=body < D)
    tl.store(target + tail, b.to(out.dtype.element_ty), mask=tail < D)


def tiles_of(width: int) -> tuple[int, int, int]:
    """Return the two tiles of a width, and warps that load 16 bytes of the smaller one by each thread."""
    body = max(next_power_of_2(width) // 2, 1)
    tail = next_power_of_2(width - body)
    return body, tail, max(1, min(16, tail // 256))


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
    body, tail, warps = tiles_of(width)
    launch(
        modulate_kernel,
        (rows * length,),
        {
            "x": x, "scale": scale, "shift": shift, "weight": weight, "bias": bias, "out": out,
            "x_row": x.stride(0), "x_token": x.stride(1),
            "vector_row": 0 if scale is None or scale.shape[0] == 1 else scale.stride(0),
            "length": length, "group": 1 if scale is None else length // scale.shape[1], "eps": eps,
        },
        {"D": width, "BODY": body, "TAIL": tail},
        num_warps=tuned("modulate", str(width), x.device).get("num_warps", warps),
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
