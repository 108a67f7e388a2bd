"""modulate: normalise each token, then scale and shift it (adaptive layer norm).

    h            = norm(x; weight, bias, eps) * (1 + scale) + shift
    codes, scale = quantise_rows(h)          # modulate_fp8: what a linear layer in 8 bits reads; h is never written

norm is "layer", LayerNorm, or "rms": x / sqrt(mean(x^2) + eps). x [B, L, D] any float dtype; scale, shift
[1 or B, M, D] float32, one vector per L/M consecutive tokens, or None for no modulation; weight, bias [D] float32 or
None; returns h [B, L, D] in x's dtype, or codes [B, L, D] e4m3 and their scale [B, L] float32. Arithmetic is float32;
codes are of h before it would be rounded to x's dtype.
Source: adaLN of DiT, https://arxiv.org/abs/2212.09748; Wan computes it in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .backend import has_fp8, is_opaque, jit, launch, pick, register, tl
from .checks import expect_device, expect_floating, expect_groups, expect_shape, expect_some
from .cuda import modulate_cuda
from .quantise_rows import InFp8, empty_in_fp8, quantise_rows_ref
from .rows import lanes_of, load_token, store_in_8_bits, store_token, tiles_of, total
from .tuning import tuned

NORMS = ("layer", "rms")


def modulate_ref(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
) -> torch.Tensor:
    """The definition, float32 inside."""
    rows, length, width = x.shape
    if scale is None or shift is None:
        return normed_ref(x, weight, bias, eps, norm).to(x.dtype)
    if weight is None and bias is None and scale.shape[:2] == (1, 1):
        # One vector for all tokens is an affine norm: one pass instead of two.
        return normed_ref(x, scale[0, 0] + 1.0, shift[0, 0], eps, norm).to(x.dtype)
    groups = scale.shape[1]
    h = normed_ref(x, weight, bias, eps, norm).view(rows, groups, length // groups, width)
    return torch.addcmul(shift.unsqueeze(2), h, scale.unsqueeze(2) + 1.0).view(rows, length, width).to(x.dtype)


def normed_ref(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, norm: str
) -> torch.Tensor:
    """The norm with its weights, float32."""
    if norm == "layer":
        return F.layer_norm(x.float(), x.shape[2:], weight, bias, eps)
    h = F.rms_norm(x.float(), x.shape[2:], weight, eps)
    return h if bias is None else h + bias


def modulate_fp8_ref(x: torch.Tensor, *others: Any) -> InFp8:
    """The definition: one after the other, in float32."""
    h = modulate_ref(x.float(), *others)
    codes, row_scale = quantise_rows_ref(h.flatten(0, 1), False)
    return codes.view(h.shape), row_scale.view(h.shape[:2])


@jit
def normalised(a, b, body, tail, eps, D: tl.constexpr, RMS: tl.constexpr):
    """The norm of one token without weights; zeros from D on."""
    if not RMS:
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
    x, scale, shift, weight, bias, out, row_scale,
    x_row, x_token, vector_row, length, group, eps,
    D: tl.constexpr, BODY: tl.constexpr, TAIL: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """One program per token, in two tiles: read it once, write it once; in 8 bits where `row_scale` is given."""
    token = tl.program_id(0)
    row = (token // length).to(tl.int64)  # offsets may pass 2^31; the divisions are cheap in 32 bits
    place = token % length
    body, tail = lanes_of(BODY, TAIL)
    a, b = load_token(x + row * x_row + place.to(tl.int64) * x_token, body, tail, D)
    vector = row * vector_row + (place // group).to(tl.int64) * D
    a, b = normalised(a, b, body, tail, eps, D, RMS)
    a = adapted(a, body, vector, scale, shift, weight, bias, D)
    b = adapted(b, tail, vector, scale, shift, weight, bias, D)
    target = out + token.to(tl.int64) * D
    if row_scale is None:
        store_token(target, a, b, body, tail, D)
    else:
        store_in_8_bits(target, row_scale + token, a, b, body, tail, D)


def modulate_triton(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """One pass over x. x's last dimension and the vectors are contiguous, or are made so."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch("modulate", out, None, x, *others)
    return out


def modulate_fp8_triton(x: torch.Tensor, *others: Any) -> InFp8:
    """The same pass; it writes half as much, and spares the quantiser's own. From sm_89 on."""
    codes, row_scale = empty_in_fp8(x)
    _launch("modulate_fp8", codes, row_scale, x, *others)
    return codes, row_scale


def _launch(
    operation: str,
    out: torch.Tensor,
    row_scale: torch.Tensor | None,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    *norm: Any,
) -> None:
    """Launch either form; `norm` is weight, bias, eps and its name."""
    rows, length, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    scale, shift, weight, bias = (
        None if vector is None else vector.contiguous() for vector in (scale, shift, *norm[:2])
    )
    body, tail, warps = tiles_of(width)
    launch(
        modulate_kernel,
        (rows * length,),
        {
            "x": x, "scale": scale, "shift": shift, "weight": weight, "bias": bias, "out": out, "row_scale": row_scale,
            "x_row": x.stride(0), "x_token": x.stride(1),
            "vector_row": 0 if scale is None or scale.shape[0] == 1 else scale.stride(0),
            "length": length, "group": 1 if scale is None else length // scale.shape[1], "eps": norm[2],
        },
        {"D": width, "BODY": body, "TAIL": tail, "RMS": norm[3] == "rms"},
        num_warps=tuned(operation, str(width), x.device).get("num_warps", warps),
    )  # fmt: skip


def modulate_picked(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """What runs eagerly, and behind `torch.ops.runtime.modulate`."""
    found = tuned("modulate", str(x.shape[2]), x.device)
    return pick(x, found, ref=modulate_ref, triton=modulate_triton, cuda=modulate_cuda)(x, *others)


def modulate_fp8_picked(x: torch.Tensor, *others: Any) -> InFp8:
    """What runs eagerly, and behind `torch.ops.runtime.modulate_fp8`."""
    return pick(x, ref=modulate_fp8_ref, triton=modulate_fp8_triton if has_fp8(x.device) else None)(x, *others)


ARGUMENTS = "(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps, str norm)"
register(f"modulate{ARGUMENTS} -> Tensor", modulate_picked, lambda x, *_: x.new_empty(x.shape))
register(f"modulate_fp8{ARGUMENTS} -> (Tensor, Tensor)", modulate_fp8_picked, lambda x, *_: empty_in_fp8(x))


def modulate(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> torch.Tensor:
    """Return norm(x) * (1 + scale) + shift, [B, L, D]; ValueError for arguments that do not fit together."""
    expect_modulation(x, scale, shift, weight, bias, norm=norm)
    if is_opaque():
        return torch.ops.runtime.modulate(x, scale, shift, weight, bias, eps, norm)
    return modulate_picked(x, scale, shift, weight, bias, eps, norm)


def modulate_fp8(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> InFp8:
    """Return `modulate` of the same arguments per token in 8 bits: codes [B, L, D] e4m3, scale [B, L] float32."""
    expect_modulation(x, scale, shift, weight, bias, norm=norm)
    if is_opaque():
        return torch.ops.runtime.modulate_fp8(x, scale, shift, weight, bias, eps, norm)
    return modulate_fp8_picked(x, scale, shift, weight, bias, eps, norm)


def expect_modulation(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    norm: str = "layer",
) -> None:
    """Raise ValueError unless these are arguments of `modulate` that fit together."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; legal: {', '.join(NORMS)}")
    expect_floating("x", x)
    expect_shape("x", x, (None, None, None))
    expect_some("x", x, 2)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift are given together or not at all; only one of them was given")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            expect_groups(name, vector, x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            expect_shape(name, vector, (x.shape[2],))
    expect_device(x, scale=scale, shift=shift, weight=weight, bias=bias)
