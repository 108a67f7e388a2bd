"""generate(), decode() and encode(): same seed same bytes, callbacks, cancelling, receipts, round trips."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import runtime
from runtime import Request
from runtime.video import Video

REQUEST = Request(prompt="a red ball rolls left over green grass", width=64, height=64, num_frames=5, steps=3, seed=7)


@pytest.fixture(scope="module")
def model() -> runtime.Model:
    return runtime.load("demo")


def digest(video: Video) -> str:
    return hashlib.sha256(video.frames.tobytes()).hexdigest()


def test_same_seed_same_bytes(model: runtime.Model) -> None:
    first = digest(runtime.generate(model, REQUEST))
    other = runtime.generate(model, Request(prompt="a blue cube", width=96, height=32, num_frames=1, steps=2, seed=1))
    assert digest(other) != first
    assert digest(runtime.generate(model, REQUEST)) == first
    assert digest(runtime.generate(runtime.load("demo"), REQUEST)) == first


def test_same_bytes_in_another_process(model: runtime.Model) -> None:
    code = (
        f"import hashlib, runtime, torch; torch.set_num_threads({torch.get_num_threads()});"
        f"r = runtime.Request(prompt={REQUEST.prompt!r}, width=64, height=64, num_frames=5, steps=3, seed=7);"
        "print(hashlib.sha256(runtime.generate(runtime.load('demo'), r).frames.tobytes()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ.copy()
    )
    assert run.stdout.strip() == digest(runtime.generate(model, REQUEST))


def test_noise_may_be_given(model: runtime.Model) -> None:
    noise = torch.randn(1, 32, 2, 8, 8, generator=torch.Generator().manual_seed(7))
    drawn = runtime.generate(model, REQUEST)
    assert torch.equal(runtime.generate(model, REQUEST, noise=noise).latents, drawn.latents)
    assert torch.equal(runtime.generate(model, REQUEST, noise=noise[0]).latents, drawn.latents)
    assert not torch.equal(runtime.generate(model, REQUEST, noise=noise + 1).latents, drawn.latents)


def test_on_step_sees_every_step(model: runtime.Model) -> None:
    seen = []
    video = runtime.generate(model, REQUEST, on_step=lambda step, total, x, _: seen.append((step, total, x.clone())))
    assert [(step, total) for step, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(seen[-1][2][0], video.latents)


def test_cancelling(model: runtime.Model) -> None:
    def stop(step: int, total: int, latents: torch.Tensor, estimate: torch.Tensor) -> None:
        if step == 2:
            raise runtime.Cancelled

    with pytest.raises(runtime.Cancelled):
        runtime.generate(model, REQUEST, on_step=stop)
    assert digest(runtime.generate(model, REQUEST)) == digest(runtime.generate(model, REQUEST))


def test_video(model: runtime.Model) -> None:
    video = runtime.generate(model, REQUEST)
    assert video.fps == 8
    assert video.latents.shape == (32, 2, 8, 8)
    assert video.latents.dtype == torch.float32
    frames = list(video)
    assert [frame.shape for frame in frames] == [(64, 64, 3)] * 5
    assert video.frames.dtype == np.uint8
    assert np.array_equal(np.stack(frames), video.frames)
    # A normal tensor: a user may train on it or change it.
    video.latents.requires_grad_(True).sum().backward()


def test_frames_leave_as_they_are_decoded(model: runtime.Model) -> None:
    """A latent frame is decoded when its first frame is taken, not before."""
    video = runtime.generate(model, Request(prompt="a", num_frames=49, steps=1, seed=0))
    calls = []
    conv_in = model.vae.decoder.conv_in
    hook = conv_in.register_forward_hook(lambda *_: calls.append(1))
    frames = iter(video)
    assert not calls
    for taken in range(1, 7):
        next(frames)
        chunks = 1 + (taken + 2) // 4
        assert len(calls) == chunks
    frames.close()
    hook.remove()


def test_receipt(model: runtime.Model) -> None:
    video = runtime.generate(model, Request(prompt="a ball", num_frames=5, steps=2))
    receipt = video.receipt
    assert receipt.seed == receipt.request["seed"]
    assert "decode" not in receipt.stages
    again = runtime.generate(model, Request(**receipt.request))
    assert digest(again) == digest(video)
    record = json.loads(receipt.to_json())
    assert record["request"]["sampler"] == "unipc"
    assert record["model"] == "demo"
    assert record["model_hash"].startswith("sha256:")
    assert (record["device"], record["dtype"], record["engine"]) == ("cpu", "float32", "eager")
    assert record["approximations"] == []
    assert record["versions"]["torch"] == torch.__version__
    for stage in ("load", "text", "denoise", "decode"):
        assert record["stages"][stage]["seconds"] > 0
        assert record["stages"][stage]["peak_bytes"] > 50 << 20
    assert record["stages"]["denoise/step"]["calls"] == 2
    assert record["stages"]["decode"]["calls"] == 3  # two latent frames and the end


def test_decode_and_encode_are_the_two_ends(model: runtime.Model) -> None:
    video = runtime.generate(model, Request(prompt="a red ball", seed=3))
    assert np.array_equal(runtime.decode(model, video.latents).frames, video.frames)
    assert np.array_equal(runtime.decode(model, video.latents[None]).frames, video.frames)
    latents = runtime.encode(model, video.frames)
    assert latents.shape == video.latents.shape
    assert torch.equal(latents, runtime.encode(model, video))
    back = runtime.decode(model, latents).frames.astype(float)
    error = np.mean((back - video.frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 25  # dB; the demo VAE reconstructs its own world


def test_encode_equals_diffusers(model: runtime.Model) -> None:
    from diffusers import AutoencoderKLWan

    from tests.published import DEMO, relative

    vae = AutoencoderKLWan.from_pretrained(DEMO / "vae")
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()[0]
    shape = (-1, 1, 1, 1)
    theirs = (mean - torch.tensor(vae.config.latents_mean).view(shape)) / torch.tensor(vae.config.latents_std).view(
        shape
    )
    assert relative(runtime.encode(model, frames), theirs) <= 1e-4


@pytest.mark.parametrize(
    ("latents", "sentence"),
    [
        (torch.zeros(8, 2, 8, 8), r"shape \[8, 2, 8, 8\]; legal: \[32, any, any, any\]"),
        (torch.zeros(32, 8, 8), "shape"),
        (torch.zeros(32, 2, 8, 8, dtype=torch.uint8), "floating-point"),
        (torch.cat([torch.zeros(32, 2, 8, 8), torch.full((32, 1, 8, 8), torch.inf)], 1), "latent frame 2"),
    ],
)
def test_refused_latents(model: runtime.Model, latents: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        runtime.decode(model, latents)


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        (np.zeros((5, 60, 64, 3), np.uint8), "64x60.*scale or crop to 64x56 or 64x64"),
        (np.zeros((4, 64, 64, 3), np.uint8), "give 1 or 5"),
        (np.zeros((0, 64, 64, 3), np.uint8), "give 1 or 5"),
        (np.zeros((5, 64, 64, 4), np.uint8), "uint8"),
        (np.zeros((5, 64, 64, 3)), "float64"),
        ([1, 2], "list"),
    ],
)
def test_refused_frames(model: runtime.Model, frames: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        runtime.encode(model, frames)


def test_latents_that_explode_are_an_error(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = runtime.load("demo")
    broken.transformers[0].head.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite after 3 steps"):
        runtime.generate(broken, REQUEST)


def test_batched_and_separate_guidance_agree(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    together = runtime.generate(model, REQUEST).latents
    monkeypatch.setattr("runtime.denoising.BATCHED_TOKENS", 0)
    assert torch.allclose(runtime.generate(model, REQUEST).latents, together, atol=1e-4)


def test_euler_on_a_unipc_checkpoint(model: runtime.Model) -> None:
    video = runtime.generate(model, Request(prompt="a red ball", steps=8, seed=7, sampler="euler"))
    assert torch.isfinite(video.latents).all()
    assert video.receipt.request["sampler"] == "euler"
