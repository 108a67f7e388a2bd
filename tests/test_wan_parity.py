"""Against diffusers, float32, on checkpoints that diffusers wrote: transformer, latents, frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime
from runtime.denoising import prepare_context
from runtime.engines.eager import build
from tests.published import Tiny, relative, write

CONFIGS = {
    "plain": Tiny(),
    "wide": Tiny(heads=3, head_dim=16, layers=3, ffn=56, channels=6, text_dim=20, vae_width=6, shift=5.0, seed=10),
    "long-text": Tiny(heads=1, head_dim=24, text_length=64, cross_norm=False, res_blocks=2, shift=8.0, seed=20),
    "wan2.2-vae": Tiny(residual=True, channels=8, seed=30),
    "two-experts": Tiny(experts=2, boundary=0.9, shift=12.0, seed=40),
    "two-experts-odd": Tiny(experts=2, boundary=0.8755, head_dim=14, seed=50),
}
PROMPT = "a red ball rolls left over green grass"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict:
    root = tmp_path_factory.mktemp("published")
    return {name: (write(tiny, root / name), root / name) for name, tiny in CONFIGS.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 6, 4), (5, 4, 10)])
def test_transformer_forward(checkpoints: dict, name: str, shape: tuple[int, int, int]) -> None:
    pipe, folder = checkpoints[name]
    tiny = CONFIGS[name]
    model = runtime.load(folder)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, tiny.channels, *shape), generator=generator)
    texts = [torch.randn(n, tiny.text_dim, generator=generator) for n in (3, tiny.text_length)]
    context = prepare_context(model, texts, (tiny.channels, *shape))
    for expert, reference in enumerate((pipe.transformer, pipe.transformer_2)[: tiny.experts]):
        for time in (999, 421, 3):
            sigma = torch.tensor([time / 1000 + 0.0004], dtype=torch.float64)
            with torch.no_grad():
                ours = build(model.transformers[expert], expert)(x, sigma, context)
                for row, text in enumerate(texts):
                    padded = torch.zeros(1, tiny.text_length, tiny.text_dim)
                    padded[0, : len(text)] = text
                    theirs = reference(x, torch.tensor([time]), padded, return_dict=False)[0]
                    assert relative(ours[row : row + 1], theirs) <= 1e-4
                    alone = build(model.transformers[expert], expert)(x, sigma, context.row(row))
                    assert relative(alone, theirs) <= 1e-4


def test_sigma_per_latent_frame(checkpoints: dict) -> None:
    pipe, folder = checkpoints["plain"]
    model = runtime.load(folder)
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    text = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    times = torch.tensor([0, 700, 300])
    context = prepare_context(model, [text], (4, 3, 4, 4))
    with torch.no_grad():
        ours = build(model.transformers[0], 0)(x, (times[None] / 1000 + 1e-4).double(), context)
        theirs = pipe.transformer(x, times.repeat_interleave(4)[None], text[None], return_dict=False)[0]
    assert relative(ours, theirs) <= 1e-4


def test_sigma_and_texts_may_be_on_the_cpu(checkpoints: dict) -> None:
    """As on a GPU: only the weights and x are on the device. The meta device refuses mixtures like any other."""
    model = runtime.load(checkpoints["plain"][1])
    network = model.transformers[0].to("meta")
    context = prepare_context(model, [torch.randn(3, 16), torch.randn(24, 16)], (4, 2, 4, 4))
    x = torch.empty(1, 4, 2, 4, 4, device="meta")
    velocity = build(network, 0)(x, torch.tensor([0.5], dtype=torch.float64), context)
    assert velocity.shape == (2, 4, 2, 4, 4)
    assert velocity.device.type == "meta"


CASES = [
    ("plain", 17, 48, 32, 20, 5.0, None),
    ("wide", 5, 32, 64, 20, 3.0, None),
    ("long-text", 1, 64, 48, 20, 6.0, None),
    ("long-text", 5, 32, 32, 7, 1.0, None),
    ("wan2.2-vae", 5, 32, 64, 20, 4.0, None),
    ("wan2.2-vae", 1, 64, 32, 20, 4.0, None),
    ("two-experts", 5, 32, 48, 20, 4.0, 3.0),
    ("two-experts-odd", 5, 48, 32, 20, 2.0, 6.0),
]


@pytest.mark.parametrize(("name", "frames", "height", "width", "steps", "guidance", "guidance_2"), CASES)
def test_whole_request(
    checkpoints: dict,
    name: str,
    frames: int,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    guidance_2: float | None,
) -> None:
    pipe, folder = checkpoints[name]
    request = runtime.Request(
        prompt=PROMPT,
        negative_prompt="blurry",
        width=width,
        height=height,
        num_frames=frames,
        window=-(-frames // 4) * 4 + 13,  # at once, whatever the model's own length is
        steps=steps,
        guidance=guidance,
        guidance_2=guidance_2,
        seed=11,
    )
    video = runtime.generate(runtime.load(folder), request)
    latents, theirs = reference(pipe, CONFIGS[name].text_length, request)
    assert relative(video.latents, latents) <= 1e-3
    difference = np.abs(video.frames.astype(int) - theirs.astype(int))
    assert difference.max() <= 1


def test_the_experts_take_turns_where_a_request_says(checkpoints: dict) -> None:
    pipe, folder = checkpoints["two-experts"]
    request = runtime.Request(prompt=PROMPT, width=48, height=32, num_frames=5, steps=6, guidance=1.0, seed=11)
    model, own = runtime.load(folder), pipe.config.boundary_ratio
    pipe.register_to_config(boundary_ratio=0.6)
    try:
        latents, _ = reference(pipe, CONFIGS["two-experts"].text_length, request)
    finally:
        pipe.register_to_config(boundary_ratio=own)
    asked, published = (runtime.generate(model, replace(request, boundary=at)).latents for at in (0.6, None))
    assert relative(asked, latents) <= 1e-3 < relative(published, latents)


def reference(pipe: object, text_length: int, request: runtime.Request) -> tuple[torch.Tensor, np.ndarray]:
    """Return diffusers' latents [C, T, H, W] and frames, from its own generator on the CPU."""
    arguments = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "guidance_scale_2": request.guidance_2,
        "max_sequence_length": text_length,
    }
    results = []
    for output in ("latent", "np"):
        generator = torch.Generator().manual_seed(request.seed)
        results.append(pipe(**arguments, generator=generator, output_type=output).frames[0])
    return torch.as_tensor(results[0]), np.round(results[1] * 255).astype(np.uint8)


def test_demo_checkpoint(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    model = runtime.load("demo")
    pipe = WanPipeline.from_pretrained(model.checkpoint.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    request = runtime.Request(
        prompt=PROMPT, width=64, height=64, num_frames=17, steps=25, guidance=4.0, shift=3.0, seed=7
    )
    video = runtime.generate(model, request)
    latents, theirs = reference(pipe, 512, request)
    assert relative(video.latents, latents) <= 1e-3
    assert np.abs(video.frames.astype(int) - theirs.astype(int)).max() <= 1
    assert video.receipt.request["steps"] == model.spec.defaults.steps == 25
