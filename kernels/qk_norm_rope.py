"""qk_norm_rope: normalise the queries and keys of one projection, then turn them by 3D rotary embedding.

    q = rotate(norm(qkv[..., :D];   q_weight, q_bias))
    k = rotate(norm(qkv[..., D:2D]; k_weight, k_bias))
    v = qkv[..., 2D:]

    norm        "rms" over the whole width, "rms_head" or "layer_head" over each head, "none"
    rotate      (a, b) -> (a cos - b sin, a sin + b cos) for each pair (a, b) of a head
    pairing     "interleaved": a pair is (x[2i], x[2i+1]);  "half": it is (x[i], x[i + K/2])

qkv [B, L, 3D] any float dtype: the fused projection's output, not used afterwards (implementations may write in it);
weights and biases float32, [D] for "rms", [K] for norms over heads, or None; rope holds (cos, sin) float32 of each
pair, as one table [R, K/2, 2] or as `AxisTables` of a (t, h, w) grid of R tokens, or is None (no rotation); the first
skip[0] and the last skip[1] tokens are normed but not rotated (text beside R video tokens); returns q, k, v, each
[B, L, N, K] in qkv's dtype. Arithmetic is float32.
Source: Wan 2.1 `rope_apply` and `WanRMSNorm`, CogVideoX, HunyuanVideo; RoFormer, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .backend import is_opaque, jit, launch, next_power_of_2, pick, register, tl
from .checks import expect_device, expect_floating, expect_shape
from .cuda import qk_norm_rope_cuda
from .tuning import tuned

NORMS = ("rms", "rms_head", "layer_head", "none")
PAIRINGS = ("interleaved", "half")


class AxisTables(NamedTuple):
    """(cos, sin) by position on each axis of a token grid, [positions, pairs, 2] float32; a head's pairs are split
    t, h, w in this order. Tokens are numbered with w fastest. A few KB stand for one row per token."""

    t: torch.Tensor
    h: torch.Tensor
    w: torch.Tensor

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (t, h, w)."""
        return len(self.t), len(self.h), len(self.w)

    def dense(self) -> torch.Tensor:
        """The same as one table [L, K/2, 2]."""
        axes = (self.t[:, None, None], self.h[None, :, None], self.w[None, None])
        return torch.cat([axis.expand(*self.grid, -1, 2) for axis in axes], dim=3).flatten(0, 2)


Rope = torch.Tensor | AxisTables | None
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def qk_norm_rope_ref(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    rope: Rope,
    heads: int,
    eps: float,
    norm: str = "rms",
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    pairing: str = "interleaved",
    skip: tuple[int, int] = (0, 0),
) -> Parts:
    """The definition, float32 inside; two passes over q and k, qkv is left alone."""
    width = qkv.shape[2] // 3
    table = rope.dense() if isinstance(rope, AxisTables) else rope

    def treated(part: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        wide = part.float()
        if norm == "rms":
            wide = F.rms_norm(wide, (width,), weight, eps)
        h = wide.unflatten(2, (heads, -1))
        if norm == "rms_head":
            h = F.rms_norm(h, h.shape[3:], weight, eps)
        elif norm == "layer_head":
            h = F.layer_norm(h, h.shape[3:], weight, bias, eps)
        elif norm == "none":
            h = h.clone(memory_format=torch.contiguous_format)
        if table is not None:
            h = rotated(h, table.unsqueeze(1), pairing, skip)
        return h.to(qkv.dtype)

    q, k, v = (qkv[..., part * width : (part + 1) * width] for part in range(3))
    return treated(q, q_weight, q_bias), treated(k, k_weight, k_bias), v.unflatten(2, (heads, -1))


def rotated(h: torch.Tensor, table: torch.Tensor, pairing: str, skip: tuple[int, int]) -> torch.Tensor:
    """Return h [B, L, N, K] with the pairs of its R middle tokens turned by table [R, 1, K/2, 2]; h is overwritten."""
    middle = h[:, skip[0] : h.shape[1] - skip[1]]
    if torch.compiler.is_compiling():  # other formats know no complex numbers and no writing in place
        axis = 4 if pairing == "interleaved" else 3
        pairs = middle.unflatten(3, (-1, 2) if axis == 4 else (2, -1))
        (a, b), (cos, sin) = pairs.unbind(axis), table.unbind(3)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], axis).flatten(3)
        return torch.cat([h[:, : skip[0]], turned, h[:, h.shape[1] - skip[1] :]], 1) if any(skip) else turned
    if pairing == "interleaved":  # a pair is one complex number, so a rotation is one multiplication
        torch.view_as_complex(middle.unflatten(3, (-1, 2))).mul_(torch.view_as_complex(table))
        return h
    (a, b), (cos, sin) = middle.chunk(2, dim=3), table.unbind(3)
    turned = a * cos - b * sin
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(turned)
    return h


@jit
def load_pairs(start, heads, N: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """The pairs (a, b) of N heads of K numbers, two tiles [heads, PAIRS] float32; zeros outside."""
    if HALF:
        lanes = tl.arange(0, PAIRS)
        inside = (heads[:, None] < N) & (lanes[None, :] < K // 2)
        places = start + heads[:, None] * K + lanes[None, :]
        a = tl.load(places, mask=inside, other=0.0)
        b = tl.load(places + K // 2, mask=inside, other=0.0)
    else:  # neighbours are loaded together and parted in registers
        lanes = tl.arange(0, 2 * PAIRS)
        inside = (heads[:, None] < N) & (lanes[None, :] < K)
        both = tl.load(start + heads[:, None] * K + lanes[None, :], mask=inside, other=0.0)
        a, b = tl.split(tl.reshape(both, (heads.shape[0], PAIRS, 2)))
    return a.to(tl.float32), b.to(tl.float32)


@jit
def store_pairs(start, heads, a, b, N: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """Undo `load_pairs`, in the dtype that stands there."""
    kind = start.dtype.element_ty
    if HALF:
        lanes = tl.arange(0, PAIRS)
        inside = (heads[:, None] < N) & (lanes[None, :] < K // 2)
        places = start + heads[:, None] * K + lanes[None, :]
        tl.store(places, a.to(kind), mask=inside)
        tl.store(places + K // 2, b.to(kind), mask=inside)
    else:
        lanes = tl.arange(0, 2 * PAIRS)
        inside = (heads[:, None] < N) & (lanes[None, :] < K)
        both = tl.reshape(tl.join(a.to(kind), b.to(kind)), (heads.shape[0], 2 * PAIRS))
        tl.store(start + heads[:, None] * K + lanes[None, :], both, mask=inside)


@jit
def load_row(start, FIRST: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """The COUNT pairs (a, b) that stand at `start`, as pairs FIRST and on of two tiles [1, PAIRS]; zeros elsewhere.

    So few numbers are loaded where they are needed: by two loads, since parting neighbours would shuffle threads.
    """
    lanes = tl.arange(0, PAIRS)[None, :]
    inside = (lanes >= FIRST) & (lanes < FIRST + COUNT)
    places = start + (lanes - FIRST) * (1 if HALF else 2)
    a = tl.load(places, mask=inside, other=0.0)
    b = tl.load(places + (COUNT if HALF else 1), mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@jit
def mean_square(a, b, c, d, N: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr):
    """The mean of all squares of both tiles; the larger is folded onto the smaller, so that threads meet once."""
    rest = c * c + d * d
    folded = tl.reshape(a * a + b * b, (a.shape[0] // c.shape[0], c.shape[0], PAIRS))
    return tl.sum(tl.sum(tl.sum(folded, axis=0) + rest, axis=1), axis=0) / (N * K)


@jit
def normalise_heads(a, b, eps, K: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr):
    """Each head's own norm, without weights."""
    if NORM == "layer_head":
        mean = (tl.sum(a + b, axis=1) / K)[:, None]
        inside = tl.arange(0, PAIRS)[None, :] < K // 2
        a, b = tl.where(inside, a - mean, 0.0), tl.where(inside, b - mean, 0.0)
    factor = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / K + eps)[:, None]
    return a * factor, b * factor


@jit
def finish(
    start, heads, a, b, weight, bias, cos, sin,
    N: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Weigh, turn and store one tile of heads."""
    if weight is not None:
        if NORM == "rms":
            gain_a, gain_b = load_pairs(weight, heads, N, K, PAIRS, HALF)
        else:
            gain_a, gain_b = load_row(weight, 0, K // 2, PAIRS, HALF)
        a, b = a * gain_a, b * gain_b
    if bias is not None:
        bias_a, bias_b = load_row(bias, 0, K // 2, PAIRS, HALF)
        a, b = a + bias_a, b + bias_b
    if cos is not None:
        a, b = a * cos - b * sin, a * sin + b * cos
    store_pairs(start, heads, a, b, N, K, PAIRS, HALF)


@jit
def norm_rope(
    start, body, tail, a, b, c, d, weight, bias, cos, sin, eps,
    N: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The formula on one token's q or k: (a, b) are the pairs of its first heads, (c, d) of the others."""
    if NORM == "rms":
        factor = tl.rsqrt(mean_square(a, b, c, d, N, K, PAIRS) + eps)
        a, b, c, d = a * factor, b * factor, c * factor, d * factor
    elif NORM != "none":
        a, b = normalise_heads(a, b, eps, K, PAIRS, NORM)
        c, d = normalise_heads(c, d, eps, K, PAIRS, NORM)
    finish(start, body, a, b, weight, bias, cos, sin, N, K, PAIRS, NORM, HALF)
    finish(start, tail, c, d, weight, bias, cos, sin, N, K, PAIRS, NORM, HALF)


@jit
def qk_norm_rope_kernel(
    qkv, q_weight, k_weight, q_bias, k_bias, table, table_h, table_w,
    qkv_row, qkv_token, length, skipped, rotated, grid_h, grid_w, eps,
    N: tl.constexpr, K: tl.constexpr, BODY: tl.constexpr, TAIL: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_T: tl.constexpr, PAIRS_H: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program per token: q and k are read once and written once, where they stand.

    The heads are two tiles, BODY and TAIL, both powers of 2: 40 heads are 32 and 8, where one tile would hold 64.
    """
    token = tl.program_id(0)
    row, place = token // length, token % length
    q_start = qkv + row.to(tl.int64) * qkv_row + place.to(tl.int64) * qkv_token
    k_start = q_start + N * K
    body, tail = tl.arange(0, BODY), BODY + tl.arange(0, TAIL)
    # All loads are under way before the first reduction waits.
    q_a, q_b = load_pairs(q_start, body, N, K, PAIRS, HALF)
    q_c, q_d = load_pairs(q_start, tail, N, K, PAIRS, HALF)
    k_a, k_b = load_pairs(k_start, body, N, K, PAIRS, HALF)
    k_c, k_d = load_pairs(k_start, tail, N, K, PAIRS, HALF)
    cos, sin = None, None
    if table is not None:
        turned = (place >= skipped) & (place < skipped + rotated)
        spot = tl.where(turned, place - skipped, 0)
        if table_h is None:
            cos, sin = load_row(table + spot.to(tl.int64) * K, 0, K // 2, PAIRS, False)
        else:
            line, pairs_w = spot // grid_w, K // 2 - PAIRS_T - PAIRS_H
            cos_t, sin_t = load_row(table + line // grid_h * 2 * PAIRS_T, 0, PAIRS_T, PAIRS, False)
            cos_h, sin_h = load_row(table_h + line % grid_h * 2 * PAIRS_H, PAIRS_T, PAIRS_H, PAIRS, False)
            cos_w, sin_w = load_row(table_w + spot % grid_w * 2 * pairs_w, PAIRS_T + PAIRS_H, pairs_w, PAIRS, False)
            cos, sin = cos_t + cos_h + cos_w, sin_t + sin_h + sin_w
        cos, sin = tl.where(turned, cos, 1.0), tl.where(turned, sin, 0.0)
    norm_rope(q_start, body, tail, q_a, q_b, q_c, q_d, q_weight, q_bias, cos, sin, eps, N, K, PAIRS, NORM, HALF)
    norm_rope(k_start, body, tail, k_a, k_b, k_c, k_d, k_weight, k_bias, cos, sin, eps, N, K, PAIRS, NORM, HALF)


def qk_norm_rope_triton(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    rope: Rope,
    heads: int,
    eps: float,
    norm: str = "rms",
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    pairing: str = "interleaved",
    skip: tuple[int, int] = (0, 0),
) -> Parts:
    """One pass over q and k, in qkv's own memory; a qkv that cannot be written token by token is copied first."""
    rows, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size = width // heads
    if not _separate_tokens(qkv):
        qkv = qkv.contiguous()
    rotated = length - sum(skip)
    if not rotated:  # there may be no row of a table to read
        rope = None
    tables = rope if isinstance(rope, AxisTables) else (rope, None, None)
    table, table_h, table_w = (None if each is None else each.contiguous() for each in tables)
    pairs = next_power_of_2(size // 2)
    body = max(next_power_of_2(heads) // 2, 1)
    tail = next_power_of_2(heads - body)
    launch(
        qk_norm_rope_kernel,
        (rows * length,),
        {
            "qkv": qkv,
            "q_weight": None if q_weight is None else q_weight.contiguous(),
            "k_weight": None if k_weight is None else k_weight.contiguous(),
            "q_bias": None if q_bias is None else q_bias.contiguous(),
            "k_bias": None if k_bias is None else k_bias.contiguous(),
            "table": table, "table_h": table_h, "table_w": table_w,
            "qkv_row": qkv.stride(0), "qkv_token": qkv.stride(1),
            "length": length, "skipped": skip[0], "rotated": rotated,
            "grid_h": 1 if table_h is None else len(table_h), "grid_w": 1 if table_w is None else len(table_w),
            "eps": eps,
        },
        {
            "N": heads, "K": size, "BODY": body, "TAIL": tail, "PAIRS": pairs,
            "PAIRS_T": 0 if table is None else table.shape[1], "PAIRS_H": 0 if table_h is None else table_h.shape[1],
            "NORM": norm, "HALF": pairing == "half",
        },
        # 16 bytes for each thread of the smaller tile
        num_warps=tuned("qk_norm_rope", f"{width}", qkv.device).get("num_warps", max(1, min(8, tail * pairs // 128))),
    )  # fmt: skip
    q, k, v = qkv.unflatten(2, (3, heads, size)).unbind(2)
    return q, k, v


def _separate_tokens(qkv: torch.Tensor) -> bool:
    """Tell whether each token is one run of memory that no other token shares."""
    steps = sorted((step, count) for step, count in zip(qkv.stride()[:2], qkv.shape[:2], strict=True) if count > 1)
    room = qkv.shape[2]
    for step, count in steps:
        if step < room:
            return False
        room = step * count
    return qkv.stride(2) == 1


def qk_norm_rope_picked(qkv: torch.Tensor, *others: Any) -> Parts:
    """What runs eagerly."""
    found = tuned("qk_norm_rope", f"{qkv.shape[2] // 3}", qkv.device)
    return pick(qkv, found, ref=qk_norm_rope_ref, triton=qk_norm_rope_triton, cuda=qk_norm_rope_cuda)(qkv, *others)


def qk_norm_rope_inplace(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    table: torch.Tensor | None,
    table_h: torch.Tensor | None,
    table_w: torch.Tensor | None,
    *others: Any,
) -> None:
    """What runs behind `torch.ops.runtime.qk_norm_rope_`: always in qkv, which is contiguous."""
    rope: Rope = table
    if table is not None and table_h is not None and table_w is not None:
        rope = AxisTables(table, table_h, table_w)
    q, k, _ = qk_norm_rope_picked(qkv, q_weight, k_weight, rope, *others)
    if q.data_ptr() != qkv.data_ptr():
        width = qkv.shape[2] // 3
        qkv[..., :width].copy_(q.flatten(2))
        qkv[..., width : 2 * width].copy_(k.flatten(2))


register(
    "qk_norm_rope_(Tensor(a!) qkv, Tensor? q_weight, Tensor? k_weight, Tensor? table, Tensor? table_h, "
    "Tensor? table_w, int heads, float eps, str norm, Tensor? q_bias, Tensor? k_bias, str pairing, int[2] skip) -> ()",
    qk_norm_rope_inplace,
    lambda *_: None,
)


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    rope: Rope,
    *,
    heads: int,
    eps: float = 1e-6,
    norm: str = "rms",
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    pairing: str = "interleaved",
    skip: tuple[int, int] = (0, 0),
) -> Parts:
    """Return q, k (normed and rotated) and v, each [B, L, N, K]; ValueError for arguments that do not fit together.

    The three may be views of qkv, overwritten: do not use qkv afterwards.
    """
    expect_floating("qkv", qkv)
    expect_shape("qkv", qkv, (None, None, None))
    width = qkv.shape[2] // 3
    if heads < 1 or qkv.shape[2] != 3 * width or width % heads or (width // heads) % 2 or not width:
        raise ValueError(f"qkv has width {qkv.shape[2]}; expected three times {heads} heads of an even size")
    for name, value, legal in (("norm", norm, NORMS), ("pairing", pairing, PAIRINGS)):
        if value not in legal:
            raise ValueError(f"{name} is {value!r}; legal: {', '.join(legal)}")
    vectors = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    for name, vector in vectors.items():
        if vector is None:
            continue
        if norm == "none" or (name.endswith("bias") and norm != "layer_head"):
            raise ValueError(f"{name} is given, but norm {norm!r} has none")
        expect_shape(name, vector, (width if norm == "rms" else width // heads,))
    if min(skip) < 0 or sum(skip) > qkv.shape[1]:
        raise ValueError(f"skip is {tuple(skip)}; expected two counts that sum to at most {qkv.shape[1]} tokens")
    _expect_rope(rope, qkv.shape[1] - sum(skip), width // heads // 2)
    tables = rope if isinstance(rope, AxisTables) else (rope, None, None)
    expect_device(qkv, **vectors, **dict(zip(("rope", "rope.h", "rope.w"), tables, strict=True)))
    others = (heads, eps, norm, q_bias, k_bias, pairing, skip)
    if is_opaque():
        qkv = qkv.contiguous()
        torch.ops.runtime.qk_norm_rope_(qkv, q_weight, k_weight, *tables, *others)
        q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)
        return q, k, v
    return qk_norm_rope_picked(qkv, q_weight, k_weight, rope, *others)


def _expect_rope(rope: Rope, tokens: int, pairs: int) -> None:
    """Raise ValueError unless `rope` covers so many tokens and pairs of a head."""
    if rope is None:
        return
    if not isinstance(rope, AxisTables):
        expect_shape("rope", rope, (tokens, pairs, 2))
        return
    for name, table in rope._asdict().items():
        expect_shape(f"rope.{name}", table, (None, None, 2))
    t, h, w = rope.grid
    if t * h * w != tokens or sum(table.shape[1] for table in rope) != pairs:
        raise ValueError(
            f"rope has {t} x {h} x {w} positions and {' + '.join(str(table.shape[1]) for table in rope)} pairs; "
            f"expected {tokens} tokens and {pairs} pairs"
        )
