"""The operations of the VAE against formulations of their own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels.causal_conv3d import (
    causal_conv3d,
    causal_conv3d_ref,
    causal_conv3d_taps,
    causal_conv3d_window,
)
from runtime.kernels.norm_silu import BLOCK, norm_silu, norm_silu_ref

TOLERANCE = 1e-5  # float32, relative to the largest number


def assert_near(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert given.shape == expected.shape
    assert (given.double() - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item())


def naive_causal_conv3d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, history: torch.Tensor, stride: int
) -> torch.Tensor:
    """Float64, by the formula: output by output, tap by tap, each tap one product of matrices."""
    x, weight, history = x.double(), weight.double(), history.double()
    batch, _, frames, height, width = x.shape
    out, _, taps, rows, columns = weight.shape
    y = bias.double().view(1, out, 1, 1, 1).repeat(batch, 1, frames // stride, height, width)
    for j in range(frames // stride):
        for k in range(taps):
            index = (j + 1) * stride - taps + k
            if index < -history.shape[2]:
                continue
            frame = x[:, :, index] if index >= 0 else history[:, :, index]
            padded = F.pad(frame, (columns // 2, columns // 2, rows // 2, rows // 2))
            for r in range(rows):
                for c in range(columns):
                    seen = padded[:, :, r : r + height, c : c + width]
                    y[:, :, j] += torch.einsum("oc,bchw->bohw", weight[:, :, k, r, c], seen)
    return y


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    def size(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    generator = torch.Generator().manual_seed(size(0, 2**31))
    taps = size(1, 4)
    stride = size(1, taps)
    batch, channels, height, width = size(1, 2), size(1, 5), size(1, 6), size(1, 6)
    x = torch.randn(batch, channels, stride * size(1, 4), height, width, generator=generator)
    history = torch.randn(batch, channels, size(0, taps - stride), height, width, generator=generator)
    kernel = (taps, draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 3, 5])))
    weight = torch.randn(size(1, 5), channels, *kernel, generator=generator)
    bias = torch.randn(weight.shape[0], generator=generator)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return x, weight, bias, history, stride


@settings(max_examples=120, deadline=None, derandomize=True)
@given(convolutions())
def test_causal_conv3d_is_its_formula(case: tuple) -> None:
    x, weight, bias, history, stride = case
    expected = naive_causal_conv3d(*case)
    for implementation in (causal_conv3d_ref, causal_conv3d_taps, causal_conv3d_window):
        assert_near(implementation(x, weight, bias, history, stride), expected)
    assert_near(causal_conv3d(x, weight, bias, history, stride=stride), expected)
    if not history.shape[2]:
        assert_near(causal_conv3d(x, weight, None, None, stride=stride), expected - bias.double().view(-1, 1, 1, 1))
    residual = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    given, sums = residual.clone(), residual + expected
    assert_near(causal_conv3d(x, weight, bias, history, stride=stride, residual=given), sums)
    assert torch.equal(given, residual)
    assert_near(causal_conv3d(x, weight, bias, history, stride=stride, residual=given, inplace=True), sums)


def test_causal_conv3d_adds_where_the_residual_is() -> None:
    shape = (2, 3, 4, 5, 6)
    x, residual = (torch.randn(shape).contiguous(memory_format=torch.channels_last_3d) for _ in range(2))
    result = causal_conv3d(x, torch.randn(3, 3, 3, 3, 3), residual=residual, inplace=True)
    assert result.data_ptr() == residual.data_ptr()


def test_norm_silu_in_blocks_is_the_reference() -> None:
    x = torch.randn(2, 24, 3, 40, 41).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    assert x.numel() > 2 * BLOCK
    gamma = torch.randn(24).bfloat16()
    for silu in (True, False):
        expected = norm_silu_ref(x, gamma, silu, False, False)
        assert torch.equal(norm_silu(x, gamma, silu=silu), expected)
        given = x.clone()
        assert norm_silu(given, gamma, silu=silu, inplace=True) is given
        assert torch.equal(given, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolutions(), st.integers(1, 4))
def test_causal_conv3d_in_chunks_is_the_whole(case: tuple, chunk: int) -> None:
    x, weight, bias, history, stride = case
    whole = causal_conv3d(x, weight, bias, history, stride=stride)
    past = [history]
    parts = []
    keep = weight.shape[2] - stride
    for part in x.split(chunk * stride, dim=2):
        before = torch.cat(past, dim=2)
        parts.append(causal_conv3d(part, weight, bias, before[:, :, max(0, before.shape[2] - keep) :], stride=stride))
        past.append(part)
    assert_near(torch.cat(parts, dim=2), whole.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_causal_conv3d_in_half_precision_is_near(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, 4, 9, 5, generator=generator).to(dtype)
    weight = torch.randn(6, 7, 3, 3, 3, generator=generator).to(dtype)
    bias = torch.randn(6, generator=generator).to(dtype)
    history = torch.randn(1, 7, 2, 9, 5, generator=generator).to(dtype)
    y = causal_conv3d(x, weight, bias, history)
    expected = naive_causal_conv3d(x, weight, bias, history, 1)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (1, 4, 2, 8)}, r"x has shape \[1, 4, 2, 8\]; expected \[any, any, any, any, any\]"),
        ({"weight": (6, 5, 3, 3, 3)}, r"weight has shape \[6, 5, 3, 3, 3\]; expected \[any, 4, any, any, any\]"),
        ({"weight": (6, 4, 3, 2, 3)}, "weight has 2 x 3 taps in the picture; expected odd numbers"),
        ({"stride": 4}, "stride is 4; expected 1 to 3"),
        ({"stride": 0}, "stride is 0; expected 1 to 3"),
        ({"x": (1, 4, 3, 8, 8), "stride": 2}, "x has 3 frames; expected a positive multiple of the stride, 2"),
        ({"bias": (5,)}, r"bias has shape \[5\]; expected \[6\]"),
        ({"history": (1, 4, 2, 8, 7)}, r"history has shape \[1, 4, 2, 8, 7\]; expected \[1, 4, any, 8, 8\]"),
        ({"history": (1, 4, 3, 8, 8)}, "history has 3 frames; expected at most 2"),
    ],
)
def test_causal_conv3d_names_what_does_not_fit(arguments: dict, message: str) -> None:
    shapes = {"x": (1, 4, 2, 8, 8), "weight": (6, 4, 3, 3, 3), "bias": (6,), "history": (1, 4, 1, 8, 8)}
    stride = arguments.get("stride", 1)
    tensors = {name: torch.zeros(arguments.get(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        causal_conv3d(**tensors, stride=stride)


def test_causal_conv3d_names_dtypes_that_do_not_fit() -> None:
    x, weight = torch.zeros(1, 4, 2, 8, 8), torch.zeros(6, 4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"weight has dtype torch.bfloat16; expected that of x, torch.float32"):
        causal_conv3d(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"x has dtype torch.int64; expected a floating-point dtype"):
        causal_conv3d(x.long(), weight)


def naive_norm_silu(x: torch.Tensor, gamma: torch.Tensor, silu: bool) -> torch.Tensor:
    """Float64, channels last, from the sum of squares."""
    wide = x.double().movedim(1, -1)
    norm = (wide * wide).sum(-1, keepdim=True) ** 0.5
    h = wide / torch.where(norm < 1e-12, torch.full_like(norm, 1e-12), norm) * math.sqrt(x.shape[1])
    h = h * gamma.double().flatten()
    return (h / (1 + torch.exp(-h)) if silu else h).movedim(-1, 1)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    silu=st.booleans(),
    scale=st.sampled_from([0.0, 1e-14, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_norm_silu_is_its_formula(shape: list[int], silu: bool, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(shape, generator=generator)
    gamma = torch.randn(shape[1], *[1] * (len(shape) - 2), generator=generator)
    before = x.clone()
    assert_near(norm_silu(x, gamma, silu=silu), naive_norm_silu(x, gamma, silu))
    assert torch.equal(x, before), "the input is left alone"
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert_near(norm_silu(strided, gamma, silu=silu), naive_norm_silu(x, gamma, silu))
    assert norm_silu(strided, gamma, silu=silu, inplace=True) is strided
    assert_near(strided, naive_norm_silu(x, gamma, silu))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_silu_in_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (300 * torch.randn(2, 96, 3, 5, 7, generator=generator)).to(dtype)  # squares overflow float16
    gamma = torch.randn(96, generator=generator)
    y = norm_silu(x, gamma)
    expected = naive_norm_silu(x, gamma, True)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()
    assert norm_silu(x, gamma, inplace=True) is x
    assert torch.equal(x, y)


def test_norm_silu_keeps_the_memory_layout() -> None:
    x = torch.randn(1, 8, 2, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    assert norm_silu(x, torch.ones(8)).is_contiguous(memory_format=torch.channels_last_3d)


def test_norm_silu_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gamma has shape \[3\]; expected 4 numbers"):
        norm_silu(torch.zeros(1, 4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"x has shape \[4\]; expected \[B, C, ...\]"):
        norm_silu(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"x has dtype torch.int32; expected a floating-point dtype"):
        norm_silu(torch.zeros(1, 4, dtype=torch.int32), torch.zeros(4))
