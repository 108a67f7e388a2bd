"""attention_fp8: scaled dot-product attention with both products in 8-bit floating point.

    k           = k - mean of k over its tokens        # softmax does not see it, and the codes get its room
    q8, k8, v8  = q / sq, k / sk, v / sv               # to nearest in e4m3; a scale is a head's largest magnitude / 448
    s           = q8 k8^T * sq * sk * log2(e) / sqrt(K)
    level       = ceil(max of s over the keys) - 8
    p           = 2^(s - level)                        # at most 256
    out         = sv * e4m3(p) v8 / sum of p over the keys

q [B, L, N, K], k and v [B, S, N, K] in one float dtype (views are fine), L and S at least 1; returns [B, L, N * K] in
that dtype. A scale for each head is enough: codes have an exponent of their own, and keep all their bits down to 2^-14
of the largest number. Levels are whole powers of 2, so that a p rounded against the largest score of some keys has the
bits that it has against that of all: the numbers do not depend on tiles, down to 2^-14 of the largest p.

Sums are float32. Tensor cores of sm_89 and sm_90 keep only 13 or 14 bits of a sum in 8 bits; the Triton kernel takes
such a sum over one tile of keys at most, and adds it to a float32 one. An implementation is judged beside the
definition by the tolerance for 8 bits, as it may round a p otherwise whose score it has otherwise in its last bits.
Sources: centred keys, https://arxiv.org/abs/2410.02367; sums in two levels, https://arxiv.org/abs/2411.10958 and
https://arxiv.org/abs/2412.19437 (section 3.3.2); p up to 256, https://arxiv.org/abs/2407.08608.
"""

from __future__ import annotations

import math
from importlib import import_module

import torch

from .attention import why_absent
from .backend import (
    capability_of,
    has_fp8,
    is_forced,
    jit,
    launch,
    next_power_of_2,
    pick,
    register,
    tl,
)
from .checks import expect_device, expect_floating, expect_shape, expect_some
from .quantise_rows import LARGEST, SMALLEST
from .rows import on_e4m3_grid
from .tuning import tuned

E4M3 = torch.float8_e4m3fn
FA3 = "flash_attn_interface"  # the package of FlashAttention-3
SIZES = (64, 128)  # of heads, that the Triton version takes
TILE = 128  # codes are there for whole tiles of so many tokens
WATCHED = 512  # tokens that one program looks through for their head's range
SCORES = {"cpu": 2**22, "cuda": 2**28}  # that the reference holds at once

Codes = tuple[torch.Tensor, torch.Tensor]  # of a head's numbers, e4m3; what they are multiples of, [B, N] float32


def attention_fp8_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The definition: the very numbers of the 8-bit products, multiplied in float32; some queries at a time."""
    rows, length, heads, size = q.shape
    k = k.float() - k.float().mean(1, keepdim=True)
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (quantise_heads_ref(x) for x in (q, k, v))
    factor = (q_scale * k_scale * softmax_scale(size))[..., None, None]  # [B, N, 1, 1]
    keys, values = k8.float().permute(0, 2, 3, 1), v8.float().transpose(1, 2)
    out = torch.empty(rows, length, heads, size, dtype=q.dtype, device=q.device)
    at_once = max(1, SCORES.get(q.device.type, 2**22) // (rows * heads * k.shape[1]))
    for some, target in zip(q8.split(at_once, dim=1), out.split(at_once, dim=1), strict=True):
        s = some.float().transpose(1, 2) @ keys * factor  # [B, N, some of L, S]
        p = torch.exp2(s - (s.amax(3, keepdim=True).ceil() - 8.0))
        found = p.to(E4M3).float() @ values / p.sum(3, keepdim=True) * v_scale[..., None, None]
        target.copy_(found.transpose(1, 2))
    return out.flatten(2)


def quantise_heads_ref(x: torch.Tensor) -> Codes:
    """[B, L, N, K] in 8 bits, with a scale for each head."""
    scale = x.float().abs().amax((1, 3)).clamp(min=SMALLEST) * (1.0 / LARGEST)
    return (x.float() * (1.0 / scale)[:, None, :, None]).clamp(-LARGEST, LARGEST).to(E4M3), scale


def softmax_scale(size: int) -> float:
    """Return what scores are multiplied by, with log2(e) for exp2."""
    return size**-0.5 * math.log2(math.e)


@jit
def quantise_heads_range_kernel(
    x, found, x_row, x_token, x_head, length,
    K: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK tokens of a head: each channel's sum, least and largest, [B, N, programs, 3, K]."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    sizes, lanes = tl.arange(0, K), tl.arange(0, STEP)[:, None]
    start = block * BLOCK
    x += row * x_row + head.to(tl.int64) * x_head + start.to(tl.int64) * x_token + sizes[None, :]
    last = length - 1 - start
    total = tl.zeros((STEP, K), tl.float32)
    least, largest = tl.full((STEP, K), float("inf"), tl.float32), tl.full((STEP, K), float("-inf"), tl.float32)
    for first in range(0, BLOCK, STEP):
        tokens = first + lanes
        tile = tl.load(x + tl.minimum(tokens, last) * x_token).to(tl.float32)  # beyond the end: the last token again
        total += tl.where(tokens <= last, tile, 0.0)
        least, largest = tl.minimum(least, tile), tl.maximum(largest, tile)
    found += ((row * tl.num_programs(1) + head) * tl.num_programs(0) + block) * 3 * K + sizes
    tl.store(found, tl.sum(total, axis=0))
    tl.store(found + K, tl.min(least, axis=0))
    tl.store(found + 2 * K, tl.max(largest, axis=0))


@jit
def quantise_heads_kernel(
    x, centre, scale, out, x_row, x_token, x_head, length, padded,
    K: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK tokens of a head: codes [B, N, padded, K], or [B, N, K, padded]; zeros beyond the end."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = row * tl.num_programs(1) + head
    sizes, lanes = tl.arange(0, K)[None, :], tl.arange(0, BLOCK)[:, None]
    start = block * BLOCK
    x += row * x_row + head.to(tl.int64) * x_head + start.to(tl.int64) * x_token
    values = tl.load(x + tl.minimum(lanes, length - 1 - start) * x_token + sizes).to(tl.float32)
    if centre is not None:
        values = values - tl.load(centre + pair * K + sizes)
    values = values * tl.div_rn(1.0, tl.load(scale + pair))
    values = tl.where(lanes < length - start, on_e4m3_grid(tl.clamp(values, -448.0, 448.0)), 0.0)
    out += pair * padded * K
    if TRANSPOSED:
        tl.store(out + start + tl.trans(sizes) * padded + tl.trans(lanes), tl.trans(values).to(out.dtype.element_ty))
    else:
        tl.store(out + start.to(tl.int64) * K + lanes * K + sizes, values.to(out.dtype.element_ty))


@jit
def attention_fp8_kernel(
    q, k, v, q_scale, k_scale, v_scale, out,
    length, keys, heads, q_padded, padded, scale,
    K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, AHEAD: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One program per head and BLOCK_L queries, neighbours on the same keys.

    Keys beyond the end are zeros, as are their values: they score 0, add nothing to the sums, and are taken from the
    weights' total. They raise no level: keys are centred, so of any query's scores the largest is not below 0.
    """
    blocks = tl.cdiv(length, BLOCK_L)
    program = tl.program_id(0)
    pair = (program // blocks).to(tl.int64)
    row, head = pair // heads, pair % heads
    start = program % blocks * BLOCK_L
    sizes, lanes, tokens = tl.arange(0, K), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_L)
    q += (pair * q_padded + start) * K
    k += pair * padded * K
    v += pair * padded * K
    queries = tl.load(q + tokens[:, None] * K + sizes[None, :])
    factor = tl.load(q_scale + pair) * tl.load(k_scale + pair) * scale
    acc = tl.zeros((BLOCK_L, K), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)  # the largest product so far
    level = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    keys_tile = k + lanes[:, None] * K + sizes[None, :]
    if AHEAD:
        scores = tl.dot(queries, tl.trans(tl.load(keys_tile)))
    for first in range(0, keys, BLOCK_S):
        if AHEAD:  # the tensor cores take the next scores while these are weighed; behind the last, the last again
            keys_tile += tl.where(first + BLOCK_S < keys, BLOCK_S * K, 0)
            coming = tl.dot(queries, tl.trans(tl.load(keys_tile)))
        else:
            scores = tl.dot(queries, tl.trans(tl.load(keys_tile)))
            keys_tile += BLOCK_S * K
        top = tl.maximum(top, tl.max(scores, axis=1))
        above = tl.ceil(top * factor) - 8.0
        weights = tl.exp2(scores * factor - above[:, None])
        decay = tl.exp2(level - above)
        level = above
        total = total * decay + tl.sum(weights, axis=1)
        if ROUND:
            weights = on_e4m3_grid(weights)
        values = tl.load(v + sizes[:, None] * padded + lanes[None, :])
        # A sum of its own over these keys, and an addition: the tensor cores' sums are too coarse to go on with.
        part = tl.dot(weights.to(values.dtype), tl.trans(values), max_num_imprecise_acc=BLOCK_S)
        acc = acc * decay[:, None] + part
        v += BLOCK_S
        if AHEAD:
            scores = coming
    total -= (tl.cdiv(keys, BLOCK_S) * BLOCK_S - keys) * tl.exp2(-level)
    acc = acc * (tl.load(v_scale + pair) / total)[:, None]
    out += ((row * length + start) * heads + head) * K
    places = tokens[:, None] * heads * K + sizes[None, :]
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=(start + tokens < length)[:, None])


def quantise_heads_triton(x: torch.Tensor, *, centred: bool = False, transposed: bool = False) -> Codes:
    """Two passes over x [B, L, N, K], because a scale is known when all of its head was seen.

    Codes are [B, N, L', K], or [B, N, K, L'] if transposed, L' whole tiles; zeros beyond L.
    """
    rows, length, heads, size = x.shape
    x = x if x.stride(3) == 1 and x.stride(1) < 2**21 else x.contiguous()
    strides = {"x_row": x.stride(0), "x_token": x.stride(1), "x_head": x.stride(2), "length": length}
    blocks, tiles = -(-length // WATCHED), -(-length // TILE)
    ranges = torch.empty(rows, heads, blocks, 3, size, dtype=torch.float32, device=x.device)
    launch(
        quantise_heads_range_kernel,
        (blocks, heads, rows),
        {"x": x, "found": ranges, **strides},
        {"K": size, "BLOCK": WATCHED, "STEP": 32},
        num_warps=4,
    )
    least, largest = ranges[:, :, :, 1].amin(2), ranges[:, :, :, 2].amax(2)  # [B, N, K]
    centre = None
    if centred:
        centre = ranges[:, :, :, 0].sum(2) / length
        least, largest = least - centre, largest - centre
    scale = torch.maximum(-least, largest).amax(2).clamp(min=SMALLEST) * (1.0 / LARGEST)
    shape = (size, tiles * TILE) if transposed else (tiles * TILE, size)
    out = torch.empty(rows, heads, *shape, dtype=E4M3, device=x.device)
    launch(
        quantise_heads_kernel,
        (2 * tiles, heads, rows),
        {"x": x, "centre": centre, "scale": scale, "out": out, **strides, "padded": tiles * TILE},
        {"K": size, "BLOCK": TILE // 2, "TRANSPOSED": transposed},
        num_warps=8,
    )
    return out, scale


def attention_fp8_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Codes first, values with their tokens side by side, as tensor cores read 8 bits; from sm_89 on."""
    rows, length, heads, size = q.shape
    if size not in SIZES:
        raise ValueError(f"q has head size {size}; the Triton version takes 64 and 128")
    (q8, q_scale), (k8, k_scale) = quantise_heads_triton(q), quantise_heads_triton(k, centred=True)
    v8, v_scale = quantise_heads_triton(v, transposed=True)
    out = torch.empty(rows, length, heads, size, dtype=q.dtype, device=q.device)
    found = tuned("attention_fp8", key_of(q, k), q.device)
    block_l, block_s = found.get("block_l", 128), found.get("block_s", 64)
    ahead = found.get("ahead", (capability_of(q.device) or (0, 0))[0] == 9)  # whose products run beside what follows
    assert TILE % block_l == TILE % block_s == 0
    launch(
        attention_fp8_kernel,
        (-(-length // block_l) * heads * rows,),
        {
            "q": q8, "k": k8, "v": v8, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "out": out,
            "length": length, "keys": k.shape[1], "heads": heads, "q_padded": q8.shape[2], "padded": k8.shape[2],
            "scale": softmax_scale(size),
        },
        # The interpreter cuts numbers off where GPUs round them.
        {"K": size, "BLOCK_L": block_l, "BLOCK_S": block_s, "AHEAD": ahead, "ROUND": q.device.type == "cpu"},
        num_warps=found.get("num_warps", 8),
        num_stages=found.get("num_stages", 3),
    )  # fmt: skip
    return out.flatten(2)


def attention_fp8_fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention-3 on the same codes, with p up to 256 as well; its output is bfloat16.

    It goes on with the tensor cores' coarse sums over all keys (flash-attention pull request 2250), so it is taken only
    where `python -m tools.tune` found it near the definition, and faster.
    """
    (q8, q_scale), (k8, k_scale) = quantise_heads_triton(q), quantise_heads_triton(k, centred=True)
    v8, v_scale = quantise_heads_triton(v)
    q8, k8, v8 = (x8[:, :, : x.shape[1]].transpose(1, 2) for x8, x in ((q8, q), (k8, k), (v8, v)))
    out = import_module(FA3).flash_attn_func(q8, k8, v8, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
    return (out[0] if isinstance(out, tuple) else out).flatten(2).to(q.dtype)


def fa3_takes(q: torch.Tensor) -> bool:
    """Tell whether FlashAttention-3 is here, and its GPU."""
    capability = capability_of(q.device)
    return capability is not None and capability[0] == 9 and q.shape[3] in SIZES and why_absent(FA3) is None


def key_of(q: torch.Tensor, k: torch.Tensor) -> str:
    """Return a call's key in a tuned file: head size, L and S rounded up to powers of two."""
    return f"{q.shape[3]} {next_power_of_2(q.shape[1])} {next_power_of_2(k.shape[1])}"


def attention_fp8_picked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The forced implementation; else FlashAttention-3 where it was measured best, Triton's, and the reference."""
    if q.numel() == 0:
        return q.new_zeros(q.shape).flatten(2)
    found = tuned("attention_fp8", key_of(q, k), q.device)
    if not is_forced() and found.get("implementation") == "fa3" and fa3_takes(q):
        return attention_fp8_fa3(q, k, v)
    ours = attention_fp8_triton if has_fp8(q.device) and (is_forced() or q.shape[3] in SIZES) else None
    return pick(q, ref=attention_fp8_ref, triton=ours)(q, k, v)


register(
    "attention_fp8(Tensor q, Tensor k, Tensor v) -> Tensor",
    lambda *arguments: attention_fp8_picked(*arguments).contiguous(),
    lambda q, *_: q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3]),
)


def attention_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the attention of q over k and v in 8 bits, [B, L, N * K]; ValueError for what does not fit together."""
    expect_floating("q", q)
    expect_shape("q", q, (None, None, None, None))
    expect_some("q", q, 2, 3)
    expect_shape("k", k, (q.shape[0], None, *q.shape[2:]))
    expect_some("k", k, 1)
    expect_shape("v", v, tuple(k.shape))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected q's, {q.dtype}")
    expect_device(q, k=k, v=v)
    if torch.compiler.is_compiling():  # one node for every tracer: the definition takes some queries after others
        return torch.ops.runtime.attention_fp8(q, k, v)
    return attention_fp8_picked(q, k, v)
