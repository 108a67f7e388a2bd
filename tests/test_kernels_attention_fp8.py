"""Attention in 8 bits: its definition against exact attention and by hand; tiles; FlashAttention-3 by a stand-in."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch

from runtime import kernels
from runtime.kernels import backend, tuning
from runtime.kernels.tolerance import judge

pytest.importorskip("triton")

MODULE = sys.modules["runtime.kernels.attention_fp8"]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by(implementation: str, *qkv: torch.Tensor) -> torch.Tensor:
    with backend.forced(implementation):
        return kernels.attention_fp8(*qkv)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest of e4m3's numbers: 3 bits behind the leading one, 2^-9 the smallest step."""
    step = 2.0 ** (x.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (x / step).round() * step


def test_definition_by_hand() -> None:
    """One head after the other in double precision, with a rounding of its own."""
    q, k, v = numbers(2, 9, 3, 64), numbers(2, 21, 3, 64, seed=1) + 3, numbers(2, 21, 3, 64, seed=2)
    found = by("ref", q, k, v).view(2, 9, 3, 64)
    for row in range(2):
        for head in range(3):
            a, b, c = (x[row, :, head].double() for x in (q, k, v))
            b = b - b.mean(0)
            a, b, c = (rounded(x * 448 / x.abs().max()) * x.abs().max() / 448 for x in (a, b, c))
            scores = a @ b.T / 8 / math.log(2)
            weights = torch.exp2(scores - scores.amax(1, keepdim=True).ceil())
            expected = rounded(weights * 256) @ c / (weights * 256).sum(1, keepdim=True)
            assert rms(found[row, :, head] - expected) < 1e-3 * rms(expected)


@pytest.mark.parametrize("implementation", ["ref", "triton"])
def test_near_exact_attention_wherever_the_keys_lie(implementation: str) -> None:
    """What all keys have in common takes nothing from the codes, however large it is."""
    q, k, v = numbers(1, 70, 2, 128), numbers(1, 150, 2, 128, seed=1), numbers(1, 150, 2, 128, seed=2)
    for common in (0.0, 100.0):
        moved = k + common * numbers(1, 1, 2, 128, seed=3)
        exact = kernels.attention(q.double(), moved.double(), v.double()).float()
        assert rms(by(implementation, q, moved, v) - exact) < 0.06 * rms(exact)


def test_many_small_weights_are_not_lost() -> None:
    """Keys of which each weighs 2^-13 of the largest weigh as much together as they should."""
    keys = 2**13 + 1
    q, k, v = torch.zeros(1, 1, 1, 64), torch.zeros(1, keys, 1, 64), torch.ones(1, keys, 1, 64)
    q[..., 0], k[:, 0, :, 0] = 8.0, 13 * math.log(2)
    v[:, 0] = 0.0
    assert by("ref", q, k, v)[0, 0, 0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("settings", [{"block_s": 32}, {"block_s": 128}, {"block_l": 64, "ahead": True}], ids=str)
def test_tiles_do_not_show(settings: dict[str, int]) -> None:
    """A weight has the same bits against the largest score so far as against the largest of all."""
    qkv = [3 * numbers(1, 150, 1, 64), *(numbers(1, 300, 1, 64, seed=seed) for seed in (1, 2))]
    plain = by("triton", *qkv)
    with tuning.trial("attention_fp8", settings) as asked:
        other = by("triton", *qkv)
    assert asked
    verdict = judge(other, plain, kind="float16")  # numbers below 2^-14 of the largest may differ
    assert verdict.correct, str(verdict)


def test_flash_attention_3_takes_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function as published: codes [B, L, N, K], a scale for each row and head, bfloat16 out; only where asked."""
    called = []

    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
        q_descale: torch.Tensor, k_descale: torch.Tensor, v_descale: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        called.append(q.shape)
        assert all(x.dtype == torch.float8_e4m3fn and x.stride(-1) == 1 for x in (q, k, v))
        pairs = ((q, q_descale), (k, k_descale), (v, v_descale))
        assert all(scale.shape == (q.shape[0], q.shape[2]) for _, scale in pairs)
        wide = [x.float() * scale[:, None, :, None] for x, scale in pairs]
        return kernels.attention(*wide).view(q.shape).bfloat16()

    package = ModuleType(MODULE.FA3)
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE.FA3, package)
    MODULE.why_absent.cache_clear()
    qkv = [numbers(2, length, 2, 64, seed=length) for length in (40, 130, 130)]
    expected = by("ref", *qkv)
    for capability, wanted, calls in (((9, 0), "fa3", 1), ((8, 9), "fa3", 0), ((9, 0), "triton", 0)):
        monkeypatch.setattr(MODULE, "capability_of", lambda device, found=capability: found)
        called.clear()
        with tuning.trial("attention_fp8", {"implementation": wanted}):
            verdict = judge(kernels.attention_fp8(*qkv), expected, kind="float8")
        assert verdict.correct, str(verdict)
        assert len(called) == calls
    MODULE.why_absent.cache_clear()


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (((1, 4, 2, 64), (1, 0, 2, 64), (1, 0, 2, 64)), r"k has shape \[1, 0, 2, 64\]; expected at least 1 in dimen"),
        (((1, 4, 2, 64), (1, 5, 3, 64), (1, 5, 3, 64)), r"k has shape \[1, 5, 3, 64\]; expected \[1, any, 2, 64\]"),
        (((1, 4, 2, 64), (1, 5, 2, 64), (1, 6, 2, 64)), r"v has shape \[1, 6, 2, 64\]; expected \[1, 5, 2, 64\]"),
        (((1, 4, 2, 96),) * 3, "q has head size 96; the Triton version takes 64 and 128"),
    ],
)
def test_refused(shapes: tuple[tuple[int, ...], ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        by("triton", *(torch.ones(shape) for shape in shapes))


def test_other_head_sizes_take_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    q = numbers(1, 9, 2, 12)
    monkeypatch.setattr(MODULE, "attention_fp8_triton", None)
    assert torch.equal(kernels.attention_fp8(q, q, q), by("ref", q, q, q))
