"""The transformer's operations: references against independent formulations in float64, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import kernels
from tests.published import relative


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


small = st.integers(1, 5)


@settings(deadline=None, max_examples=60)
@given(
    rows=small, groups=small, per_group=small, width=st.integers(2, 9), shared=st.booleans(), affine=st.booleans(),
    norm=st.sampled_from(["layer", "rms"]),
)  # fmt: skip
def test_modulate(rows: int, groups: int, per_group: int, width: int, shared: bool, affine: bool, norm: str) -> None:
    x = numbers(rows, groups * per_group, width)
    scale, shift = (numbers(1 if shared else rows, groups, width, seed=s) for s in (1, 2))
    weight, bias = (numbers(width, seed=3), numbers(width, seed=4)) if affine else (None, None)
    ours = kernels.modulate(x, scale, shift, weight=weight, bias=bias, norm=norm)
    wide = x.double()
    if norm == "layer":
        wide = wide - wide.mean(2, keepdim=True)
    normal = wide / (wide.square().mean(2, keepdim=True) + 1e-6).sqrt()
    if affine:
        normal = normal * weight + bias
    each = [vector.repeat_interleave(per_group, dim=1) for vector in (scale, shift)]
    assert relative(ours, normal * (1 + each[0]) + each[1]) < 1e-5
    plain = kernels.modulate(x, weight=weight, bias=bias, norm=norm)
    assert relative(plain, normal) < 1e-5


@settings(deadline=None, max_examples=40)
@given(rows=small, groups=small, per_group=small, width=st.integers(2, 9), shared=st.booleans())
def test_gate_residual(rows: int, groups: int, per_group: int, width: int, shared: bool) -> None:
    x, y = numbers(rows, groups * per_group, width), numbers(rows, groups * per_group, width, seed=1)
    gate, scale, shift = (numbers(1 if shared else rows, groups, width, seed=s) for s in (2, 3, 4))
    theirs = x.double() + y * gate.repeat_interleave(per_group, dim=1)
    assert relative(kernels.gate_residual(x, y, gate), theirs) < 1e-6
    assert relative(kernels.gate_residual(x, y), x.double() + y) < 1e-6
    out, h = kernels.gate_residual_modulate(x, y, gate, scale, shift)
    assert torch.equal(out, kernels.gate_residual(x, y, gate))
    assert torch.equal(h, kernels.modulate(out, scale, shift))


@settings(deadline=None, max_examples=40)
@given(rows=small, length=small, width=small, inner=small, out=small, bfloat16=st.booleans())
def test_mlp(rows: int, length: int, width: int, inner: int, out: int, bfloat16: bool) -> None:
    x, w_in, b_in = numbers(rows, length, width), numbers(inner, width, seed=1), numbers(inner, seed=2)
    w_out, b_out = numbers(out, inner, seed=3), numbers(out, seed=4)
    given_tensors = [t.bfloat16() for t in (x, w_in, b_in, w_out, b_out)] if bfloat16 else [x, w_in, b_in, w_out, b_out]
    ours = kernels.mlp(*given_tensors)
    x, w_in, b_in, w_out, b_out = (t.double() for t in given_tensors)
    h = x @ w_in.T + b_in
    h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    assert relative(ours, h @ w_out.T + b_out) < (0.1 if bfloat16 else 1e-4)


@settings(deadline=None, max_examples=40)
@given(rows=small, length=small, heads=st.integers(1, 3), pairs=small, strided=st.booleans())
def test_qk_norm_rope(rows: int, length: int, heads: int, pairs: int, strided: bool) -> None:
    width = heads * pairs * 2
    qkv = numbers(rows, length, 3 * width)
    if strided:
        qkv = numbers(length, rows, 3 * width).transpose(0, 1)
    weights = numbers(width, seed=1), numbers(width, seed=2)
    angle = numbers(length, pairs, seed=3).double()
    rope = torch.stack([angle.cos(), angle.sin()], 2).float()
    q, k, v = kernels.qk_norm_rope(qkv.clone(), *weights, rope, heads=heads)
    for ours, part, weight in zip((q, k), qkv.double().split(width, 2), weights, strict=False):
        normal = part / (part.pow(2).mean(2, keepdim=True) + 1e-6).sqrt() * weight
        first, second = normal.view(rows, length, heads, pairs, 2).unbind(-1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
        assert relative(ours, turned.flatten(3)) < 1e-4
    assert torch.equal(v, qkv[..., 2 * width :].unflatten(2, (heads, -1)))


@settings(deadline=None, max_examples=40)
@given(rows=small, length=small, keys=small, heads=small, size=st.integers(1, 8), biased=st.booleans())
def test_attention(rows: int, length: int, keys: int, heads: int, size: int, biased: bool) -> None:
    q, k, v = (
        numbers(rows, length, heads, size),
        numbers(rows, keys, heads, size, seed=1),
        numbers(rows, keys, heads, size, seed=2),
    )
    bias = numbers(rows, 1, 1, keys, seed=3) if biased else None
    scores = torch.einsum("blnk,bsnk->bnls", q.double(), k.double()) / size**0.5
    theirs = torch.einsum("bnls,bsnk->blnk", (scores + (0 if bias is None else bias)).softmax(-1), v.double()).flatten(
        2
    )
    assert relative(kernels.attention(q, k, v, bias), theirs) < 1e-5


X, W = numbers(2, 6, 4), numbers(4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: kernels.modulate(X[0]), r"x has shape \[6, 4\]"),
        (lambda: kernels.modulate(X.int()), "x has dtype torch.int32"),
        (lambda: kernels.modulate(X, norm="batch"), "norm is 'batch'; legal: layer, rms"),
        (lambda: kernels.modulate(X, *[numbers(1, 0, 4)] * 2), r"scale has shape \[1, 0, 4\]"),
        (lambda: kernels.modulate(X, numbers(1, 1, 4)), "together or not at all"),
        (
            lambda: kernels.modulate(X, numbers(3, 1, 4), numbers(3, 1, 4)),
            r"scale has shape \[3, 1, 4\]; expected \[1 or 2",
        ),
        (lambda: kernels.modulate(X, numbers(1, 4, 4), numbers(1, 4, 4)), "M a divisor of 6"),
        (lambda: kernels.modulate(X, weight=numbers(5)), r"weight has shape \[5\]; expected \[4\]"),
        (lambda: kernels.gate_residual(X, X[:, :5]), r"y has shape \[2, 5, 4\]; expected \[2, 6, 4\]"),
        (lambda: kernels.gate_residual(X, X, W), r"gate has shape \[4\]"),
        (lambda: kernels.mlp(X, numbers(8, 5), numbers(8), numbers(4, 8), W), r"w_in has shape \[8, 5\]"),
        (lambda: kernels.qk_norm_rope(numbers(2, 6, 13), W, W, W, heads=2), "three times 2 heads"),
        (lambda: kernels.qk_norm_rope(numbers(2, 6, 12), W, W, numbers(6, 2, 2), heads=2), r"expected \[6, 1, 2\]"),
        (lambda: kernels.attention(*[numbers(1, 2, 3, 4)] * 2, numbers(1, 3, 3, 4)), r"v has shape \[1, 3, 3, 4\]"),
        (lambda: kernels.attention(*[numbers(1, 2, 3, 4)] * 3, numbers(1, 1, 1, 3)), r"bias has shape \[1, 1, 1, 3\]"),
    ],
)
def test_refused(call: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
