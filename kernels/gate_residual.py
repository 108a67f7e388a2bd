"""gate_residual: add a gated branch to the residual stream, alone or fused with the norm that follows.

    out = x + gate * y
    h   = modulate(out, scale, shift)          # gate_residual_modulate returns (out, h)
    codes, row_scale = quantise_rows(h)        # gate_residual_modulate_fp8 returns (out, codes, row_scale)

x, y [B, L, D] any float dtype (x may be one row expanded to B); gate [1 or B, M, D] float32 (None: a plain sum);
scale, shift, weight, bias as of `modulate`; out and h [B, L, D] in x's dtype, codes and row_scale as of `modulate_fp8`.
Arithmetic is float32; h is computed from the rounded out, as if in two steps.
"""

from __future__ import annotations

from typing import Any

import torch

from .backend import has_fp8, is_opaque, jit, launch, pick, register, tl
from .checks import expect_device, expect_floating, expect_groups, expect_shape, expect_some
from .cuda import gate_residual_cuda, gate_residual_modulate_cuda
from .modulate import adapted, expect_modulation, modulate_fp8_ref, modulate_ref, normalised
from .quantise_rows import empty_in_fp8
from .rows import lanes_of, load_token, store_in_8_bits, store_token, tiles_of
from .tuning import tuned


def gate_residual_ref(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """The definition, float32 inside."""
    if gate is None:
        return (x + y).to(x.dtype)
    if gate.shape[1] == 1:
        return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)
    groups = (gate.shape[1], x.shape[1] // gate.shape[1])
    wide_x, wide_y = x.float().unflatten(1, groups), y.float().unflatten(1, groups)
    return torch.addcmul(wide_x, wide_y, gate.unsqueeze(2)).flatten(1, 2).to(x.dtype)


def gate_residual_modulate_ref(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: one after the other."""
    out = gate_residual_ref(x, y, gate)
    return out, modulate_ref(out, scale, shift, weight, bias, eps, "layer")


def gate_residual_modulate_fp8_ref(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition: one after the other."""
    out = gate_residual_ref(x, y, gate)
    return out, *modulate_fp8_ref(out, scale, shift, weight, bias, eps, "layer")


@jit
def gate_residual_kernel(
    x, y, gate, scale, shift, weight, bias, out, h, row_scale,
    x_row, x_token, y_row, y_token, gate_row, vector_row, length, gate_group, group, eps,
    D: tl.constexpr, BODY: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program per token, in two tiles: read both once, write the sum once, and its norm too where `h` is given.

    The norm is in 8 bits where `row_scale` is given.
    """
    token = tl.program_id(0)
    row = (token // length).to(tl.int64)
    place = token % length
    far = place.to(tl.int64)
    body, tail = lanes_of(BODY, TAIL)
    a, b = load_token(x + row * x_row + far * x_token, body, tail, D)
    c, d = load_token(y + row * y_row + far * y_token, body, tail, D)
    if gate is not None:
        gates = gate + row * gate_row + (place // gate_group).to(tl.int64) * D
        c = c * tl.load(gates + body, mask=body < D, other=0.0)
        d = d * tl.load(gates + tail, mask=tail < D, other=0.0)
    kind = out.dtype.element_ty
    a, b = (a + c).to(kind), (b + d).to(kind)
    target = token.to(tl.int64) * D
    store_token(out + target, a, b, body, tail, D)
    if h is not None:
        vector = row * vector_row + (place // group).to(tl.int64) * D
        c, d = normalised(a.to(tl.float32), b.to(tl.float32), body, tail, eps, D, False)
        c = adapted(c, body, vector, scale, shift, weight, bias, D)
        d = adapted(d, tail, vector, scale, shift, weight, bias, D)
        if row_scale is None:
            store_token(h + target, c, d, body, tail, D)
        else:
            store_in_8_bits(h + target, row_scale + token, c, d, body, tail, D)


def gate_residual_triton(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """One pass: reads 2, writes 1."""
    return _launch("gate_residual", x, y, gate, None, None, (None, None, None, None, 0.0))


def gate_residual_modulate_triton(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, *adaptation: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass: reads 2, writes 2."""
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launch("gate_residual_modulate", x, y, gate, h, None, adaptation), h


def gate_residual_modulate_fp8_triton(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, *adaptation: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pass: reads 2, writes one and a half of a 16-bit dtype; from sm_89 on."""
    codes, row_scale = empty_in_fp8(x)
    return _launch("gate_residual_modulate_fp8", x, y, gate, codes, row_scale, adaptation), codes, row_scale


def _launch(
    operation: str,
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    h: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    adaptation: tuple[Any, ...],
) -> torch.Tensor:
    """Launch any form and return out; `adaptation` is scale, shift, weight, bias and eps.

    Last dimensions and vectors are contiguous, or are made so.
    """
    rows, length, width = x.shape
    x, y = (each if each.stride(2) == 1 else each.contiguous() for each in (x, y))
    gate, scale, shift, weight, bias = (
        None if vector is None else vector.contiguous() for vector in (gate, *adaptation[:4])
    )
    out = torch.empty(rows, length, width, dtype=x.dtype, device=x.device)
    body, tail, warps = tiles_of(width)
    launch(
        gate_residual_kernel,
        (rows * length,),
        {
            "x": x, "y": y, "gate": gate, "scale": scale, "shift": shift, "weight": weight, "bias": bias,
            "out": out, "h": h, "row_scale": row_scale,
            "x_row": x.stride(0), "x_token": x.stride(1), "y_row": y.stride(0), "y_token": y.stride(1),
            "gate_row": 0 if gate is None or gate.shape[0] == 1 else gate.stride(0),
            "vector_row": 0 if scale is None or scale.shape[0] == 1 else scale.stride(0),
            "length": length,
            "gate_group": 1 if gate is None else length // gate.shape[1],
            "group": 1 if scale is None else length // scale.shape[1],
            "eps": adaptation[4],
        },
        {"D": width, "BODY": body, "TAIL": tail},
        num_warps=tuned(operation, str(width), x.device).get("num_warps", warps),
    )  # fmt: skip
    return out


def gate_residual_picked(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """What runs eagerly, and behind `torch.ops.runtime.gate_residual`."""
    found = tuned("gate_residual", str(x.shape[2]), x.device)
    return pick(x, found, ref=gate_residual_ref, triton=gate_residual_triton, cuda=gate_residual_cuda)(x, *others)


def gate_residual_modulate_picked(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What runs eagerly, and behind `torch.ops.runtime.gate_residual_modulate`."""
    found = tuned("gate_residual_modulate", str(x.shape[2]), x.device)
    chosen = pick(
        x, found, ref=gate_residual_modulate_ref, triton=gate_residual_modulate_triton, cuda=gate_residual_modulate_cuda
    )
    return chosen(x, *others)


def gate_residual_modulate_fp8_picked(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What runs eagerly, and behind `torch.ops.runtime.gate_residual_modulate_fp8`."""
    ours = gate_residual_modulate_fp8_triton if has_fp8(x.device) else None
    return pick(x, ref=gate_residual_modulate_fp8_ref, triton=ours)(x, *others)


ARGUMENTS = "(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps)"
register(
    "gate_residual(Tensor x, Tensor y, Tensor? gate) -> Tensor",
    lambda *arguments: gate_residual_picked(*arguments).contiguous(),
    lambda x, *_: x.new_empty(x.shape),
)
register(
    f"gate_residual_modulate{ARGUMENTS} -> (Tensor, Tensor)",
    lambda *arguments: tuple(each.contiguous() for each in gate_residual_modulate_picked(*arguments)),
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
register(
    f"gate_residual_modulate_fp8{ARGUMENTS} -> (Tensor, Tensor, Tensor)",
    lambda *arguments: tuple(each.contiguous() for each in gate_residual_modulate_fp8_picked(*arguments)),
    lambda x, *_: (x.new_empty(x.shape), *empty_in_fp8(x)),
)


def gate_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """Return x + gate * y, [B, L, D]; ValueError for shapes that do not fit together."""
    _expect_sum(x, y, gate)
    if is_opaque():
        return torch.ops.runtime.gate_residual(x, y, gate)
    return gate_residual_picked(x, y, gate)


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
    _expect_sum(x, y, gate, scale, shift, weight, bias)
    if is_opaque():
        return torch.ops.runtime.gate_residual_modulate(x, y, gate, scale, shift, weight, bias, eps)
    return gate_residual_modulate_picked(x, y, gate, scale, shift, weight, bias, eps)


def gate_residual_modulate_fp8(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x + gate * y [B, L, D], and `modulate_fp8` of it: codes [B, L, D], scale [B, L]; ValueError likewise."""
    _expect_sum(x, y, gate, scale, shift, weight, bias)
    if is_opaque():
        return torch.ops.runtime.gate_residual_modulate_fp8(x, y, gate, scale, shift, weight, bias, eps)
    return gate_residual_modulate_fp8_picked(x, y, gate, scale, shift, weight, bias, eps)


def _expect_sum(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, *modulation: torch.Tensor | None) -> None:
    """Raise ValueError unless the three fit together, and with scale, shift, weight and bias where these are given."""
    expect_floating("x", x)
    expect_shape("x", x, (None, None, None))
    expect_some("x", x, 2)
    expect_floating("y", y)
    expect_shape("y", y, tuple(x.shape))
    if gate is not None:
        expect_groups("gate", gate, x)
    expect_device(x, y=y, gate=gate)
    if modulation:
        expect_modulation(x, *modulation)
