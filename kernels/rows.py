"""A token's numbers in two tiles: what the operations share that read a whole row at once and write it once.

A width is BODY and TAIL, both powers of 2: 5120 is 4096 and 1024, where one tile would be 8192.
"""

from __future__ import annotations

from .backend import INTERPRETED, jit, next_power_of_2, tl


def tiles_of(width: int) -> tuple[int, int, int]:
    """Return the two tiles of a width, and warps that load 16 bytes of the smaller one by each thread."""
    body = max(next_power_of_2(width) // 2, 1)
    tail = next_power_of_2(width - body)
    return body, tail, max(1, min(16, tail // 256))


@jit
def lanes_of(BODY: tl.constexpr, TAIL: tl.constexpr):
    """Where the numbers of both tiles stand in a row: eight neighbours to a thread, whatever is read and written.

    Else a store in 8 bits would ask for sixteen, and all numbers pass through shared memory to get there.
    """
    return tl.max_contiguous(tl.arange(0, BODY), 8), tl.max_contiguous(BODY + tl.arange(0, TAIL), 8)


@jit
def load_token(start, body, tail, D: tl.constexpr):
    """One token's numbers in two tiles, float32; past L1, whose room the vectors need that every token reads."""
    a = tl.load(start + body, mask=body < D, other=0.0, cache_modifier=".cg")
    b = tl.load(start + tail, mask=tail < D, other=0.0, cache_modifier=".cg")
    return a.to(tl.float32), b.to(tl.float32)


@jit
def store_token(start, a, b, body, tail, D: tl.constexpr):
    """Write both tiles in the dtype that `start` points to."""
    kind = start.dtype.element_ty
    tl.store(start + body, a.to(kind), mask=body < D)
    tl.store(start + tail, b.to(kind), mask=tail < D)


@jit
def total(a, b):
    """The sum of both tiles; the larger is folded onto the smaller, so that threads meet once."""
    folded = tl.reshape(a, (a.shape[0] // b.shape[0], b.shape[0]))
    return tl.sum(tl.sum(folded, axis=0) + b, axis=0)


@jit
def largest(a, b):
    """The largest magnitude in both tiles, found as `total` finds the sum."""
    folded = tl.reshape(tl.abs(a), (a.shape[0] // b.shape[0], b.shape[0]))
    return tl.max(tl.maximum(tl.max(folded, axis=0), tl.abs(b)), axis=0)


@jit
def on_e4m3_grid(values):
    """Numbers of less than 464 to e4m3's nearest, ties to even, as float32, where a cast would do it otherwise.

    A GPU's cast does it itself; of what is on the grid the interpreter's cast is exact. The grid's steps are 2^-3 of
    each number's power of two and at least 2^-9.
    """
    if INTERPRETED:
        power = (values.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        magic = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 * 2^20: its last bit is the grid's
        values = (values + magic) - magic
    return values


@jit
def store_in_8_bits(start, scale, a, b, body, tail, D: tl.constexpr):
    """Write a token as e4m3 numbers, and at `scale` what they are multiples of: its largest magnitude over 448."""
    factor = tl.maximum(largest(a, b), 1e-12) * (1.0 / 448.0)
    inverse = tl.div_rn(1.0, factor)
    store_token(start, on_e4m3_grid(a * inverse), on_e4m3_grid(b * inverse), body, tail, D)
    tl.store(scale, factor)
