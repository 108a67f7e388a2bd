"""linear_fp8: a linear layer in 8-bit floating point, one scale per row of either operand.

    x8, sx = quantise_rows(x)                        # or given, as modulate_fp8 writes them
    out    = (x8 @ weight_fp8.T) * sx * weight_scale + bias

x [..., D] any float dtype, quantised as it comes, or torch.float8_e4m3fn with x_scale [...] float32; weight_fp8 [E, D]
torch.float8_e4m3fn and weight_scale [E] float32, both from `quantise_rows(weight)` once; bias [E] in the output's dtype
or None; returns [..., E] in x's dtype, or in `dtype`. Sums are float32.

With `gelu` the layer reads GELU_tanh(x), computed where x is read to be quantised: the second one of a feed-forward.
The epilogue of the first cannot do that: a row's scale is known once the row is whole, which no tile of a product has.
Scales per tile would save 4 of the 6 bytes that each inner number costs, but are other numbers than these, and no
row-wise product takes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import capability_of, has_fp8, is_forced, is_opaque, pick, register
from .checks import expect_device, expect_floating, expect_shape, expect_some
from .mlp import linear_triton, rows_of
from .quantise_rows import InFp8, quantise_rows_picked, quantise_rows_ref, quantise_rows_triton
from .tuning import tuned

E4M3 = torch.float8_e4m3fn


def linear_fp8_ref(
    x: torch.Tensor,
    weight_fp8: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool,
    x_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The definition: the very numbers of the 8-bit product, multiplied in float32; runs anywhere."""
    codes, scale = quantise_rows_ref(flat(x), gelu) if x_scale is None else given_rows(x, x_scale)
    out = F.linear(codes.float() * scale[:, None], weight_fp8.float() * weight_scale[:, None])
    out = out if bias is None else out + bias.float()
    return out.to(dtype).view(*x.shape[:-1], -1)


def linear_fp8_triton(
    x: torch.Tensor,
    weight_fp8: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool,
    x_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The tiled product with both scales and the bias in its epilogue, behind the quantiser."""
    codes, scale = quantise_rows_triton(flat(x), gelu) if x_scale is None else given_rows(x, x_scale)
    scales = (scale, weight_scale.contiguous())
    return linear_triton(rows_of(codes), rows_of(weight_fp8), bias, scales=scales, dtype=dtype).view(*x.shape[:-1], -1)


def linear_fp8_cutlass(
    x: torch.Tensor,
    weight_fp8: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool,
    x_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """PyTorch's row-wise product. Fast accumulation: its error is a hundredth of the quantiser's."""
    codes, scale = quantise_rows_picked(flat(x), gelu) if x_scale is None else given_rows(x, x_scale)
    out = torch._scaled_mm(
        codes.contiguous(),
        weight_fp8.T,
        scale_a=scale[:, None],
        scale_b=weight_scale[None, :],
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.view(*x.shape[:-1], -1)


def flat(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [T, D]."""
    return x.reshape(-1, x.shape[-1])


def given_rows(x: torch.Tensor, x_scale: torch.Tensor) -> InFp8:
    """Codes [..., D] and scales [...] -> [T, D], [T]."""
    return flat(x), x_scale.reshape(-1).contiguous()


def cutlass_takes(device: torch.device, weight_fp8: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tell whether PyTorch's row-wise product takes the call: bfloat16 output, both widths multiples of 16."""
    capability = capability_of(device)
    return (
        capability is not None
        and capability >= (8, 9)
        and dtype == torch.bfloat16
        and weight_fp8.shape[0] % 16 == weight_fp8.shape[1] % 16 == 0
        and weight_fp8.is_contiguous()
    )


def linear_fp8_picked(
    x: torch.Tensor,
    weight_fp8: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool,
    x_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The forced implementation; else PyTorch's product where it takes the call, then Triton's, then the reference."""
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], weight_fp8.shape[0], dtype=dtype)
    arguments = (x, weight_fp8, weight_scale, bias, gelu, x_scale, dtype)
    found = tuned("linear_fp8", f"{x.shape[-1]} to {len(weight_fp8)}", x.device)
    ours_first = found.get("implementation") == "triton" and has_fp8(x.device)
    if not is_forced() and not ours_first and cutlass_takes(x.device, weight_fp8, dtype):
        return linear_fp8_cutlass(*arguments)
    ours = linear_fp8_triton if has_fp8(x.device) else None
    return pick(x, ref=linear_fp8_ref, triton=ours)(*arguments)


register(
    "linear_fp8(Tensor x, Tensor weight_fp8, Tensor weight_scale, Tensor? bias, bool gelu, Tensor? x_scale, "
    "ScalarType dtype) -> Tensor",
    lambda *arguments: linear_fp8_picked(*arguments).contiguous(),
    lambda x, weight_fp8, *others: x.new_empty(*x.shape[:-1], weight_fp8.shape[0], dtype=others[-1]),
)


def linear_fp8(
    x: torch.Tensor,
    weight_fp8: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gelu: bool = False,
    x_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return x, or GELU_tanh(x), through a linear layer in 8 bits, [..., E]; ValueError for what does not fit.

    An x in 8 bits comes with its x_scale and with the output's dtype.
    """
    _expect_rows(x, x_scale, gelu, dtype)
    kind = x.dtype if dtype is None else dtype
    expect_shape("weight_fp8", weight_fp8, (None, x.shape[-1]))
    expect_some("weight_fp8", weight_fp8)
    expect_shape("weight_scale", weight_scale, (weight_fp8.shape[0],))
    for name, tensor, expected in (
        ("weight_fp8", weight_fp8, E4M3), ("weight_scale", weight_scale, torch.float32), ("bias", bias, kind),
    ):  # fmt: skip
        if tensor is not None and tensor.dtype != expected:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected {expected}")
    if bias is not None:
        expect_shape("bias", bias, (weight_fp8.shape[0],))
    expect_device(x, weight_fp8=weight_fp8, weight_scale=weight_scale, bias=bias, x_scale=x_scale)
    if is_opaque():
        return torch.ops.runtime.linear_fp8(x, weight_fp8, weight_scale, bias, gelu, x_scale, kind)
    return linear_fp8_picked(x, weight_fp8, weight_scale, bias, gelu, x_scale, kind)


def _expect_rows(x: torch.Tensor, x_scale: torch.Tensor | None, gelu: bool, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless x is float numbers, or e4m3 ones with all that these need."""
    expect_floating("x", x)
    if x.dim() < 1:
        raise ValueError("x is a scalar; expected [..., D]")
    if x_scale is None:
        if x.dtype == E4M3:
            raise ValueError("x is in 8 bits without x_scale; give the scale of each row, or x in another dtype")
        return
    if x.dtype != E4M3:
        raise ValueError(f"x has dtype {x.dtype}; expected {E4M3}, because x_scale is given")
    if gelu or dtype is None:
        raise ValueError("x is in 8 bits; expected no gelu, which was to be before its quantiser, and an output dtype")
    expect_shape("x_scale", x_scale, tuple(x.shape[:-1]))
    if x_scale.dtype != torch.float32:
        raise ValueError(f"x_scale has dtype {x_scale.dtype}; expected torch.float32")
