"""Engines on a GPU, with the built-in model and made-up texts, so that a bare machine runs them.

What is marked gpu runs on the CPU as well, where engines fall back, so that it is sound before a GPU is there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import runtime
from kernels.tolerance import judge
from runtime.denoising import compose, denoise, prepare_context
from runtime.engines import builder, eager, inductor, tensorrt
from runtime.engines.export import OUTPUT
from runtime.models.spec import Context, Denoiser
from runtime.schedules import make_schedule
from runtime.trace import recording

GRIDS = ((5, 8, 8), (1, 8, 8), (3, 12, 8))
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]


def shape_of(model: runtime.Model, grid: tuple[int, int, int] = GRIDS[0]) -> tuple[int, int, int, int]:
    return (model.spec.latent_channels, *grid)


def context_of(model: runtime.Model, shape: tuple[int, int, int, int]) -> Context:
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randn(length, model.transformers[0].text_dim, generator=generator) for length in (9, 30)]
    return prepare_context(model, texts, shape)


def run(device: str, engine: str, dtype: str, guidance: float) -> tuple[torch.Tensor, dict, list[str]]:
    model = runtime.load("demo", device=device, dtype=dtype, engine=engine)
    request = runtime.Request(prompt="any", steps=6, guidance=guidance, seed=1).resolved(model.spec)
    shape = shape_of(model)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5))
    sigmas = make_schedule(model.spec.schedule, 6, 3.0)
    stages: dict = {}
    notes: list[str] = []
    with torch.inference_mode(), recording(stages, notes):
        latents = denoise(model, noise, context_of(model, shape), sigmas, request)
    return latents.cpu(), stages, notes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_cuda_graph_is_eager_to_the_bit(device: str, dtype: str, guidance: float) -> None:
    found, stages, notes = run(device, "cuda_graph", dtype, guidance)
    if device == "cuda":
        assert notes == [] and stages["denoise/capture"].calls == 1
    else:
        assert notes == ["engine 'cuda_graph' needs an NVIDIA GPU, and the model is on cpu; it ran as 'eager'"]
    assert torch.equal(found, run(device, "eager", dtype, guidance)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_cuda_graph_at_two_sizes(device: str) -> None:
    graph = runtime.load("demo", device=device, engine="cuda_graph")
    plain = runtime.load("demo", device=device)
    request = runtime.Request(prompt="any", guidance=3.0, seed=1).resolved(graph.spec)
    ours, theirs = compose(graph, request, 80), compose(plain, request, 80)
    with torch.inference_mode(), recording({}, []):
        for grid in (GRIDS[0], GRIDS[2], GRIDS[0]):
            shape = shape_of(graph, grid)
            context = context_of(graph, shape)
            for level in (0.9, 0.5, 0.2):
                x = torch.randn(1, *shape, device=device)
                sigma = torch.tensor([level], dtype=torch.float64)
                assert torch.equal(ours(x, sigma, context), theirs(x, sigma, context))


def against_eager(run: Denoiser, model: runtime.Model) -> None:
    """At three sizes, twice each (the second may be a replay): at most twice as far from float32 as eager is."""
    exact = runtime.load("demo", device=model.device, dtype="float32")
    for grid in GRIDS:
        shape = shape_of(model, grid)
        x = torch.randn(1, *shape, device=model.device)
        sigma = torch.tensor([0.6], dtype=torch.float64)
        with torch.inference_mode():
            context = context_of(model, shape)
            wide = exact.transformers[0](x, sigma, context_of(exact, shape).experts[0])
            plain = eager.build(model.transformers[0], 0)(x, sigma, context)
            own = judge(plain, wide, plain, "bfloat16")
            for _ in range(2):
                verdict = judge(run(x, sigma, context), wide, plain, "bfloat16")
                assert verdict.missing == 0 and verdict.largest <= verdict.allowed, verdict
                assert verdict.rms <= 2 * own.rms, (verdict, own)


@pytest.mark.parametrize("device", DEVICES)
def test_eager_passes_the_rule(device: str) -> None:
    model = runtime.load("demo", device=device, dtype="bfloat16")
    against_eager(eager.build(model.transformers[0], 0), model)


@pytest.mark.gpu
def test_inductor_equals_eager() -> None:
    model = runtime.load("demo", device="cuda", dtype="bfloat16")
    against_eager(inductor.build(model.transformers[0], 0), model)


@pytest.mark.gpu
def test_tensorrt_equals_eager(tmp_path: Path) -> None:
    model = runtime.load("demo", device="cuda", dtype="bfloat16")
    gpu = builder.architecture(model.device)
    try:
        builder.library(gpu)
    except ValueError as error:
        pytest.skip(str(error))
    network = model.transformers[0]
    profiles = [builder.make_profile(model.spec, 64, 64, 17), builder.make_profile(model.spec, 96, 64, 9)]
    builder.build_engine(network, model.spec, profiles, gpu, "abc expert 0", builder.Options(stream=True))
    against_eager(tensorrt.build(network, 0, "abc"), model)
    (session,) = tensorrt._sessions[network].values()
    names = {session.engine.get_tensor_name(i) for i in range(session.engine.num_io_tensors)}
    assert {"tokens", "time", "rope", "bias", "keys.0", f"values.{len(network.blocks) - 1}", OUTPUT} <= names
    assert session.engine.num_optimization_profiles == 2
