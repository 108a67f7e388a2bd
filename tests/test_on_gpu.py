"""Networks and whole requests on a GPU beside the CPU; weights are made here, so that a bare machine runs them.

What is marked gpu runs on the CPU as well, where it is equal, so that it is sound before a GPU is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from benchmarks import random_model
from kernels.tolerance import judge
from runtime.models.wan.transformer import TransformerConfig, WanTransformer
from runtime.models.wan.vae import WanVAE
from runtime.models.wan.vae_config import VAEConfig
from runtime.offload import Offload, give_back_memory
from runtime.pipeline import start_receipt

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]
DTYPES = [torch.float32, torch.bfloat16]
REQUEST = runtime.Request(prompt="a red ball", width=64, height=64, num_frames=5, steps=3, seed=3)


@pytest.fixture(autouse=True)
def _float32_means_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other processes test on the same GPU


def randomised(module: torch.nn.Module, device: str, dtype: torch.dtype) -> Any:
    """The same numbers on every device; what stays float32 as published does so."""
    generator = torch.Generator().manual_seed(2)
    keeps = getattr(module, "keep_float32", lambda name: False)
    module.requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        gain = "norm" in name or "gamma" in name
        fan = parameter[0].numel() ** -0.5 if parameter.dim() > 1 and "modulation" not in name else 0.2
        kind = torch.float32 if keeps(name) else dtype
        parameter.data = (noise * (0.2 if gain else fan) + float(gain)).to(device, kind)
    return module


def within(found: torch.Tensor, exact: torch.Tensor, same: torch.Tensor, dtype: torch.dtype) -> None:
    """Float32: 1e-4 of the largest number. Rounded: at most twice as far from float32 as the CPU is."""
    if dtype == torch.float32:
        assert (found.cpu() - exact).abs().max() <= 1e-4 * exact.abs().max()
        return
    verdict, own = (judge(each.cpu(), exact, same, "bfloat16") for each in (found, same))
    assert verdict.missing == 0 and verdict.largest <= verdict.allowed and verdict.rms <= 2 * own.rms, (verdict, own)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [64, 128])
def test_transformer(device: str, dtype: torch.dtype, head: int) -> None:
    config = TransformerConfig(
        num_attention_heads=3, attention_head_dim=head, in_channels=16, out_channels=16, text_dim=32, freq_dim=64,
        ffn_dim=320, num_layers=3,
    )  # fmt: skip

    def velocity(device: str, dtype: torch.dtype) -> torch.Tensor:
        network = randomised(WanTransformer(config), device, dtype)
        generator = torch.Generator().manual_seed(1)
        texts = [torch.randn(length, 32, generator=generator) for length in (7, 20)]
        x = torch.randn(1, 16, 5, 10, 14, generator=generator).to(device)
        with torch.inference_mode():
            projected = network.project(texts, 40, (5, 10, 14))
            return network(x, torch.tensor([0.7], dtype=torch.float64), projected)

    within(velocity(device, dtype), velocity("cpu", torch.float32), velocity("cpu", dtype), dtype)


VAES = {
    "2.1": VAEConfig(base_dim=32, num_res_blocks=1),
    "2.2": VAEConfig(
        base_dim=32, num_res_blocks=1, z_dim=16, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VAES)
def test_autoencoder(device: str, dtype: torch.dtype, name: str) -> None:
    def both(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        network = randomised(WanVAE(VAES[name]), device, dtype)
        network.prepare()
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 16, 3, 5, 7, generator=generator).to(device)
        scale = network.stride[1]
        frames = torch.rand(1, 3, 9, 4 * scale, 3 * scale, generator=generator).to(device) * 2 - 1
        with torch.inference_mode():
            return torch.cat([chunk.cpu() for chunk in network.decode_stream(latents)], 2), network.encode(frames)

    exact, same = both("cpu", torch.float32), both("cpu", dtype)
    for found, wide, rounded in zip(both(device, dtype), exact, same, strict=True):
        within(found, wide, rounded, dtype)


def video(device: str, dtype: str, request: runtime.Request = REQUEST, **options: Any) -> runtime.Video:
    made = runtime.generate(runtime.load("demo", device=device, dtype=dtype, **options), request)
    assert made.frames.any()
    return made


@pytest.mark.parametrize("device", DEVICES)
def test_the_demo_video_is_the_cpus(device: str) -> None:
    """Float32: within 2 of 255 everywhere. 16 bits, decoder included: at least 25 dB, since steps add roundings up."""
    expected = video("cpu", "float32").frames.astype(int)
    assert np.abs(video(device, "float32").frames.astype(int) - expected).max() <= 2
    rounded = video(device, "bfloat16")
    error = float(np.square(rounded.frames - expected, dtype=float).mean())
    assert 10 * np.log10(255**2 / error) >= 25
    told = rounded.receipt is not None and rounded.receipt.approximations
    assert told == (["decoded in 16 bits; the dtype float32 decodes in float32"] if device == "cuda" else [])


@pytest.mark.parametrize("device", [DEVICES[0], pytest.param("cpu", marks=pytest.mark.slow)])
def test_the_video_of_make_demo_is_the_cpus(device: str) -> None:
    """All steps at its own size; float32: within 2 of 255 everywhere. 16 bits: at least 40 dB (a CPU keeps 54)."""
    request = runtime.Request(prompt="a red ball rolls left over green grass", seed=7)
    expected = video("cpu", "float32", request).frames.astype(int)
    assert np.abs(video(device, "float32", request).frames.astype(int) - expected).max() <= 2
    error = float(np.square(video(device, "bfloat16", request).frames - expected, dtype=float).mean())
    assert 10 * np.log10(255**2 / error) >= 40


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offload", [Offload("released", 2), Offload("streamed", 0)], ids=str)
def test_blocks_that_come_and_go_change_nothing(device: str, offload: Offload) -> None:
    expected = video(device, "float32").latents
    assert expected is not None
    assert torch.equal(video(device, "float32", offload=offload).latents, expected)


@pytest.mark.gpu
def test_a_budget_on_this_gpu() -> None:
    """The GPU is calibrated, the request foreseen, and what is allocated stays within the budget."""
    model = runtime.load_within("demo", REQUEST, memory="6GiB", device="cuda")
    made = runtime.generate(model, REQUEST)
    assert made.frames.any() and made.receipt is not None and made.receipt.predicted is not None
    assert all(stage.peak_bytes is None or stage.peak_bytes < 6 * 2**30 for stage in made.receipt.stages.values())


@contextmanager
def limited(count: float) -> Iterator[None]:
    """Let PyTorch take so many bytes of the GPU at most."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(count / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_blocks_that_come_and_go_under_a_real_limit(tmp_path: Path) -> None:
    """Where the weights do not fit into what the driver would give, blocks in turn do, and the numbers are the same."""
    pytest.importorskip("diffusers")  # it writes the checkpoint
    random_model.write(tmp_path)  # 400 MB of blocks

    def made(offload: Offload) -> tuple[torch.Tensor, int]:
        give_back_memory()
        torch.cuda.reset_peak_memory_stats()
        model = runtime.load(tmp_path, device="cuda", dtype="float32", offload=offload)
        request = runtime.Request(prompt="any", width=128, height=128, num_frames=9, steps=2, seed=1)
        latents = runtime.generate(model, request).latents
        assert latents is not None
        return latents.cpu(), torch.cuda.max_memory_reserved()

    whole, streamed = Offload(), Offload("streamed", 0)
    expected, most = made(whole)
    found, least = made(streamed)
    assert torch.equal(found, expected) and least < 0.7 * most
    with limited((least + most) / 2):
        assert torch.equal(made(streamed)[0], expected)
        with pytest.raises(torch.OutOfMemoryError):
            made(whole)


@pytest.mark.gpu
def test_the_ladder_under_a_real_limit() -> None:
    """Where whole frames do not fit into what the driver would give, tiles do, and the frames are the same."""
    model = runtime.load("demo", device="cuda", dtype="float32")
    latents = torch.randn(model.spec.latent_channels, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    expected = runtime.decode(model, latents).frames.astype(int)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free = torch.cuda.memory_reserved()
    assert np.array_equal(runtime.decode(model, latents).frames, expected)
    most = torch.cuda.max_memory_reserved() - free
    receipt = start_receipt(model, REQUEST.resolved(model.spec))
    with limited(free + 0.6 * most):
        frames = runtime.decode(model, latents, receipt=receipt).frames.astype(int)
    assert len(receipt.decoding) > 1 and any("ran out of memory" in note for note in receipt.notes), receipt
    assert receipt.decoding[-1].startswith("tiles of ")
    assert np.abs(frames - expected).max() <= 1
