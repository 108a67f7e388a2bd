"""linear_fp8: a linear layer in 8-bit floating point, one scale per row of either operand.

    x8, sx = quantise_rows(x)                        # sx = max|row| / 448, x8 = x / sx as e4m3, to nearest
    out    = (x8 @ weight_fp8.T) * sx * weight_scale + bias

x [..., D] any float dtype, quantised as it comes; weight_fp8 [E, D] torch.float8_e4m3fn and weight_scale [E] float32,
both from `quantise_rows(weight)` once; bias [E] in x's dtype or None; returns [..., E] in x's dtype. Sums are float32.
With `gelu` the layer reads GELU_tanh(x), computed where x is read to be quantised: the second one of a feed-forward.
Source: FP8 formats for deep learning, https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import capability_of, is_forced, is_opaque, jit, launch, next_power_of_2, pick, register, tl, triton
from .checks import expect_floating, expect_shape
from .mlp import linear_triton, rows_of
from .tuning import tuned

LARGEST = 448.0  # of e4m3
SMALLEST = 1e-12  # a row of zeros has a scale all the same


def quantise_rows_ref(x: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: x [T, D] -> e4m3 [T, D] and scale [T] float32."""
    values = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = values.abs().amax(1).clamp(min=SMALLEST) * (1.0 / LARGEST)
    quantised = (values * (1.0 / scale)[:, None]).clamp(-LARGEST, LARGEST)
    return quantised.to(torch.float8_e4m3fn), scale


@jit
def quantise_rows_kernel(x, out, scale, x_token, D: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: read it once, write half of it."""
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    values = tl.load(x + token * x_token + lanes, mask=lanes < D, other=0.0).to(tl.float32)
    if GELU:  # 0.5 x (1 + tanh u) = x sigmoid(2 u)
        values = values * tl.sigmoid(1.5957691216057308 * (values + 0.044715 * values * values * values))
    factor = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) * (1.0 / 448.0)
    quantised = tl.clamp(values * tl.div_rn(1.0, factor), -448.0, 448.0)
    # To nearest even on e4m3's own grid, 2^-3 of each number's power of two and at least 2^-9: then the cast is exact,
    # in Triton's interpreter too, which rounds otherwise.
    power = (quantised.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magic = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 * 2^20: its last bit is the grid's
    quantised = (quantised + magic) - magic
    tl.store(out + token * D + lanes, quantised.to(out.dtype.element_ty), mask=lanes < D)
    tl.store(scale + token, factor)


def quantise_rows_triton(x: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over x [T, D]; from sm_89 on."""
    tokens, width = x.shape
    x = rows_of(x)
    out = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = next_power_of_2(width)
    launch(
        quantise_rows_kernel,
        (tokens,),
        {"x": x, "out": out, "scale": scale, "x_token": x.stride(0)},
        {"D": width, "GELU": gelu, "BLOCK": block},
        num_warps=max(1, min(16, block // 512)),
    )
    return out, scale


def quantise_rows(x: torch.Tensor, *, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x, or GELU_tanh(x), [T, D] per row: e4m3 [T, D] and scale [T] float32; ValueError for other shapes."""
    expect_floating("x", x)
    expect_shape("x", x, (None, None))
    if x.numel() == 0:
        return x.new_zeros(x.shape, dtype=torch.float8_e4m3fn), x.new_ones(x.shape[0], dtype=torch.float32)
    return pick(x, ref=quantise_rows_ref, triton=quantise_rows_triton if has_fp8(x.device) else None)(x, gelu)


def has_fp8(device: torch.device) -> bool:
    """Tell whether Triton can make e4m3 numbers for a device: GPUs before sm_89 cannot."""
    return triton is not None and (capability_of(device) or (8, 9)) >= (8, 9)


def linear_fp8_ref(
    x: torch.Tensor, weight_fp8: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """The definition: the very numbers of the 8-bit product, multiplied in float32; runs anywhere."""
    quantised, scale = quantise_rows_ref(x.reshape(-1, x.shape[-1]), gelu)
    out = F.linear(quantised.float() * scale[:, None], weight_fp8.float() * weight_scale[:, None])
    out = out if bias is None else out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def linear_fp8_triton(
    x: torch.Tensor, weight_fp8: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """Quantiser, then the tiled product with both scales and the bias in its epilogue."""
    quantised, scale = quantise_rows_triton(x.reshape(-1, x.shape[-1]), gelu)
    scales = (scale, weight_scale.contiguous())
    return linear_triton(quantised, rows_of(weight_fp8), bias, scales=scales, dtype=x.dtype).view(*x.shape[:-1], -1)


def linear_fp8_cutlass(
    x: torch.Tensor, weight_fp8: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """PyTorch's row-wise product. Fast accumulation: its error is a hundredth of the quantiser's."""
    quantised, scale = quantise_rows(x.reshape(-1, x.shape[-1]), gelu=gelu)
    out = torch._scaled_mm(
        quantised,
        weight_fp8.T,
        scale_a=scale[:, None],
        scale_b=weight_scale[None, :],
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return out.view(*x.shape[:-1], -1)


def cutlass_takes(x: torch.Tensor, weight_fp8: torch.Tensor) -> bool:
    """Tell whether PyTorch's row-wise product takes the call: bfloat16 output, both widths multiples of 16."""
    capability = capability_of(x.device)
    return (
        capability is not None
        and capability >= (8, 9)
        and x.dtype == torch.bfloat16
        and weight_fp8.shape[0] % 16 == weight_fp8.shape[1] % 16 == 0
        and weight_fp8.is_contiguous()
    )


def linear_fp8_picked(
    x: torch.Tensor, weight_fp8: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """The forced implementation; else PyTorch's product where it takes the call, then Triton's, then the reference."""
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], weight_fp8.shape[0])
    found = tuned("linear_fp8", f"{x.shape[-1]} to {len(weight_fp8)}", x.device)
    ours_first = found.get("implementation") == "triton" and has_fp8(x.device)
    if not is_forced() and not ours_first and cutlass_takes(x, weight_fp8):
        return linear_fp8_cutlass(x, weight_fp8, weight_scale, bias, gelu)
    ours = linear_fp8_triton if has_fp8(x.device) else None
    return pick(x, ref=linear_fp8_ref, triton=ours)(x, weight_fp8, weight_scale, bias, gelu)


register(
    "linear_fp8(Tensor x, Tensor weight_fp8, Tensor weight_scale, Tensor? bias, bool gelu) -> Tensor",
    lambda *arguments: linear_fp8_picked(*arguments).contiguous(),
    lambda x, weight_fp8, *_: x.new_empty(*x.shape[:-1], weight_fp8.shape[0]),
)


def linear_fp8(
    x: torch.Tensor,
    weight_fp8: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gelu: bool = False,
) -> torch.Tensor:
    """Return x, or GELU_tanh(x), through a linear layer in 8 bits, [..., E]; ValueError for what does not fit."""
    expect_floating("x", x)
    if x.dim() < 1:
        raise ValueError("x is a scalar; expected [..., D]")
    expect_shape("weight_fp8", weight_fp8, (None, x.shape[-1]))
    expect_shape("weight_scale", weight_scale, (weight_fp8.shape[0],))
    for name, tensor, expected in (
        ("weight_fp8", weight_fp8, torch.float8_e4m3fn),
        ("weight_scale", weight_scale, torch.float32),
        ("bias", bias, x.dtype),
    ):
        if tensor is not None and tensor.dtype != expected:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected {expected}")
    if bias is not None:
        expect_shape("bias", bias, (weight_fp8.shape[0],))
    if is_opaque():
        return torch.ops.runtime.linear_fp8(x, weight_fp8, weight_scale, bias, gelu)
    return linear_fp8_picked(x, weight_fp8, weight_scale, bias, gelu)
