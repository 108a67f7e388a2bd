"""quantise_rows: rows of numbers as 8-bit floating point, with one scale for each.

    scale = max|row| / 448        # 448 is e4m3's largest number
    codes = row / scale           # as e4m3, to nearest

x [T, D] any float dtype, or GELU_tanh(x) with `gelu`, computed where x is read; returns codes [T, D]
torch.float8_e4m3fn and scale [T] float32. Arithmetic is float32.
Source: FP8 formats for deep learning, https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .activations import gelu_tanh
from .backend import has_fp8, is_opaque, jit, launch, pick, register, tl
from .checks import expect_floating, expect_shape, expect_some
from .rows import lanes_of, load_token, store_in_8_bits, tiles_of
from .tuning import tuned

LARGEST = 448.0  # of e4m3
SMALLEST = 1e-12  # a row of zeros has a scale all the same

InFp8 = tuple[torch.Tensor, torch.Tensor]  # codes [..., D] e4m3, and the scale [...] of each row


def empty_in_fp8(x: torch.Tensor) -> InFp8:
    """Return memory for all rows of x [..., D] in 8 bits: codes, and a scale for each."""
    return (
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )


def quantise_rows_ref(x: torch.Tensor, gelu: bool) -> InFp8:
    """The definition."""
    values = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = values.abs().amax(1).clamp(min=SMALLEST) * (1.0 / LARGEST)
    quantised = (values * (1.0 / scale)[:, None]).clamp(-LARGEST, LARGEST)
    return quantised.to(torch.float8_e4m3fn), scale


@jit
def quantise_rows_kernel(
    x, out, scale, x_token,
    D: tl.constexpr, GELU: tl.constexpr, BODY: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program per row, in two tiles: read it once, write half of it."""
    token = tl.program_id(0).to(tl.int64)
    body, tail = lanes_of(BODY, TAIL)
    a, b = load_token(x + token * x_token, body, tail, D)
    if GELU:
        a, b = gelu_tanh(a), gelu_tanh(b)
    store_in_8_bits(out + token * D, scale + token, a, b, body, tail, D)


def quantise_rows_triton(x: torch.Tensor, gelu: bool) -> InFp8:
    """One pass over x, whose last dimension is contiguous or is made so; from sm_89 on."""
    tokens, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out, scale = empty_in_fp8(x)
    body, tail, warps = tiles_of(width)
    launch(
        quantise_rows_kernel,
        (tokens,),
        {"x": x, "out": out, "scale": scale, "x_token": x.stride(0)},
        {"D": width, "GELU": gelu, "BODY": body, "TAIL": tail},
        num_warps=tuned("quantise_rows", str(width), x.device).get("num_warps", warps),
    )
    return out, scale


def quantise_rows_picked(x: torch.Tensor, gelu: bool) -> InFp8:
    """What runs eagerly, and behind `torch.ops.runtime.quantise_rows`."""
    if x.numel() == 0:
        return x.new_zeros(x.shape, dtype=torch.float8_e4m3fn), x.new_ones(x.shape[0], dtype=torch.float32)
    return pick(x, ref=quantise_rows_ref, triton=quantise_rows_triton if has_fp8(x.device) else None)(x, gelu)


register(
    "quantise_rows(Tensor x, bool gelu) -> (Tensor, Tensor)", quantise_rows_picked, lambda x, gelu: empty_in_fp8(x)
)


def quantise_rows(x: torch.Tensor, *, gelu: bool = False) -> InFp8:
    """Quantise x, or GELU_tanh(x), [T, D] per row: e4m3 [T, D] and scale [T] float32; ValueError for other shapes."""
    expect_floating("x", x)
    expect_shape("x", x, (None, None))
    expect_some("x", x, 1)
    if is_opaque():
        return torch.ops.runtime.quantise_rows(x, gelu)
    return quantise_rows_picked(x, gelu)
