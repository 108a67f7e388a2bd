"""mlp: the feed-forward of a block, alone or with the gated residual that follows.

    y   = GELU_tanh(x @ w_in.T + b_in) @ w_out.T + b_out
    out = y, or residual + gate * y

x [B, L, D]; w_in [E, D], b_in [E]; w_out [D', E], b_out [D'] (E the inner width), all in one dtype; residual
[B, L, D'] in that dtype or None; gate [1 or B, M, D'] float32, one vector per L/M consecutive tokens, or None for 1;
returns [B, L, D'] in x's dtype. The residual is added in float32.

Both passes over the inner width that an elementwise GELU would take are saved by the first product's epilogue.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .activations import gelu_tanh
from .backend import is_forced, is_opaque, jit, launch, pick, register, tl, triton
from .checks import expect_device, expect_floating, expect_groups, expect_shape, expect_some
from .gate_residual import gate_residual
from .tuning import tuned


def mlp_ref(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """The definition, in x's dtype with the matrix products' own accumulation."""
    y = F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)
    return y if residual is None else gate_residual(residual, y, gate)


def mlp_onednn(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """The same on a CPU: GELU in the first product's epilogue, a third off that product against a pass of its own."""
    inner = torch.ops.mkldnn._linear_pointwise(x, w_in, b_in, "gelu", [], "tanh")
    y = F.linear(inner, w_out, b_out)
    return y if residual is None else gate_residual(residual, y, gate)


def mlp_cublas(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """GELU in cublasLt's epilogue, the tanh form on CUDA only (on a CPU the same call computes the erf form)."""
    rows, length, width = x.shape
    inner = torch._addmm_activation(b_in, x.reshape(-1, width), w_in.T, use_gelu=True)
    y = F.linear(inner, w_out, b_out).view(rows, length, -1)
    return y if residual is None else gate_residual(residual, y, gate)


@jit
def linear_kernel(
    x, weight, x_scale, weight_scale, bias, residual, gate, out,
    tokens, x_token, weight_row, length, group, gate_row,
    FEATURES: tl.constexpr, INNER: tl.constexpr, GELU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_I: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """One program per tile [BLOCK_T, BLOCK_F] of x @ weight.T; neighbours share their operands in the L2 cache.

    The epilogue, in float32 and in this order: both scales, bias, GELU, gate, residual; each may be absent.
    """
    program = tl.program_id(0)
    down, across = tl.cdiv(tokens, BLOCK_T), tl.cdiv(FEATURES, BLOCK_F)
    band = program // (SWIZZLE * across) * SWIZZLE
    high = tl.minimum(down - band, SWIZZLE)
    start = (band + program % (SWIZZLE * across) % high) * BLOCK_T
    first = program % (SWIZZLE * across) // high * BLOCK_F
    # Rows beyond the end repeat the last one, so that loads need no mask; they are not stored.
    lanes_t = tl.minimum(start + tl.arange(0, BLOCK_T), tokens - 1) - start
    lanes_f = tl.minimum(first + tl.arange(0, BLOCK_F), FEATURES - 1) - first
    lanes_i = tl.arange(0, BLOCK_I)
    x += start.to(tl.int64) * x_token
    weight += first.to(tl.int64) * weight_row
    acc = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for done in range(0, INNER, BLOCK_I):
        if INNER % BLOCK_I == 0:
            x_tile = tl.load(x + lanes_t[:, None] * x_token + lanes_i[None, :])
            weight_tile = tl.load(weight + lanes_f[:, None] * weight_row + lanes_i[None, :])
        else:
            inside = (lanes_i < INNER - done)[None, :]
            x_tile = tl.load(x + lanes_t[:, None] * x_token + lanes_i[None, :], mask=inside, other=0.0)
            weight_tile = tl.load(weight + lanes_f[:, None] * weight_row + lanes_i[None, :], mask=inside, other=0.0)
        acc = tl.dot(x_tile, tl.trans(weight_tile), acc, input_precision="ieee")
        x += BLOCK_I
        weight += BLOCK_I
    # Bases are 64-bit scalars and offsets inside a tile 32-bit: 64-bit offsets would spill.
    lanes = tl.arange(0, BLOCK_F)
    feature, token = first + lanes, start + lanes_t
    inside = feature < FEATURES
    if x_scale is not None:
        acc = acc * tl.load(x_scale + token)[:, None]
    if weight_scale is not None:
        acc = acc * tl.load(weight_scale + feature, mask=inside, other=0.0)[None, :]
    if bias is not None:
        acc = acc + tl.load(bias + feature, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu_tanh(acc)
    stored = (start + tl.arange(0, BLOCK_T) < tokens)[:, None] & inside[None, :]
    if gate is not None:
        base = (start // length).to(tl.int64) * gate_row + start % length // group * FEATURES
        vector = (token // length).to(tl.int64) * gate_row + token % length // group * FEATURES - base
        gates = gate + (base + first) + (vector.to(tl.int32)[:, None] + lanes[None, :])
        acc = acc * tl.load(gates, mask=stored, other=0.0)
    corner = start.to(tl.int64) * FEATURES + first
    place = lanes_t[:, None] * FEATURES + lanes[None, :]
    if residual is not None:
        acc = acc + tl.load(residual + corner + place, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + corner + place, acc.to(out.dtype.element_ty), mask=stored)


def linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    length: int = 1,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return epilogue(x @ weight.T), [T, F], of x [T, I] and weight [F, I], last dimensions contiguous.

    `scales` are x's per row and the weight's per row, float32; residual [T, F]; gate [1 or T/length, M, F].
    """
    tokens, inner = x.shape
    features = weight.shape[0]
    out = torch.empty(tokens, features, dtype=dtype or x.dtype, device=x.device)
    gate = None if gate is None else gate.contiguous()
    # 128 bytes deep: one shared-memory line; three stages of both operands are 96 KiB, which every GPU has.
    found = tuned("linear", f"{inner} to {features} {8 * x.element_size()}", x.device)
    block_t, block_f = found.get("block_t", 128), found.get("block_f", 128)
    block_i = found.get("block_i", 128 // x.element_size())
    launch(
        linear_kernel,
        (-(-tokens // block_t) * -(-features // block_f),),
        {
            "x": x, "weight": weight, "x_scale": scales and scales[0], "weight_scale": scales and scales[1],
            "bias": bias, "residual": residual, "gate": gate, "out": out,
            "tokens": tokens, "x_token": x.stride(0), "weight_row": weight.stride(0),
            "length": length, "group": 1 if gate is None else length // gate.shape[1],
            "gate_row": 0 if gate is None or gate.shape[0] == 1 else gate.stride(0),
        },
        {
            "FEATURES": features, "INNER": inner, "GELU": gelu,
            "BLOCK_T": block_t, "BLOCK_F": block_f, "BLOCK_I": block_i, "SWIZZLE": 8,
        },
        num_warps=found.get("num_warps", 8),
        num_stages=found.get("num_stages", 3),
    )  # fmt: skip
    return out


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [T, D], last dimension contiguous, or made so."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) < 2**23 else x.contiguous()


def mlp_triton(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """Two products, each with its epilogue. float32 is for the interpreter: no tensor core computes it exactly."""
    rows, length, _ = x.shape
    inner = linear_triton(rows_of(x), rows_of(w_in), b_in, gelu=True)
    residual = None if residual is None else rows_of(residual).contiguous()
    out = linear_triton(inner, rows_of(w_out), b_out, residual=residual, gate=gate, length=length)
    return out.view(rows, length, -1)


def mlp_picked(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """The forced implementation; else cublasLt's epilogue on a GPU, oneDNN's on a CPU, and the reference.

    cublasLt stays ahead of our Triton product until a measurement on a GPU says otherwise.
    """
    arguments = (x, w_in, b_in, w_out, b_out, residual, gate)
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:2], w_out.shape[0])
    if not is_forced():
        if x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16):
            ours = tuned("mlp", f"{x.shape[2]} by {len(w_in)}", x.device).get("implementation") == "triton"
            return (mlp_triton if ours and triton is not None else mlp_cublas)(*arguments)
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return mlp_onednn(*arguments)
        return mlp_ref(*arguments)
    return pick(x, ref=mlp_ref, triton=mlp_triton if triton is not None else None)(*arguments)


register(
    "mlp(Tensor x, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, Tensor? residual, Tensor? gate) -> Tensor",
    lambda *arguments: mlp_picked(*arguments).contiguous(),
    lambda x, w_in, b_in, w_out, *_: x.new_empty(*x.shape[:2], w_out.shape[0]),
)


def mlp(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the feed-forward of x, [B, L, D'], or residual + gate times it.

    ValueError for shapes and dtypes that do not fit together, and for a gate without a residual.
    """
    expect_floating("x", x)
    expect_shape("x", x, (None, None, None))
    expect_shape("w_in", w_in, (None, x.shape[2]))
    expect_shape("b_in", b_in, (w_in.shape[0],))
    expect_shape("w_out", w_out, (None, w_in.shape[0]))
    expect_shape("b_out", b_out, (w_out.shape[0],))
    expect_some("w_in", w_in)
    expect_some("w_out", w_out)
    if residual is not None:
        expect_shape("residual", residual, (*x.shape[:2], w_out.shape[0]))
    if gate is not None:
        if residual is None:
            raise ValueError("gate is given without residual; give both, or residual alone")
        expect_groups("gate", gate, residual)
        if gate.dtype != torch.float32:
            raise ValueError(f"gate has dtype {gate.dtype}; expected torch.float32")
    for name, tensor in (
        ("w_in", w_in), ("b_in", b_in), ("w_out", w_out), ("b_out", b_out), ("residual", residual),
    ):  # fmt: skip
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected x's, {x.dtype}")
    expect_device(x, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out, residual=residual, gate=gate)
    if is_opaque():
        return torch.ops.runtime.mlp(x, w_in, b_in, w_out, b_out, residual, gate)
    return mlp_picked(x, w_in, b_in, w_out, b_out, residual, gate)
