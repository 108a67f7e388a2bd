"""attention: scaled dot-product attention without causality.

    out = softmax(q k^T / sqrt(K) + bias) v

q [B, L, N, K], k and v [B, S, N, K] (views are fine), bias [B or 1, 1, 1, S] in q's dtype or None; returns
[B, L, N * K] in q's dtype. Rows whose keys are all masked by -inf are zero.

On an NVIDIA GPU one of CORES computes it: the one that kernels/tuned/<gpu>.json names for the shape, else the first of
a fixed order that takes the call. Nothing is timed here.
Source of the Triton kernel: online softmax, https://arxiv.org/abs/2205.14135 and https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backend import capability_of, is_forced, is_opaque, jit, launch, next_power_of_2, pick, register, tl, triton
from .checks import expect_device, expect_floating, expect_shape, expect_some
from .tuning import gpu_of, table, tuned

HALVES = (torch.float16, torch.bfloat16)


def attention_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, by PyTorch's own attention."""
    if bias is not None and torch.compiler.is_compiling():
        bias = bias.expand(-1, -1, q.shape[1], -1)  # other formats broadcast a bias over heads, not over queries
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


@jit
def scores_of(queries, k):
    """The scores [BLOCK_L, BLOCK_S] of the tile of keys that k points to, not scaled yet."""
    return tl.dot(queries, tl.trans(tl.load(k)), input_precision="ieee")


@jit
def absorb(scores, v, bias, inside, scale, acc, total, top):
    """Take one tile's scores and values into acc [BLOCK_L, K], its weights' total and the top score so far.

    `scale` carries log2(e) for exp2; v and bias point to the tile's, `inside` tells which keys there are; bias and
    `inside` may be None.
    """
    values = tl.load(v)
    unit = scale
    if bias is not None:
        scores = scores * scale + (tl.load(bias, mask=inside).to(tl.float32) * 1.4426950408889634)[None, :]
        unit = 1.0
    if inside is not None:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    above = tl.maximum(top, tl.max(scores, axis=1) * unit)
    level = above
    if bias is not None:
        level = tl.where(above == float("-inf"), 0.0, above)  # all masked so far: -inf - -inf would be NaN
    weights = tl.exp2(scores * unit - level[:, None])  # the instruction that subtracts also scales
    decay = tl.exp2(top - level)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return acc, total * decay + tl.sum(weights, axis=1), above


@jit
def attention_kernel(
    q, k, v, bias, out,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, bias_row,
    length, keys, heads, scale,
    K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program per head and BLOCK_L queries, neighbours on the same keys; `scale` carries log2(e) for exp2.

    With AHEAD the next tile's scores are under way while this tile's become weights; one tile of them is never used.
    """
    blocks = tl.cdiv(length, BLOCK_L)
    program = tl.program_id(0)
    pair = (program // blocks).to(tl.int64)
    row, head = pair // heads, pair % heads
    start = program % blocks * BLOCK_L
    sizes = tl.arange(0, K)[None, :]
    lanes = tl.arange(0, BLOCK_S)
    tokens = tl.arange(0, BLOCK_L)[:, None]
    # Bases are 64-bit scalars and offsets inside a tile 32-bit: half the registers of 64-bit offsets.
    q += row * q_row + head * q_head + start.to(tl.int64) * q_token
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    out += ((row * length + start) * heads + head) * K
    queries = tl.load(q + tokens * q_token + sizes, mask=start + tokens < length, other=0.0)
    if bias is not None:
        bias += row * bias_row + lanes
    acc = tl.zeros((BLOCK_L, K), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    whole = keys // BLOCK_S * BLOCK_S
    if AHEAD:
        scores = scores_of(queries, k + tl.minimum(lanes, keys - 1)[:, None] * k_token + sizes)
    for first in range(0, whole, BLOCK_S):  # without masks, which every score would pay for
        if AHEAD:
            step = tl.where(first + BLOCK_S < whole, BLOCK_S, 0) * k_token
            following = scores_of(queries, k + step + lanes[:, None] * k_token + sizes)
        else:
            scores = scores_of(queries, k + lanes[:, None] * k_token + sizes)
        v_tile = v + lanes[:, None] * v_token + sizes
        acc, total, top = absorb(scores, v_tile, bias, None, scale, acc, total, top)
        if AHEAD:
            scores = following
        k += BLOCK_S * k_token
        v += BLOCK_S * v_token
        if bias is not None:
            bias += BLOCK_S
    if whole < keys:
        inside = lanes < keys - whole
        rows = tl.minimum(lanes, keys - whole - 1)[:, None]  # beyond the end: the last key again, masked
        scores = scores_of(queries, k + rows * k_token + sizes)
        acc, total, top = absorb(scores, v + rows * v_token + sizes, bias, inside, scale, acc, total, top)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + tokens * heads * K + sizes, acc.to(out.dtype.element_ty), mask=start + tokens < length)


def attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Each head's keys and values stay in the L2 cache while its queries pass; its tiles fit every GPU from sm_80 on.

    Last dimensions are contiguous, or are made so. float32 is for the interpreter: no tensor core computes it exactly.
    """
    rows, length, heads, size = q.shape
    if size not in (64, 128):
        raise ValueError(f"q has head size {size}; the Triton version takes 64 and 128")
    q, k, v = (x if x.stride(3) == 1 and x.stride(1) < 2**23 else x.contiguous() for x in (q, k, v))
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(rows, length, heads, size, dtype=q.dtype, device=q.device)
    # Where products take their operands from registers, 64 keys would spill some.
    shared = (capability_of(q.device) or (9, 0))[0] in (9, 10)
    block_l, block_s = (64, 32) if q.dtype == torch.float32 else (128, 64 if shared else 32)
    found = tuned("attention_triton", f"{size} {q.element_size()}", q.device)
    block_l, block_s = found.get("block_l", block_l), found.get("block_s", block_s)
    launch(
        attention_kernel,
        (-(-length // block_l) * heads * rows,),
        {
            "q": q, "k": k, "v": v, "bias": bias, "out": out,
            "q_row": q.stride(0), "q_token": q.stride(1), "q_head": q.stride(2),
            "k_row": k.stride(0), "k_token": k.stride(1), "k_head": k.stride(2),
            "v_row": v.stride(0), "v_token": v.stride(1), "v_head": v.stride(2),
            "bias_row": 0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
            "length": length, "keys": k.shape[1], "heads": heads, "scale": size**-0.5 * math.log2(math.e),
        },
        {"K": size, "BLOCK_L": block_l, "BLOCK_S": block_s, "AHEAD": found.get("ahead", False)},
        num_warps=found.get("num_warps", 8),
        num_stages=found.get("num_stages", 3),
    )  # fmt: skip
    return out.flatten(2)


@dataclass(frozen=True)
class Call:
    """What decides which core computes a call."""

    rows: int
    length: int
    keys: int
    heads: int
    size: int
    dtype: torch.dtype
    biased: bool
    capability: tuple[int, int]  # (0, 0) without a GPU

    @property
    def half(self) -> bool:
        """Whether it is in a 16-bit dtype on a GPU that has bfloat16, which all fast cores need."""
        return self.dtype in HALVES and self.capability >= (8, 0)

    @property
    def key(self) -> str:
        """Its key in a tuned file: head size, dtype, biased or plain, L and S rounded up to powers of two."""
        kind = "biased" if self.biased else "plain"
        rounded = f"{next_power_of_2(self.length)} {next_power_of_2(self.keys)}"
        return f"{self.size} {str(self.dtype).removeprefix('torch.')} {kind} {rounded}"


def call_of(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None) -> Call:
    """Describe a call."""
    rows, length, heads, size = q.shape
    return Call(rows, length, k.shape[1], heads, size, q.dtype, bias is not None, capability_of(q.device) or (0, 0))


@dataclass(frozen=True)
class Core:
    """One way to compute attention: what it takes, and the package that it needs besides PyTorch."""

    run: Callable[..., torch.Tensor]  # (q, k, v, bias) -> [B, L, N * K]
    can: Callable[[Call], bool]
    package: str | None = None


def sdpa(kernel: SDPBackend) -> Callable[..., torch.Tensor]:
    """PyTorch's attention by one of its kernels."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if kernel == SDPBackend.CUDNN_ATTENTION and 0 in q.stride():  # one x for both guidance branches
            q = q.contiguous()
        with sdpa_kernel(kernel):
            return attention_ref(q, k, v, bias)

    return run


def packaged(module: str, function: str, **options: Any) -> Callable[..., torch.Tensor]:
    """A function (q, k, v) of an installed package that takes and returns [B, L, N, K]."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: None) -> torch.Tensor:
        out = getattr(import_module(module), function)(q, k, v, **options)
        return (out[0] if isinstance(out, tuple) else out).flatten(2)  # some versions add the log-sum-exp

    return run


# cuDNN takes a bias only per query and key, not broadcast over them; flash kernels take none. The FA3 and FA4 packages
# are called themselves: torch.nn.attention.activate_flash_attention_impl would change "flash" for the whole process.
# FA3's own 8 bits are another operation, attention_fp8.
CORES: dict[str, Core] = {
    "cudnn": Core(
        sdpa(SDPBackend.CUDNN_ATTENTION),
        lambda c: c.half and not c.biased and c.size % 8 == 0 and c.size <= 128 and c.keys > 1,
    ),
    "flash": Core(
        sdpa(SDPBackend.FLASH_ATTENTION), lambda c: c.half and not c.biased and c.size % 8 == 0 and c.size <= 256
    ),
    "efficient": Core(
        sdpa(SDPBackend.EFFICIENT_ATTENTION),
        lambda c: c.capability >= (5, 0) and c.dtype in (*HALVES, torch.float32) and c.size % 8 == 0,
    ),
    "fa3": Core(
        packaged("flash_attn_interface", "flash_attn_func"),
        lambda c: c.half and not c.biased and c.capability[0] == 9 and c.size % 8 == 0 and c.size <= 256,
        "flash_attn_interface",
    ),
    "fa4": Core(
        packaged("flash_attn.cute", "flash_attn_func"),
        lambda c: c.half and not c.biased and c.capability[0] in (9, 10) and c.size in (64, 128),
        "flash_attn.cute",
    ),
    "flash_attn": Core(
        packaged("flash_attn", "flash_attn_func"),
        lambda c: c.half and not c.biased and c.size % 8 == 0 and c.size <= 256,
        "flash_attn",
    ),
    "xformers": Core(
        packaged("xformers.ops", "memory_efficient_attention"),
        lambda c: c.half and not c.biased and c.size % 8 == 0,
        "xformers.ops",
    ),
    "sage": Core(  # 8 bits: an approximation, so only where asked for by name
        packaged("sageattention", "sageattn", tensor_layout="NHD"),
        lambda c: c.half and not c.biased and c.size in (64, 128),
        "sageattention",
    ),
    "triton": Core(attention_triton, lambda c: c.half and c.size in (64, 128), "triton"),
    "math": Core(sdpa(SDPBackend.MATH), lambda c: True),
}

# The first that takes the call. cuDNN leads where it measured fastest: 1.7 to 2.3 times FlashAttention-2 on Hopper, and
# ahead of FA4 on B200, but 0.8 to 0.9 times on A100 and RTX PRO 6000 (facts: published benchmarks of cuDNN 9.19).
DATACENTRE = ("cudnn", "fa3", "fa4", "flash", "efficient", "triton", "math")
ORDERS: dict[int, tuple[str, ...]] = {9: DATACENTRE, 10: DATACENTRE}  # by major compute capability
ORDER = ("flash", "efficient", "triton", "math")  # any other GPU


def choose(call: Call, gpu: str) -> str:
    """Return the name of the core for a call: the tuned one if it can, else the first of the order that can."""
    for name in (*tuned_cores(call, gpu), *ORDERS.get(call.capability[0], ORDER)):
        core = CORES[name]
        if core.can(call) and (core.package is None or why_absent(core.package) is None):
            return name
    raise AssertionError("math takes every call")


def named(name: str, call: Call) -> Core:
    """Return a core asked for by name; ValueError where it is unknown, not installed, or cannot take the call."""
    if name not in CORES:
        raise ValueError(f"core is {name!r}; legal: {', '.join(CORES)}")
    core = CORES[name]
    if core.package is not None and (reason := why_absent(core.package)):
        raise ValueError(f"core {name!r} needs the package {core.package}, which cannot be imported: {reason}")
    if not core.can(call):
        raise ValueError(f"core {name!r} does not take this call: {call}")
    return core


@cache
def why_absent(package: str) -> str | None:
    """Return why a package cannot be imported, None where it can."""
    try:
        import_module(package)
    except Exception as error:  # a wheel for another PyTorch fails in many ways; it is absent all the same
        return f"{type(error).__name__}: {error}"
    return None


def tuned_cores(call: Call, gpu: str) -> tuple[str, ...]:
    """Return the core measured fastest for calls like this on a GPU, if one was; ValueError for a name nobody knows."""
    name = table(gpu).get("attention", {}).get(call.key, {}).get("core")
    if name is None:
        return ()
    if name not in CORES:
        raise ValueError(f"kernels/tuned/{gpu}.json names the core {name!r}; legal: {', '.join(CORES)}")
    return (name,)


def attention_picked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, core: str | None
) -> torch.Tensor:
    """The core asked for by name; else the forced implementation; else on a GPU the chosen core, and the reference."""
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape).flatten(2)
    if core is not None:
        return named(core, call_of(q, k, bias)).run(q, k, v, bias)
    if q.device.type == "cuda" and not is_forced():
        return CORES[choose(call_of(q, k, bias), gpu_of(q.device))].run(q, k, v, bias)
    return pick(q, ref=attention_ref, triton=attention_triton if triton is not None else None)(q, k, v, bias)


register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, str? core) -> Tensor",
    lambda *arguments: attention_picked(*arguments).contiguous(),
    lambda q, *_: q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3]),
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    core: str | None = None,
) -> torch.Tensor:
    """Return the attention of q over k and v, [B, L, N * K], by the core named, or by the one chosen where None.

    ValueError for shapes that do not fit together and for a core that is not installed or does not take the call.
    """
    expect_floating("q", q)
    expect_shape("q", q, (None, None, None, None))
    expect_some("q", q, 2, 3)
    rows, _, heads, size = q.shape
    expect_shape("k", k, (rows, None, heads, size))
    expect_shape("v", v, tuple(k.shape))
    for name, tensor in (("k", k), ("v", v), ("bias", bias)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected q's, {q.dtype}")
    if bias is not None:
        if bias.dim() != 4 or bias.shape[0] not in (1, rows):
            raise ValueError(f"bias has shape {list(bias.shape)}; expected [1 or {rows}, 1, 1, {k.shape[1]}]")
        expect_shape("bias", bias, (None, 1, 1, k.shape[1]))
    expect_device(q, k=k, v=v, bias=bias)
    if is_opaque():
        return torch.ops.runtime.attention(q, k, v, bias, core)
    return attention_picked(q, k, v, bias, core)
