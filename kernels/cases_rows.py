"""Cases of the operations that read a token once and write it once, and of the quantiser."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .case import Arguments, Case, Maker
from .shapes import HALF, REAL, Resolution, Transformer


def adapted_cases(operation: str, written: int) -> Iterator[Case]:
    """Plain, per sample, per token group, affine; a width that is no power of 2. `written`: bytes of each number."""
    for rows, length, width, groups, shared, affine, norm in (
        (1, 7, 33, 1, True, False, "layer"), (2, 12, 96, 3, False, False, "rms"), (2, 12, 65, 12, True, True, "layer"),
        (1, 5, 130, 0, True, True, "layer"), (2, 5, 48, 0, True, True, "rms"), (1, 4, 33, 1, True, False, "rms"),
        (0, 4, 16, 1, True, False, "layer"),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, width: int = width, groups: int = groups,
            shared: bool = shared, affine: bool = affine, norm: str = norm,
        ) -> Arguments:  # fmt: skip
            vectors = (1 if shared else rows, groups, width)
            return {
                "norm": norm,
                "x": m.tensor(rows, length, width),
                "scale": m.vector(*vectors) if groups else None,
                "shift": m.vector(*vectors) if groups else None,
                "weight": m.gain(width) if affine else None,
                "bias": m.vector(width) if affine else None,
            }

        yield Case(operation, f"{rows}x{length}x{width} groups {groups} affine {affine} {norm}", make)

    def strided(m: Maker) -> Arguments:
        return {"x": m.tensor(5, 2, 48).transpose(0, 1), "scale": m.vector(1, 1, 48), "shift": m.vector(1, 1, 48)}

    yield Case(operation, "transposed", strided)
    for model, size in REAL:

        def real(m: Maker, width: int = model.width, tokens: int = size.tokens) -> Arguments:
            return {"x": m.tensor(1, tokens, width), "scale": m.vector(1, 1, width), "shift": m.vector(1, 1, width)}

        def query(m: Maker, width: int = model.width, tokens: int = size.tokens) -> Arguments:
            return {"x": m.tensor(1, tokens, width), "weight": m.gain(width), "norm": "rms"}

        moved = (HALF + written) * size.tokens * model.width
        yield Case(operation, f"{model.name} {size.name}", real, real=True, bytes=moved)
        yield Case(operation, f"{model.name} {size.name} rms", query, real=True, bytes=moved)


def modulate_cases() -> Iterator[Case]:
    """See `adapted_cases`."""
    return adapted_cases("modulate", HALF)


def modulate_fp8_cases() -> Iterator[Case]:
    """See `adapted_cases`."""
    return adapted_cases("modulate_fp8", 1)


def residual_cases(operation: str, written: int) -> Iterator[Case]:
    """Plain sums, gates per sample and per token group, one row of x for all; fused: the norm's own groups besides.

    `written`: bytes of each number.
    """
    fused = written > HALF

    def vectors(m: Maker, name: str, rows: int, groups: int, width: int) -> Arguments:
        return {name: m.vector(rows, groups, width) if groups else None}

    for rows, length, width, groups, norm_groups, shared, affine in (
        (1, 7, 33, 1, 1, True, False), (2, 12, 96, 3, 1, False, False), (2, 12, 65, 12, 4, True, True),
        (2, 5, 130, 0, 5, True, False), (1, 5, 48, 0, 0, True, True), (0, 4, 16, 1, 1, True, False),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, width: int = width, groups: int = groups,
            norm_groups: int = norm_groups, shared: bool = shared, affine: bool = affine,
        ) -> Arguments:  # fmt: skip
            count = 1 if shared else rows
            given = {"x": m.tensor(rows, length, width), "y": m.tensor(rows, length, width)}
            given |= vectors(m, "gate", count, groups, width)
            if fused:
                given |= vectors(m, "scale", count, norm_groups, width) | vectors(m, "shift", count, norm_groups, width)
                given |= {"weight": m.gain(width), "bias": m.vector(width)} if affine else {}
            return given

        yield Case(operation, f"{rows}x{length}x{width} groups {groups}, {norm_groups} affine {affine}", make)

    def expanded(m: Maker) -> Arguments:
        given = {"x": m.tensor(1, 5, 40).expand(3, -1, -1), "y": m.tensor(5, 3, 40).transpose(0, 1)}
        return given | ({"scale": m.vector(1, 1, 40), "shift": m.vector(1, 1, 40)} if fused else {})

    def sliced(m: Maker) -> Arguments:
        return {"x": m.tensor(2, 5, 80)[:, :, ::2], "y": m.tensor(2, 40, 5).mT, "gate": m.vector(2, 80, 1).mT[..., ::2]}

    yield Case(operation, "one row of x, y transposed", expanded)
    yield Case(operation, "strided numbers", sliced)
    for model, size in REAL:

        def real(m: Maker, width: int = model.width, tokens: int = size.tokens) -> Arguments:
            given = {"x": m.tensor(1, tokens, width), "y": m.tensor(1, tokens, width), "gate": m.vector(1, 1, width)}
            return given | ({"scale": m.vector(1, 1, width), "shift": m.vector(1, 1, width)} if fused else {})

        moved = (2 * HALF + written) * size.tokens * model.width
        yield Case(operation, f"{model.name} {size.name}", real, real=True, bytes=moved)


def gate_residual_cases() -> Iterator[Case]:
    """See `residual_cases`."""
    return residual_cases("gate_residual", HALF)


def gate_residual_modulate_cases() -> Iterator[Case]:
    """See `residual_cases`."""
    return residual_cases("gate_residual_modulate", 2 * HALF)


def gate_residual_modulate_fp8_cases() -> Iterator[Case]:
    """See `residual_cases`."""
    return residual_cases("gate_residual_modulate_fp8", HALF + 1)


def qk_norm_rope_cases() -> Iterator[Case]:
    """Every norm, pairing and kind of table; text before and behind; heads of a size that is no power of 2."""

    def arguments(
        m: Maker, qkv: torch.Tensor, heads: int, norm: str = "rms", table: str = "dense", pairing: str = "interleaved",
        skip: tuple[int, int] = (0, 0), grid: tuple[int, int, int] = (1, 1, 1),
    ) -> Arguments:  # fmt: skip
        width = qkv.shape[2] // 3
        size = width // heads
        gains = width if norm == "rms" else size
        given: Arguments = {"qkv": qkv, "heads": heads, "norm": norm, "pairing": pairing, "skip": skip}
        for name in ("q", "k"):
            given[f"{name}_weight"] = None if norm == "none" else m.gain(gains)
            given[f"{name}_bias"] = m.vector(gains) if norm == "layer_head" else None
        given["rope"] = None
        if table == "dense":
            given["rope"] = m.turns(qkv.shape[1] - sum(skip), size // 2)
        elif table == "axes":
            given["rope"] = m.axes(grid, size // 2)
        return given

    def small(m: Maker, rows: int, length: int, heads: int, size: int, more: Arguments) -> Arguments:
        return arguments(m, m.tensor(rows, length, 3 * heads * size), heads, **more)

    for rows, length, heads, head, more in (
        (2, 7, 3, 12, {}), (1, 24, 2, 12, {"table": "axes", "grid": (2, 3, 4)}),
        (2, 9, 3, 8, {"norm": "rms_head", "pairing": "half", "skip": (0, 2)}),
        (1, 11, 2, 20, {"norm": "layer_head", "table": "axes", "grid": (1, 2, 3), "skip": (5, 0)}),
        (2, 17, 1, 14, {"norm": "layer_head", "pairing": "half", "table": "axes", "grid": (2, 1, 5), "skip": (3, 4)}),
        (1, 5, 4, 16, {"norm": "none"}), (1, 5, 5, 6, {"norm": "rms", "table": "none"}),
        (1, 4, 2, 8, {"skip": (4, 0)}), (0, 6, 2, 12, {"table": "axes", "grid": (1, 2, 3)}),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, heads: int = heads, head: int = head,
            more: Arguments = more,
        ) -> Arguments:  # fmt: skip
            return small(m, rows, length, heads, head, more)

        described = " ".join(str(value) for value in more.values())
        yield Case("qk_norm_rope", f"{rows}x{length}x{heads}x{head} {described}", make)

    def transposed(m: Maker) -> Arguments:
        return arguments(m, m.tensor(5, 2, 72).transpose(0, 1), 2)

    def expanded(m: Maker) -> Arguments:
        return arguments(m, m.tensor(1, 5, 72).expand(2, -1, -1), 2)

    def sliced(m: Maker) -> Arguments:
        return arguments(m, m.tensor(2, 5, 144)[:, :, ::2], 2)

    yield Case("qk_norm_rope", "transposed", transposed)
    yield Case("qk_norm_rope", "one row", expanded)
    yield Case("qk_norm_rope", "strided numbers", sliced)
    for table in ("dense", "axes"):
        for model, size in REAL:

            def real(m: Maker, model: Transformer = model, size: Resolution = size, table: str = table) -> Arguments:
                return arguments(m, m.tensor(1, size.tokens, 3 * model.width), model.heads, table=table, grid=size.grid)

            moved = 4 * HALF * size.tokens * model.width
            yield Case("qk_norm_rope", f"{model.name} {size.name} {table}", real, real=True, bytes=moved)
    for name, heads, head, grid, more in (
        ("cogvideox-5b 480p", 48, 64, (13, 30, 45), {"norm": "layer_head", "skip": (226, 0)}),
        ("hunyuan 720p", 24, 128, (33, 45, 80), {"norm": "rms_head", "skip": (0, 256)}),
    ):
        tokens = math.prod(grid) + sum(more["skip"])  # type: ignore[arg-type]

        def other(
            m: Maker, tokens: int = tokens, heads: int = heads, head: int = head, grid: tuple[int, int, int] = grid,
            more: Arguments = more,
        ) -> Arguments:  # fmt: skip
            return arguments(m, m.tensor(1, tokens, 3 * heads * head), heads, table="axes", grid=grid, **more)

        yield Case("qk_norm_rope", name, other, real=True, bytes=4 * HALF * tokens * heads * head)


def quantise_rows_cases() -> Iterator[Case]:
    """Widths of one tile and of two; with GELU before it, as between the products of a feed-forward."""
    for tokens, width, gelu in ((7, 33, False), (5, 130, True), (3, 1, False), (0, 16, False)):

        def make(m: Maker, tokens: int = tokens, width: int = width, gelu: bool = gelu) -> Arguments:
            return {"x": m.tensor(tokens, width), "gelu": gelu}

        yield Case("quantise_rows", f"{tokens}x{width} gelu {gelu}", make)
    yield Case("quantise_rows", "strided numbers", lambda m: {"x": m.tensor(5, 80)[:, ::2]})
    for model, size in REAL:
        for gelu, width in ((False, model.width), (True, model.ffn)):

            def real(m: Maker, tokens: int = size.tokens, width: int = width, gelu: bool = gelu) -> Arguments:
                return {"x": m.tensor(tokens, width), "gelu": gelu}

            name = f"{model.name} {size.name} {width}{' gelu' if gelu else ''}"
            yield Case("quantise_rows", name, real, real=True, bytes=(HALF + 1) * size.tokens * width)
