"""Frames -> latents: the ladder, what fits, and what cannot be encoded or decoded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runtime
from runtime.decoding import Rung, fitting, ladder, out_of_memory
from tests.failing import Failing
from tests.published import Tiny, relative, write

FRAMES = np.random.default_rng(0).integers(0, 256, (9, 240, 384, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    folder = tmp_path_factory.mktemp("tiny")
    write(Tiny(), folder)
    return runtime.load(folder)


@pytest.fixture(scope="module")
def whole(model: runtime.Model) -> torch.Tensor:
    return runtime.encode(model, FRAMES)


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(failures=st.lists(st.integers(0, 2), max_size=5), streamed=st.booleans())
def test_an_encode_steps_down_to_the_same_latents(
    model: runtime.Model, whole: torch.Tensor, failures: list[int], streamed: bool
) -> None:
    """Wherever memory runs out, of arrays and of videos, down to the CPU as on a GPU."""
    network, frames = Failing(model.vae, list(failures)), FRAMES
    if streamed:
        frames = runtime.Video(lambda: iter(FRAMES), fps=8, num_frames=9, height=240, width=384)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "vae", network)
        patched.setattr("runtime.decoding.ladder", lambda *given: [*ladder(*given), Rung("the CPU", None, True)])
        if failures:
            with pytest.warns(UserWarning, match="encoding whole frames ran out of memory; began anew with tiles of"):
                found = runtime.encode(model, frames)
        else:
            found = runtime.encode(model, frames)
    assert relative(found, whole) <= 3e-5
    assert len(network.tiles) == len(failures) + 1


def test_the_last_rung_of_an_encode_raises(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "vae", Failing(model.vae, [0] * 9))
    with pytest.warns(UserWarning, match="began anew"), pytest.raises(torch.OutOfMemoryError):
        runtime.encode(model, FRAMES)


def test_known_frames_step_down_too(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a request has them; the receipt says so."""
    clip = runtime.Clip(np.full((5, 240, 384, 3), 90, np.uint8))
    request = runtime.Request(prompt="a", width=384, height=240, num_frames=9, steps=1, seed=0, clips=(clip,))
    plain = runtime.generate(model, request)
    monkeypatch.setattr(model, "vae", Failing(model.vae, [1]))
    video = runtime.generate(model, request)
    assert [text for text in video.receipt.notes if text.startswith("encoding whole frames ran out")]
    assert np.abs(plain.frames.astype(int) - video.frames.astype(int)).max() <= 1


def test_an_encode_begins_with_what_fits(
    model: runtime.Model, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (3, 30, 48)
    needed = {
        tile: model.costs.encode(shape, tile, 4).live for tile in (rung.tile for rung in ladder(model, 240, 384, None))
    }
    least = min(needed, key=needed.__getitem__)
    for free, expected in ((2 * needed[None], None), (0, least)):
        monkeypatch.setattr("runtime.decoding.free_memory", lambda _, free=free: free)
        network = Failing(model.vae, [])
        with monkeypatch.context() as patched:
            patched.setattr(model, "vae", network)
            assert relative(runtime.encode(model, FRAMES), whole) <= 3e-5
        assert network.tiles == [expected]
    assert least is not None
    assert fitting(replace(model, memory=1, tile=(96, 112)), shape, torch.float32, "encode") == (96, 112)


@pytest.mark.parametrize("tile", [(64,), (160, 160, 3), "640x384", 640, (160.5, 200), (None, 160), (True, True)])
def test_what_is_no_tile(model: runtime.Model, tile: Any) -> None:
    with pytest.raises(ValueError, match=r"tile is .*; legal: \(height, width\) in whole pixels, or None"):
        runtime.decode(model, torch.zeros(4, 1, 20, 20), tile=tile)
    with pytest.raises(ValueError, match=r"tile is .*; legal: \(height, width\) in whole pixels, or None"):
        runtime.encode(model, FRAMES[:1], tile=tile)


def test_numbers_that_a_dtype_cannot_hold() -> None:
    model = runtime.load("demo")
    latents = 1000 * torch.randn(32, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert runtime.decode(model, latents).frames.shape == (5, 32, 32, 3)
    with pytest.raises(ValueError, match=r"latent frame 0, decoded in float16, holds NaN; legal: .* float32"):
        _ = runtime.decode(model, latents, dtype="float16").frames
    with pytest.raises(ValueError, match=r"NaN or infinity in latent frame 1; legal: finite numbers of float32"):
        runtime.decode(model, torch.stack([latents[:, 0], latents[:, 1].double() * 1e300], dim=1))


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("the memory of a goldfish"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: Exception, memory: bool) -> None:
    assert out_of_memory(error) == memory
