"""Cases of the operations made of matrix products: attention, the feed-forward, linear layers in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .case import Arguments, Case, Maker
from .shapes import HALF, REAL, Transformer


def attention_cases() -> Iterator[Case]:
    """Tails of tiles on both sides; both head sizes; biases per sample and shared, some of whole tiles of -inf."""

    def biased(m: Maker, rows: int, keys: int, masked: int = 0) -> torch.Tensor:
        bias = m.tensor(rows, 1, 1, keys)
        bias[..., :masked] = -math.inf
        return bias

    for rows, length, keys, heads, head, biases, masked in (
        (1, 7, 5, 2, 64, 0, 0), (2, 130, 70, 1, 128, 2, 0), (1, 65, 129, 2, 128, 1, 64), (2, 64, 64, 1, 64, 1, 0),
        (0, 4, 4, 1, 64, 0, 0), (1, 1, 1, 3, 128, 1, 0),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, keys: int = keys, heads: int = heads, head: int = head,
            biases: int = biases, masked: int = masked,
        ) -> Arguments:  # fmt: skip
            k, v = m.tensor(rows, keys, heads, head), m.tensor(rows, keys, heads, head)
            bias = biased(m, biases, keys, masked) if biases else None
            return {"q": m.tensor(rows, length, heads, head), "k": k, "v": v, "bias": bias}

        yield Case("attention", f"{rows}x{length}x{keys} heads {heads}x{head} biases {biases} -inf {masked}", make)

    def views(m: Maker) -> Arguments:
        return dict(zip(("q", "k", "v"), m.tensor(2, 67, 3, 2, 64).unbind(2), strict=True))

    def transposed(m: Maker) -> Arguments:
        q, k, v = m.tensor(3, 1, 2, 33, 64).transpose(2, 3).expand(-1, 2, -1, -1, -1).unbind(0)
        return {"q": q, "k": k, "v": v, "bias": biased(m, 2, 33)}

    yield Case("attention", "views of one qkv", views)
    yield Case("attention", "transposed, one row for all", transposed)
    for model, size in REAL:
        for keys in (size.tokens, 64):  # itself; a prompt of 60 tokens and its folded padding

            def real(m: Maker, model: Transformer = model, tokens: int = size.tokens, keys: int = keys) -> Arguments:
                shape = (model.heads, model.width // model.heads)
                if keys == tokens:
                    return dict(zip(("q", "k", "v"), m.tensor(1, tokens, 3, *shape).unbind(2), strict=True))
                k, v = m.tensor(1, keys, *shape), m.tensor(1, keys, *shape)
                return {"q": m.tensor(1, tokens, *shape), "k": k, "v": v, "bias": biased(m, 1, keys)}

            name = f"{model.name} {size.name} over {'itself' if keys == size.tokens else 'text'}"
            moved, work = 2 * HALF * (size.tokens + keys) * model.width, 4 * size.tokens * keys * model.width
            yield Case("attention", name, real, real=True, bytes=moved, flops=work)


def attention_fp8_cases() -> Iterator[Case]:
    """Tails of tiles on both sides, more keys than one tile; both head sizes; keys far from zero."""

    def arguments(m: Maker, rows: int, length: int, keys: int, heads: int, head: int) -> Arguments:
        k = m.tensor(rows, keys, heads, head) + 4 * m.tensor(1, 1, heads, head)
        return {"q": m.tensor(rows, length, heads, head), "k": k, "v": m.tensor(rows, keys, heads, head)}

    for rows, length, keys, heads, head in (
        (1, 7, 5, 2, 64), (2, 130, 70, 1, 128), (1, 65, 129, 2, 128), (2, 64, 256, 1, 64), (0, 4, 4, 1, 64),
        (1, 1, 1, 3, 128),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, keys: int = keys, heads: int = heads, head: int = head
        ) -> Arguments:
            return arguments(m, rows, length, keys, heads, head)

        yield Case("attention_fp8", f"{rows}x{length}x{keys} heads {heads}x{head}", make)

    def views(m: Maker) -> Arguments:
        return dict(zip(("q", "k", "v"), m.tensor(2, 67, 3, 2, 64).unbind(2), strict=True))

    yield Case("attention_fp8", "views of one qkv", views)
    for model, size in REAL:

        def real(m: Maker, model: Transformer = model, tokens: int = size.tokens) -> Arguments:
            shape = (1, tokens, 3, model.heads, model.width // model.heads)
            return dict(zip(("q", "k", "v"), m.tensor(*shape).unbind(2), strict=True))

        moved, work = 4 * HALF * size.tokens * model.width, 4 * size.tokens**2 * model.width
        yield Case("attention_fp8", f"{model.name} {size.name}", real, real=True, bytes=moved, flops=work)


def mlp_cases() -> Iterator[Case]:
    """Widths that are no multiple of a tile; alone, with a plain residual, with gates per sample and per group."""

    def arguments(m: Maker, rows: int, length: int, width: int, inner: int, outs: int) -> Arguments:
        return {
            "x": m.tensor(rows, length, width),
            "w_in": m.tensor(inner, width, scale=width**-0.5), "b_in": m.tensor(inner),
            "w_out": m.tensor(outs, inner, scale=inner**-0.5), "b_out": m.tensor(outs),
        }  # fmt: skip

    for rows, length, width, inner, outs, groups, gates in (
        (1, 7, 33, 50, 20, None, 0), (2, 70, 64, 130, 96, None, 0), (0, 4, 16, 16, 16, None, 0),
        (1, 130, 48, 64, 136, None, 0), (1, 7, 33, 50, 20, 0, 0), (2, 70, 64, 130, 96, 2, 1),
        (2, 130, 48, 96, 130, 130, 2), (1, 4, 16, 16, 16, 1, 1),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, width: int = width, inner: int = inner, outs: int = outs,
            groups: int | None = groups, gates: int = gates,
        ) -> Arguments:  # fmt: skip
            given = arguments(m, rows, length, width, inner, outs)
            if groups is not None:
                given["residual"] = m.tensor(rows, length, outs)
                given["gate"] = m.vector(gates, groups, outs) if groups else None
            return given

        name = f"{rows}x{length}x{width} by {inner} to {outs}"
        yield Case("mlp", name if groups is None else f"{name} groups {groups} gates {gates}", make)

    def views(m: Maker) -> Arguments:
        given = arguments(m, 2, 9, 32, 48, 40)
        return given | {
            "x": m.tensor(9, 2, 32).transpose(0, 1), "w_in": m.tensor(32, 48).T, "w_out": m.tensor(40, 96)[:, ::2],
            "residual": m.tensor(1, 9, 40).expand(2, -1, -1), "gate": m.vector(2, 40, 3).mT,
        }  # fmt: skip

    yield Case("mlp", "views", views)
    for model, size in REAL:

        def real(m: Maker, model: Transformer = model, tokens: int = size.tokens) -> Arguments:
            given = arguments(m, 1, tokens, model.width, model.ffn, model.width)
            return given | {"residual": m.tensor(1, tokens, model.width), "gate": m.vector(1, 1, model.width)}

        moved = HALF * model.width * (3 * size.tokens + 2 * model.ffn)
        work = 4 * size.tokens * model.width * model.ffn
        yield Case("mlp", f"{model.name} {size.name}", real, real=True, bytes=moved, flops=work)


def linear_fp8_cases() -> Iterator[Case]:
    """Widths that are no multiple of a tile; with and without bias, GELU before it; transposed; in 8 bits already."""

    def arguments(m: Maker, rows: int, length: int, width: int, outs: int, gelu: bool, bias: bool) -> Arguments:
        return {
            "x": m.tensor(rows, length, width),
            "weight_fp8": m.tensor(outs, width, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn),
            "weight_scale": m.gain(outs).abs() * (0.01 * width**-0.5),
            "bias": m.tensor(outs) if bias else None,
            "gelu": gelu,
        }

    for rows, length, width, outs, gelu, bias in (
        (1, 7, 33, 50, False, True), (2, 70, 160, 130, False, False), (0, 4, 16, 16, False, True),
        (1, 130, 96, 136, True, True),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, width: int = width, outs: int = outs, gelu: bool = gelu,
            bias: bool = bias,
        ) -> Arguments:  # fmt: skip
            return arguments(m, rows, length, width, outs, gelu, bias)

        yield Case("linear_fp8", f"{rows}x{length}x{width} to {outs} gelu {gelu} bias {bias}", make)

    def transposed(m: Maker) -> Arguments:
        return arguments(m, 2, 9, 32, 40, False, True) | {"x": m.tensor(9, 2, 32).transpose(0, 1)}

    def given(m: Maker) -> Arguments:
        made = arguments(m, 2, 9, 32, 40, False, True)
        codes = m.tensor(9, 2, 32, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn).transpose(0, 1)
        return made | {"x": codes, "x_scale": m.gain(9, 2).abs().T, "dtype": m.dtype}

    yield Case("linear_fp8", "transposed", transposed)
    yield Case("linear_fp8", "rows in 8 bits", given)
    for model, size in REAL:
        for gelu, (width, outs) in ((False, (model.width, model.ffn)), (True, (model.ffn, model.width))):

            def real(
                m: Maker, tokens: int = size.tokens, width: int = width, outs: int = outs, gelu: bool = gelu
            ) -> Arguments:
                return arguments(m, 1, tokens, width, outs, gelu, True)

            moved = HALF * size.tokens * (width + outs) + width * outs
            name = f"{model.name} {size.name} {width} to {outs}"
            work = 2 * size.tokens * width * outs
            yield Case("linear_fp8", name, real, real=True, bytes=moved, flops=work)
