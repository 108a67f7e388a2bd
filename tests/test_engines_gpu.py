"""Engines on a GPU, with the built-in model and made-up texts, so that a bare machine runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import runtime
from kernels.tolerance import judge
from runtime.denoising import compose, denoise, prepare_context
from runtime.engines import builder, eager, inductor, tensorrt
from runtime.engines.export import OUTPUT
from runtime.models.spec import Context
from runtime.schedules import make_schedule
from runtime.trace import recording

pytestmark = pytest.mark.gpu
SHAPE = (16, 5, 8, 8)


def context_of(model: runtime.Model, shape: tuple[int, int, int, int] = SHAPE) -> Context:
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randn(length, model.transformers[0].text_dim, generator=generator) for length in (9, 30)]
    return prepare_context(model, texts, shape)


def run(engine: str, dtype: str, guidance: float) -> tuple[torch.Tensor, dict, list[str]]:
    model = runtime.load("demo", device="cuda", dtype=dtype, engine=engine)
    request = runtime.Request(prompt="any", steps=6, guidance=guidance, seed=1).resolved(model.spec)
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5))
    sigmas = make_schedule(model.spec.schedule, 6, 3.0)
    stages: dict = {}
    notes: list[str] = []
    with torch.inference_mode(), recording(stages, notes):
        latents = denoise(model, noise, context_of(model), sigmas, request)
    return latents.cpu(), stages, notes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_cuda_graph_is_eager_to_the_bit(dtype: str, guidance: float) -> None:
    found, stages, notes = run("cuda_graph", dtype, guidance)
    assert notes == [] and stages["denoise/capture"].calls == 1
    assert torch.equal(found, run("eager", dtype, guidance)[0])


def test_cuda_graph_at_two_sizes() -> None:
    graph = runtime.load("demo", device="cuda", engine="cuda_graph")
    plain = runtime.load("demo", device="cuda")
    request = runtime.Request(prompt="any", guidance=3.0, seed=1).resolved(graph.spec)
    ours, theirs = compose(graph, request, 80), compose(plain, request, 80)
    with torch.inference_mode():
        for shape in (SHAPE, (16, 2, 12, 8), SHAPE):
            context = context_of(graph, shape)
            for level in (0.9, 0.5, 0.2):
                x = torch.randn(1, *shape, device="cuda")
                sigma = torch.tensor([level], dtype=torch.float64)
                assert torch.equal(ours(x, sigma, context), theirs(x, sigma, context))


def against_eager(run: object, model: runtime.Model) -> None:
    """Hold an engine's Denoiser to the tolerance rule at three sizes, twice each: the second is a replay."""
    exact = runtime.load("demo", device="cuda", dtype="float32").transformers[0]
    network = model.transformers[0]
    for shape in (SHAPE, (16, 1, 8, 8), (16, 3, 12, 8)):
        x = torch.randn(1, *shape, device="cuda")
        sigma = torch.tensor([0.6], dtype=torch.float64)
        with torch.inference_mode():
            context = context_of(model, shape)
            wide = exact(x, sigma, context_of(runtime.load("demo", device="cuda", dtype="float32"), shape).experts[0])
            plain = eager.build(network, 0)(x, sigma, context)
            for _ in range(2):
                verdict = judge(run(x, sigma, context), wide, plain, "bfloat16")
                assert verdict.correct, verdict


def test_inductor_equals_eager() -> None:
    model = runtime.load("demo", device="cuda", dtype="bfloat16")
    against_eager(inductor.build(model.transformers[0], 0), model)


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
    assert {"tokens", "time", "rope", "bias", "keys.0", "values.7", OUTPUT} <= names
    assert session.engine.num_optimization_profiles == 2
