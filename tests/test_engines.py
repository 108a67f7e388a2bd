"""Engines against eager: the same numbers, a start without compiling, and what they say where they cannot work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import runtime
from kernels.tolerance import judge
from runtime.denoising import prepare_context
from runtime.engines import cuda_graph, eager, inductor
from runtime.engines.store import Store
from runtime.trace import recording
from tests.published import Tiny, write

PROMPT = "a red ball rolls left over green grass"
SMALL = runtime.Request(prompt=PROMPT, width=32, height=32, num_frames=5, steps=2, guidance=3.0, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write(Tiny(seed=70), folder)
    return folder


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of a module, so that each kind of block is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _warm_cache(warm: Path, monkeypatch: pytest.MonkeyPatch, _own_cache: None) -> None:
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(warm))


def refuse(*_: object) -> None:
    raise AssertionError("this must not be compiled")


def arguments(model: runtime.Model, shape: tuple[int, int, int], lengths: tuple[int, ...]) -> tuple:
    """A Denoiser's arguments, with one prompt per length."""
    generator = torch.Generator().manual_seed(9)
    channels = model.spec.latent_channels
    x = torch.randn(1, channels, *shape, generator=generator)
    texts = [torch.randn(n, model.transformers[0].text_dim, generator=generator) for n in lengths]
    return x, torch.tensor([0.6123], dtype=torch.float64), prepare_context(model, texts, (channels, *shape))


def test_inductor_equals_eager_at_sizes_it_was_not_compiled_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = runtime.load(tiny)
    network = model.transformers[0]
    for number, (shape, length) in enumerate([((2, 4, 6), 7), ((5, 8, 4), 19), ((1, 2, 2), 3)]):
        given = arguments(model, shape, (length,))
        with torch.inference_mode():
            ours, plain = inductor.build(network, 0)(*given), eager.build(network, 0)(*given)
        verdict = judge(ours, plain)
        assert verdict.correct, verdict
        if number == 0:
            monkeypatch.setattr(inductor, "package", refuse)
    assert [entry.key.kind for entry in Store().entries()] == ["inductor"]


def test_inductor_with_frames_at_different_levels(tiny: Path) -> None:
    model = runtime.load(tiny)
    x, _, context = arguments(model, (3, 4, 4), (7,))
    sigma = torch.tensor([[0.0, 0.6, 0.6]], dtype=torch.float64)
    network = model.transformers[0]
    with torch.inference_mode():
        verdict = judge(inductor.build(network, 0)(x, sigma, context), eager.build(network, 0)(x, sigma, context))
    assert verdict.correct, verdict


def test_what_compiled_code_is_bound_to(tiny: Path) -> None:
    block = runtime.load(tiny).transformers[0].blocks[0]
    shapes = [(1, 96, 24), (1, 1, 6, 24), (2, 7, 2, 12), (2, 7, 2, 12), None, (96, 6, 2), (1, 5, 2, 12), (1, 5, 2, 12)]
    given = [None if shape is None else torch.zeros(shape) for shape in shapes]
    text = ("float32 1 L 24", "float32 1 1 6 24", "float32 2 S 2 12", "float32 2 S 2 12", "none", "float32 L 6 2")
    assert inductor.pattern(block, tuple(given[:6])) == text
    assert inductor.pattern(block, tuple(given)) == (*text, "float32 1 5 2 12", "float32 1 5 2 12")  # with pictures
    given[1] = torch.zeros(1, 3, 6, 24)  # three levels: the tokens are a multiple of three
    assert inductor.pattern(block, tuple(given[:6]))[:2] == ("float32 1 96 24", "float32 1 3 6 24")


def test_generate_with_inductor(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = runtime.generate(runtime.load(tiny), SMALL)
    video = runtime.generate(runtime.load(tiny, engine="inductor"), SMALL)
    assert video.receipt.engine == "inductor" and video.receipt.notes == []
    assert video.receipt.stages["denoise/compile"].calls >= 1
    verdict = judge(video.latents, plain.latents)
    assert verdict.correct, verdict
    # A new process, and other weights of the same shape, start without compiling.
    write(Tiny(seed=71), tmp_path / "other")
    for folder in (tiny, tmp_path / "other"):
        code = (
            "import sys, runtime; from runtime.engines import inductor; inductor.package = None;"
            f"model = runtime.load({str(folder)!r}, engine='inductor');"
            f"runtime.generate(model, runtime.Request(prompt={PROMPT!r}, width=64, height=32, num_frames=9, steps=1,"
            "guidance=3.0)).latents.sum()"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.fault(36)
def test_damaged_packages_are_compiled_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runtime.load(tiny)
    given = arguments(model, (2, 4, 6), (7,))
    with torch.inference_mode():
        expected = inductor.build(model.transformers[0], 0)(*given)
        entry = Store().entries()[0]  # the one just used
        file = Store().folder / entry.name / inductor.PACKAGE
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        monkeypatch.setattr(inductor, "package", lambda block, given, path: path.write_bytes(whole))
        with pytest.warns(UserWarning, match="truncated or replaced; it is made again"):
            found = inductor.build(runtime.load(tiny).transformers[0], 0)(*given)
        assert torch.equal(found, expected) and file.read_bytes() == whole


def test_no_compiler_says_what_to_install(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path))
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match="finds no compiler; install g\\+\\+, or take eager"):
        runtime.generate(runtime.load(tiny, engine="inductor"), SMALL)


def test_where_packaging_fails_blocks_are_compiled_in_the_process(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such backend")

    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    request = runtime.Request(prompt=PROMPT, width=32, height=32, num_frames=1, steps=2, guidance=1.0, seed=3)
    video = runtime.generate(runtime.load(tiny, engine="inductor"), request)
    (said,) = video.receipt.notes
    assert "no compiled package could be made (no such backend)" in said
    assert judge(video.latents, runtime.generate(runtime.load(tiny), request).latents).correct
    assert Store().entries() == []


def test_cuda_graph_without_a_gpu_runs_as_eager_and_says_so(tiny: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    plain = runtime.generate(runtime.load(tiny), SMALL)
    video = runtime.generate(runtime.load(tiny, engine="cuda_graph"), SMALL)
    assert torch.equal(video.latents, plain.latents)
    (said,) = video.receipt.notes
    assert said == "engine 'cuda_graph' needs an NVIDIA GPU, and the model is on cpu; it ran as 'eager'"


def test_cuda_graph_goes_on_where_recording_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_graph, "record", fail)
    there = SimpleNamespace(device=torch.device("cuda"), shape=(1, 4), to=lambda device, **_: there)
    asked: list[object] = []
    denoiser = cuda_graph.captured(lambda x, sigma, context: asked.append(context) or len(asked))
    notes: list[str] = []
    with recording({}, notes):
        assert [denoiser(there, there, "context") for _ in range(4)] == [1, 2, 3, 4]
    assert notes == [
        "the forward could not be recorded as a CUDA graph (operation not permitted when stream is capturing); "
        "it ran as 'eager'"
    ]
