"""Warm start: every part that a request meets has run before it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from runtime.__main__ import main
from runtime.warming import parse_sizes
from tests.published import Tiny, channels_pipeline, control_pipeline, image_pipeline, write


class Watched:
    """A network that counts how it is called."""

    def __init__(self, network: Any, seen: Counter, name: str) -> None:
        self.network, self.seen, self.name = network, seen, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, projected: Any, *more: Any) -> torch.Tensor:
        self.seen[self.name, tuple(x.shape[2:]), projected.keys[0].shape[0], tuple(sigma.shape)] += 1
        return self.network(x, sigma, projected, *more)

    def decode_stream(self, latents: torch.Tensor, tile: Any = None, start: int = 0) -> Any:
        for chunk in self.network.decode_stream(latents, tile, start):
            self.seen["chunk", tuple(chunk.shape[2:])] += 1
            yield chunk

    def encode_stream(self, chunks: Any, tile: Any = None) -> Any:
        for chunk in self.network.encode_stream(chunks, tile):
            self.seen["encoded", tuple(chunk.shape[2:])] += 1
            yield chunk


def watched(model: Any) -> tuple[Any, Counter]:
    seen: Counter = Counter()
    networks = tuple(Watched(each, seen, f"expert {i}") for i, each in enumerate(model.transformers))
    return dataclasses.replace(model, transformers=networks, vae=Watched(model.vae, seen, "vae")), seen


@pytest.mark.parametrize("experts", [1, 2])
def test_a_request_meets_nothing_that_has_not_run(experts: int, tmp_path: Path) -> None:
    write(Tiny(experts=experts), tmp_path)
    model, seen = watched(runtime.load(tmp_path))
    runtime.warmup(model, [(32, 32, 13)])
    assert "text_encoder" in model.__dict__ and "tokenizer" in model.__dict__
    warm = set(seen)
    assert {name for name, *_ in warm} == {"chunk", *(f"expert {i}" for i in range(experts))}
    seen.clear()
    request = runtime.Request(prompt="a ball", negative_prompt="dark", width=32, height=32, num_frames=13, steps=6)
    for _ in runtime.generate(model, request):
        pass
    assert set(seen) <= warm


@pytest.mark.parametrize("build", [image_pipeline, channels_pipeline, control_pipeline])
def test_weights_that_take_pictures_are_shown_one(build: Any, tmp_path: Path) -> None:
    """In channels, as clean tokens beside frames at another level, or by a control branch: all of it has run."""
    write(Tiny(), tmp_path, build)
    model, seen = watched(runtime.load(tmp_path))
    runtime.warmup(model, [(32, 32, 9)])
    warm = set(seen)
    assert any(name == "encoded" for name, *_ in warm)
    picture = runtime.Clip(np.full((32, 32, 3), 200, np.uint8))
    plain = [] if model.spec.conditioning == "channels" else [()]
    for clips in [(picture,), *plain]:
        seen.clear()
        request = runtime.Request(prompt="a ball", clips=clips, width=32, height=32, num_frames=9, steps=3)
        for _ in runtime.generate(model, request):
            pass
        assert set(seen) <= warm


def test_a_machine_that_nobody_measured_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the first request would: `generate` puts what is foreseen on its receipt."""
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path))
    model = runtime.load("demo")
    runtime.warmup(model, [(32, 32, 1)])
    assert len(list((tmp_path / "machine").glob("*.json"))) == 1
    monkeypatch.setattr("runtime.calibration.measured", None)
    request = runtime.Request(prompt="a", width=32, height=32, num_frames=1, steps=1)
    assert runtime.generate(model, request).receipt.predicted["machine"].endswith("briefly")


def test_every_size_is_warmed_and_the_default_without_any() -> None:
    model, seen = watched(runtime.load("demo"))
    runtime.warmup(model)
    assert ("expert 0", (5, 12, 20), 2, (1,)) in seen
    runtime.warmup(model, parse_sizes("32x64x1, 96x32x5"))
    assert {("expert 0", (1, 8, 4), 2, (1,)), ("expert 0", (2, 4, 12), 2, (1,))} <= set(seen)
    assert {("chunk", (1, 64, 32)), ("chunk", (4, 32, 96))} <= set(seen)


@pytest.mark.parametrize("text", ["832x480", "832x480x", "axbxc", "32x32x0", ""])
def test_sizes_that_cannot_be_read_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="legal: WIDTHxHEIGHTxFRAMES"):
        parse_sizes(text)


def test_sizes_that_the_model_cannot_make_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a ball", "--warm", "33x32x5"]) == 2
    assert "take 32x32" in capsys.readouterr().err
