"""causal_conv3d in Triton: each tile, what it may not read, and a streamed decode; its cases are in test_kernels.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.kernels import backend, causal_conv3d
from runtime.kernels.cases import Maker, cases
from runtime.kernels.causal_conv3d import TILES, Tile, causal_conv3d_ref, choose_tile
from runtime.kernels.tolerance import judge
from runtime.models.wan import vae as wan_vae
from runtime.models.wan import vae_blocks

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="Triton compiles here: see -m gpu")

MODULE = sys.modules[causal_conv3d.__module__]
SHARED = 99 * 1024  # bytes of shared memory per block, of the GPUs that have the least


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill outputs with NaN before they are written."""
    empty = torch.empty

    def filled(*given: Any, **more: Any) -> torch.Tensor:
        tensor = empty(*given, **more)
        return tensor.fill_(torch.nan) if tensor.device.type != "meta" else tensor

    monkeypatch.setattr(torch, "empty", filled)


def by_triton(x: torch.Tensor, weight: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
    with backend.forced("triton"):
        return causal_conv3d(x, weight, *others, **more)


def video(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers [B, C, T, H, W], channels last."""
    rows, channels, *rest = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *rest, channels, generator=generator).movedim(-1, 1)


def kernel(out: int, channels: int, *taps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, channels, *taps, generator=generator) / (channels * taps[0] * taps[1] * taps[2]) ** 0.5
    return weight.contiguous(memory_format=torch.channels_last_3d)


def assert_correct(y: torch.Tensor, exact: torch.Tensor, same: torch.Tensor | None = None) -> None:
    verdict = judge(y, exact, same)
    assert verdict.correct, str(verdict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("missing", [0, 5], ids=["whole", "masked"])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.block}x{tile.n}+{tile.tail}")
def test_each_tile(monkeypatch: pytest.MonkeyPatch, tile: Tile, missing: int, dtype: torch.dtype) -> None:
    """More pixels than a block, more out channels than a tile; the last of both are whole or partly filled."""
    monkeypatch.setattr(MODULE, "choose_tile", lambda *_: tile)
    out = 2 * (tile.n + tile.tail) - missing
    size = (2 * tile.block // 16 - missing, 16)
    x, history, residual = video(1, 32, 1, *size), video(1, 32, 2, *size, seed=1), video(1, out, 1, *size, seed=2)
    given = [x, kernel(out, 32, 3, 1, 3), torch.linspace(-1, 1, out), history, residual]
    x, weight, bias, history, residual = (each.to(dtype) for each in given)
    y = by_triton(x, weight, bias, history, residual=residual)
    exact = causal_conv3d_ref(x.float(), weight.float(), bias.float(), history.float(), 1, residual.float())
    assert_correct(y, exact, causal_conv3d_ref(x, weight, bias, history, 1, residual))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("case", cases("causal_conv3d", real=True), ids=lambda case: case.name)
def test_tiles_fit_the_published_widths(case: Any) -> None:
    given = case.make(Maker(torch.device("meta"), torch.bfloat16))
    with backend.forced("triton"), backend.recorded() as launches:
        y = causal_conv3d(**given)
    (launch,) = launches
    constants, columns = launch.constants, launch.constants["N"] + launch.constants["TAIL"]
    assert y.shape[1] < 16 or y.shape[1] % columns == 0, "no column of the product is wasted"
    assert y.shape[1] < 16 or given["x"].shape[1] % constants["K"] == 0
    assert launch.options["num_stages"] * (constants["BLOCK"] + columns) * constants["K"] * 2 <= SHARED
    assert launch.grid[0] >= 100, "a large GPU is not left idle"
    for name in ("x", "history", "weight", "residual"):
        assert launch.arguments.get(name) is given[name], f"{name} was copied"


def test_odd_widths_take_few_columns() -> None:
    for out in range(1, 600):
        tile = choose_tile(96, out, 10**6, 4, 2)
        columns = -(-out // (tile.n + tile.tail)) * (tile.n + tile.tail)
        assert columns < 2 * out or columns == 16, out


def test_frames_before_the_history_are_skipped_with_their_taps() -> None:
    weight = kernel(7, 16, 3, 3, 3)
    expected = by_triton(video(1, 16, 1, 5, 7), weight)
    weight[:, :, :2] = torch.nan
    assert torch.equal(by_triton(video(1, 16, 1, 5, 7), weight), expected)
    weight[:, :, 1] = 0.0
    history = video(1, 16, 1, 5, 7, seed=1)
    assert torch.equal(by_triton(video(1, 16, 1, 5, 7), weight, None, history), expected)


def test_frames_beside_the_given_ones_are_not_read() -> None:
    """x, history and residual are read where they stand, in clips whose other frames are NaN."""

    def within(frames: torch.Tensor) -> torch.Tensor:
        rows, channels, count, height, width = frames.shape
        clip = torch.full((rows + 2, count + 3, height, width, channels), torch.nan).movedim(-1, 1)
        clip[1:-1, :, 2:-1] = frames
        return clip[1:-1, :, 2:-1]

    x, history, residual = video(2, 16, 4, 5, 7), video(2, 16, 1, 5, 7, seed=1), video(2, 9, 2, 5, 7, seed=2)
    weight, bias = kernel(9, 16, 3, 3, 3), torch.linspace(-1, 1, 9)
    y = by_triton(x, weight, bias, history, stride=2, residual=residual)
    assert_correct(y, causal_conv3d_ref(x, weight, bias, history, 2, residual))
    with backend.forced("triton"), backend.recorded() as launches:
        given = [within(x), weight, bias, within(history)]
        causal_conv3d(*given, stride=2)
    assert launches[0].arguments["x"] is given[0]
    assert launches[0].arguments["history"] is given[3]
    assert torch.equal(by_triton(*given, stride=2, residual=within(residual)), y)


def test_other_layouts_give_the_same() -> None:
    x, history, residual = video(2, 16, 2, 5, 7), video(2, 16, 2, 5, 7, seed=1), video(2, 9, 2, 5, 7, seed=2)
    weight, bias = kernel(9, 16, 3, 3, 3), torch.linspace(-1, 1, 9)
    y = by_triton(x, weight, bias, history, residual=residual)
    by_time = weight.permute(2, 0, 3, 4, 1).contiguous().permute(1, 4, 0, 2, 3)  # as VAEs are prepared on CPUs
    for other in (weight.contiguous(), by_time):
        doubled = bias.repeat_interleave(2)[::2]
        flipped = x.contiguous().transpose(3, 4).contiguous().transpose(3, 4)
        assert torch.equal(by_triton(flipped, other, doubled, history.contiguous(), residual=residual.contiguous()), y)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Two frames 2^31 numbers apart, in a file of which only their pages exist."""
    apart = 2**31 + 16
    memory = torch.from_file(str(tmp_path / "frames"), shared=True, size=apart + 5 * 7 * 16, dtype=torch.float16)
    x = memory.as_strided((1, 16, 2, 5, 7), (0, 1, apart, 7 * 16, 16))
    x.copy_(video(1, 16, 2, 5, 7))
    weight = kernel(9, 16, 3, 3, 3).half()
    with backend.forced("triton"), backend.recorded() as launches:
        causal_conv3d(x, weight)
    assert launches[0].arguments["x"] is x
    near = x.clone(memory_format=torch.channels_last_3d)
    assert torch.equal(by_triton(x, weight), by_triton(near, weight))


def test_streamed_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny VAE in chunks: the first without history, the second with one, the third with a full one."""
    monkeypatch.undo()  # the decoder may allocate as it likes
    torch.manual_seed(0)
    config = wan_vae.VAEConfig(
        base_dim=4, dim_mult=(1, 2), temperal_downsample=(True,), num_res_blocks=1,
        scale_factor_temporal=2, scale_factor_spatial=2,
    )  # fmt: skip
    vae = wan_vae.WanVAE(config)
    for name, parameter in vae.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5 + ("gamma" in name))
    latents = torch.randn(1, 16, 3, 3, 5)
    expected = torch.cat(list(vae.decode_stream(latents)), dim=2)
    calls = []

    def through_triton(*given: Any, **more: Any) -> torch.Tensor:
        calls.append(given[3] is None)
        return by_triton(*given, **more)

    monkeypatch.setattr(vae_blocks, "causal_conv3d", through_triton)
    chunks = list(vae.decode_stream(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, 2, 2]
    assert any(calls) and not all(calls)
    assert (torch.cat(chunks, dim=2) - expected).abs().max() <= 1e-4


def test_it_is_one_node_for_compilers() -> None:
    given = (video(1, 8, 2, 5, 7), kernel(6, 8, 3, 3, 3), torch.zeros(6), video(1, 8, 1, 5, 7), 1, video(1, 6, 2, 5, 7))
    for arguments in (given, (*given[:2], None, None, 2, None)):
        torch.library.opcheck(
            torch.ops.runtime.causal_conv3d.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
    exported = torch.export.export(Residual(), (given[0], given[1], given[5]))
    assert [str(node.target) for node in exported.graph.nodes if node.op == "call_function"] == [
        "runtime.causal_conv3d.default"
    ]


class Residual(torch.nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return causal_conv3d(x, weight, residual=residual)


def test_the_residual_must_fit() -> None:
    x, weight = video(1, 8, 4, 5, 7), kernel(6, 8, 3, 3, 3)
    with pytest.raises(ValueError, match=r"residual has shape \[1, 6, 4, 5, 7\]; expected \[1, 6, 2, 5, 7\]"):
        causal_conv3d(x, weight, stride=2, residual=video(1, 6, 4, 5, 7))
    with pytest.raises(ValueError, match=r"residual has dtype torch.float16; expected that of x, torch.float32"):
        causal_conv3d(x, weight, residual=video(1, 6, 4, 5, 7).half())


def test_all_implementations_add_the_residual() -> None:
    given = (video(1, 8, 2, 5, 7), kernel(6, 8, 3, 3, 3), None, video(1, 8, 2, 5, 7, seed=1), 1)
    residual = video(1, 6, 2, 5, 7, seed=2)
    for name in ("ref", "taps", "window", "triton"):
        implementation = getattr(MODULE, f"causal_conv3d_{name}")
        torch.testing.assert_close(implementation(*given, residual), implementation(*given) + residual)


def test_taps_in_the_picture_have_an_end() -> None:
    """One bit stands for each: 25 are taken, 35 refused by name rather than computed wrong."""
    x, weight = video(1, 4, 2, 6, 9), kernel(3, 4, 2, 5, 5)
    assert_correct(by_triton(x, weight), causal_conv3d_ref(x, weight, None, None, 1))
    with pytest.raises(ValueError, match="weight has 5 x 7 taps in the picture; the Triton version takes 31"):
        by_triton(x, kernel(3, 4, 2, 5, 7))
