"""Published models at their true size on a GPU that is not there: devices, dtypes, launches, and nothing waited for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import runtime
from benchmarks import true_size
from runtime.denoising import denoise, prepare_context
from runtime.precision import candidates, to_fp8
from runtime.schedules import make_schedule
from tests.faked import GPU, fake_gpu

# A CUDA build of PyTorch asks its driver where a CPU build finds nothing to ask.
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA")
FORWARDS = 2 * 2  # steps, prompts
SIZES = {"wan2.1-t2v-1.3b": (832, 480, 81), "wan2.2-ti2v-5b": (1280, 704, 17)}


def test_the_fake_refuses_what_a_gpu_would() -> None:
    with fake_gpu():
        x = torch.empty(3, device=GPU)
        assert (x[None, 1:] + 1.0).shape == (1, 2) and (torch.ones(3) + 1).tolist() == [2, 2, 2]
        with pytest.raises(Exception, match="found at least two devices"):
            x + torch.ones(3)
        with pytest.raises(Exception, match="local_scalar_dense|not linked with support for cuda"):
            float(x[0])


@pytest.mark.parametrize("name", SIZES)
def test_a_request_of_true_size(name: str, tmp_path: Path) -> None:
    true_size.write_configs(tmp_path, name)
    width, height, frames = SIZES[name]
    with fake_gpu() as (launches, copies):
        model = true_size.load(tmp_path, GPU, "bfloat16", "eager")
        request = runtime.Request(prompt="any", width=width, height=height, num_frames=frames, steps=2, seed=1)
        request = request.resolved(model.spec)
        shape = model.spec.latent_shape(frames, height, width)
        texts = [torch.randn(length, model.transformers[0].text_dim) for length in (9, 30)]
        context = prepare_context(model, texts, shape)
        copies.clear()
        sigmas = make_schedule(model.spec.schedule, 2, request.shift or 1.0)
        latents = denoise(model, torch.zeros(1, *shape), context, sigmas, request)
        assert latents.device == GPU and latents.dtype == torch.float32 and latents.shape == (1, *shape)
        assert copies == ["blocks"] + ["goes on"] * FORWARDS  # the noise once, sigma for each forward
        layers, experts = len(model.transformers[0].blocks), len(model.transformers)
        assert counted(launches) == {
            "modulate_kernel": FORWARDS * (2 * layers + 1) + experts * layers, "qk_norm_rope_kernel": FORWARDS * layers,
            "gate_residual_kernel": FORWARDS * 3 * layers,
        }  # fmt: skip
        launches.clear()
        copies.clear()
        decoder = model.autoencoder(GPU, torch.bfloat16)
        assert decoder is model.vae
        chunks = list(decoder.decode_stream(latents[:, :, :2]))
        assert [chunk.shape for chunk in chunks] == [(1, 3, count, height, width) for count in (1, 4)]
        assert all(chunk.device == GPU and chunk.dtype == torch.float32 for chunk in chunks)
        assert set(copies) == {"goes on"} and set(counted(launches)) == {"causal_conv3d_kernel", "norm_silu_kernel"}
        clip = torch.empty(1, 3, 5, height, width, device=GPU)
        assert decoder.encode(clip).shape == (1, model.spec.latent_channels, 2, *shape[2:])


def test_layers_in_8_bits(tmp_path: Path) -> None:
    true_size.write_configs(tmp_path, "wan2.1-t2v-1.3b")
    with fake_gpu() as (launches, copies):
        network = true_size.load(tmp_path, GPU, "bfloat16", "eager").transformers[0]
        context = network.project([torch.randn(9, network.text_dim)], 512, (3, 60, 104))
        small = to_fp8(network, candidates(network), {})
        launches.clear()
        copies.clear()
        out = small(torch.empty(1, 16, 3, 60, 104, device=GPU), torch.tensor([0.5], dtype=torch.float64), context)
        assert out.shape == (1, 16, 3, 60, 104)
        layers = len(network.blocks)
        assert counted(launches) == {  # rows are quantised where they are made, but for attention's and the inner ones
            "modulate_kernel": 2 * layers + 1, "gate_residual_kernel": 3 * layers, "qk_norm_rope_kernel": layers,
            "quantise_rows_kernel": 3 * layers, "attention_fp8_kernel": layers,
            "quantise_heads_range_kernel": 3 * layers, "quantise_heads_kernel": 3 * layers,
        }  # fmt: skip
        assert copies == ["goes on"]  # sigma
        assert sum("row_scale" in launch.arguments for launch in launches) == 3 * layers


def counted(launches: list) -> Counter:
    return Counter(launch.kernel.__name__ for launch in launches)
