"""The sides that are measured: this runtime and diffusers, each doing the same stage from the same input.

A stage is a method that takes the number of the take, which makes the prompts new each time, and returns its result.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import runtime
from benchmarks import true_size
from benchmarks.machine import installed
from runtime.denoising import compose, prepare_context
from runtime.latents import draw_noise
from runtime.model import choose_dtype
from runtime.models.spec import Context, Denoiser, ModelSpec
from runtime.request import Request
from runtime.tasks import plan_task
from runtime.text import encode_prompt
from runtime.weights import read_json


@dataclass(frozen=True)
class Case:
    """One model and what is asked of it; `request` is resolved, its prompts change with each take."""

    folder: Path
    spec: ModelSpec
    request: Request
    dtype: str = "float32"
    engine: str = "eager"  # this runtime's
    random: bool = False  # the folder holds configs alone, see true_size

    def take(self, number: int) -> Request:
        """Return the request with a prompt and a negative prompt of its own, so that no cache has them."""
        return replace(
            self.request,
            prompt=f"a red ball rolls left over green grass, take {number}",
            negative_prompt=f"blurry, take {number}",
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[C, T, H, W] of the latents."""
        return plan_task(self.request, self.spec).windows[0].shape

    def inputs(self) -> tuple[torch.Tensor, np.ndarray]:
        """Return random latents [1, C, T, H, W] and frames uint8 [F, H, W, 3], the same each time."""
        assert self.request.num_frames and self.request.height and self.request.width
        size = (self.request.num_frames, *self.spec.canvas(self.request.height, self.request.width), 3)
        frames = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
        return draw_noise(self.shape, seed=1), frames


class Side(Protocol):
    """Something that can make the whole request and each of its stages."""

    name: str

    def __init__(self, case: Case, device: torch.device) -> None: ...

    @property
    def networks(self) -> list[torch.nn.Module]:
        """All networks, loaded."""

    def request(self, take: int) -> np.ndarray:
        """From new prompts to frames uint8 [F, H, W, 3] in memory."""

    def text(self, take: int) -> list[torch.Tensor]:
        """Encode new prompts: embeddings of negative prompt and prompt [S, text_dim]."""

    def step(self, take: int) -> torch.Tensor:
        """One guided velocity [1, C, T, H, W], halfway down the schedule."""

    def decode(self, take: int) -> np.ndarray:
        """From latents to frames uint8 [F, H, W, 3] in memory."""

    def decode_bfloat16(self, take: int) -> np.ndarray:
        """The same, by this runtime in bfloat16; by the other side as in `decode`."""

    def encode(self, take: int) -> torch.Tensor:
        """From frames to normalised latents [C, T, H, W] in memory."""


class Ours:
    """This runtime, through its public functions; a step through the Denoiser that its sampler calls."""

    name = "dit-runtime"

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.latents, self.frames = case.inputs()
        if case.random:
            self.model = true_size.load(case.folder, device, case.dtype, case.engine)
        else:
            self.model = runtime.load(case.folder, device=device, dtype=case.dtype, engine=case.engine)
        _ = self.model.text_encoder, self.model.tokenizer  # else read at the first prompt; diffusers reads them here

    @property
    def networks(self) -> list[torch.nn.Module]:
        return [self.model.text_encoder, *self.model.transformers, self.model.vae]

    def request(self, take: int) -> np.ndarray:
        return runtime.generate(self.model, self.case.take(take)).frames

    def text(self, take: int) -> list[torch.Tensor]:
        return encode_prompt(self.model, self.case.take(take))[0]

    def step(self, take: int) -> torch.Tensor:
        with torch.inference_mode():
            return self.denoiser(*self.step_inputs)

    @cached_property
    def denoiser(self) -> Denoiser:
        """What the sampler calls."""
        shape, patch = self.case.shape, self.case.spec.patch
        return compose(self.model, self.case.request, math.prod(n // p for n, p in zip(shape[1:], patch, strict=True)))

    @cached_property
    def step_inputs(self) -> tuple[torch.Tensor, torch.Tensor, Context]:
        """x, sigma halfway down the schedule, and the context of a prompt."""
        case, request = self.case, self.case.request
        assert request.steps is not None and request.shift is not None
        with torch.inference_mode():
            context = prepare_context(self.model, self.text(0), case.shape)
        middle = request.steps // 2
        sigma = request.schedule(case.spec)[middle : middle + 1]
        return self.latents.to(self.device), sigma, context

    def by(self, engine: str) -> Ours:
        """Return the same model run by another engine."""
        other = copy.copy(self)
        other.__dict__.pop("denoiser", None)
        other.model = copy.copy(self.model)
        other.model.engine = engine
        return other

    def decode(self, take: int) -> np.ndarray:
        return runtime.decode(self.model, self.latents, dtype="float32").frames

    def decode_bfloat16(self, take: int, tile: tuple[int, int] | None = None) -> np.ndarray:
        return runtime.decode(self.model, self.latents, dtype="bfloat16", tile=tile).frames

    def bfloat16_psnr(self, count: int | None = None) -> float:
        """Return how near, in dB, pixels decoded in bfloat16 are to those in float32, before they become bytes; of the
        first `count` latent frames (None: all)."""
        latents = self.latents[:, :, :count].to(self.device)
        frames = 1 + (latents.shape[2] - 1) * self.case.spec.stride[0]
        networks = [self.model.autoencoder(self.device, dtype) for dtype in (torch.float32, torch.bfloat16)]
        squares = [
            float((exact - rounded).double().square().mean()) * exact.shape[2]
            for exact, rounded in zip(*(network.decode_stream(latents) for network in networks), strict=True)
        ]
        return 10 * math.log10(4 / (sum(squares) / frames))

    def encode(self, take: int) -> torch.Tensor:
        return runtime.encode(self.model, self.frames)


class Diffusers:
    """diffusers' WanPipeline as published; parts of it are called as the pipeline calls them."""

    name = "diffusers"

    def __init__(self, case: Case, device: torch.device, beside: Ours | None = None) -> None:
        """Load; of random weights those of the side `beside` are shared."""
        import transformers
        from diffusers.utils import logging

        logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        self.case, self.device = case, device
        self.latents, self.frames = case.inputs()
        self.dtype = choose_dtype(case.dtype, device)
        self.pipe: Any = (
            random_pipeline(case, device, None if beside is None else beside.model)
            if case.random
            else saved_pipeline(case, device, self.dtype)
        )
        self.pipe.set_progress_bar_config(disable=True)
        statistics = torch.tensor([self.pipe.vae.config.latents_mean, self.pipe.vae.config.latents_std], device=device)
        self.mean, self.std = statistics.view(2, 1, -1, 1, 1, 1)

    @property
    def networks(self) -> list[torch.nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]

    def request(self, take: int) -> np.ndarray:
        request = self.case.take(take)
        assert request.seed is not None
        video = self.pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            guidance_scale_2=request.guidance_2,
            max_sequence_length=self.case.spec.text_length,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pt",  # the type from which bytes are made fastest
        ).frames[0]
        return self._to_bytes(video)

    @torch.no_grad()
    def text(self, take: int) -> list[torch.Tensor]:
        request = self.case.take(take)
        prompt, negative = self.pipe.encode_prompt(
            request.prompt, request.negative_prompt, max_sequence_length=self.case.spec.text_length, device=self.device
        )
        return [negative[0], prompt[0]]

    @torch.no_grad()
    def step(self, take: int) -> torch.Tensor:
        x, time, negative, prompt = self._step
        x = x.to(self.dtype)
        scale, network = self.case.request.guidance or 0.0, self.pipe.transformer
        conditional = network(x, time, prompt, return_dict=False)[0]
        if scale <= 1:
            return conditional
        unconditional = network(x, time, negative, return_dict=False)[0]
        return unconditional + scale * (conditional - unconditional)

    @cached_property
    def _step(self) -> tuple[torch.Tensor, ...]:
        x = self.latents.to(self.device)
        self.pipe.scheduler.set_timesteps(self.case.request.steps, device=self.device)
        time = self.pipe.scheduler.timesteps[len(self.pipe.scheduler.timesteps) // 2].expand(1)
        if self.pipe.config.expand_timesteps:  # then a time per token
            _, patch_height, patch_width = self.pipe.transformer.config.patch_size
            time = time.expand(1, x[0, 0, :, ::patch_height, ::patch_width].numel())
        negative, prompt = self.text(0)
        return x, time, negative[None], prompt[None]

    @torch.no_grad()
    def decode(self, take: int) -> np.ndarray:
        latents = self.latents.to(self.device) * self.std + self.mean
        video = self.pipe.vae.decode(latents.to(self.pipe.vae.dtype), return_dict=False)[0]
        return self._to_bytes(self.pipe.video_processor.postprocess_video(video, output_type="pt")[0])

    def decode_bfloat16(self, take: int) -> np.ndarray:
        return self.decode(take)

    @torch.no_grad()
    def encode(self, take: int) -> torch.Tensor:
        pixels = torch.from_numpy(self.frames).to(self.device).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)
        latents = self.pipe.vae.encode(pixels[None]).latent_dist.mode()
        return ((latents - self.mean) / self.std)[0].cpu()

    def _to_bytes(self, video: torch.Tensor) -> np.ndarray:
        """[F, 3, H, W] in [0, 1] -> uint8 [F, H, W, 3]."""
        return video.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def at_case(side: Ours | Diffusers, case: Case) -> None:
    """Let a loaded side work at another size of the same model."""
    side.case = case
    side.latents, side.frames = case.inputs()
    for name in ("denoiser", "step_inputs", "_step"):
        side.__dict__.pop(name, None)


class DiffusersCompiled(Diffusers):
    """The same, its transformers' blocks compiled one by one, as its documentation advises."""

    name = "diffusers, compiled"

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        for name in ("transformer", "transformer_2"):
            if (network := getattr(self.pipe, name, None)) is not None:
                for block in network.blocks:
                    block.compile(dynamic=False)


def saved_pipeline(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    """Return diffusers' pipeline of a checkpoint, its VAE in float32 as its documentation has it."""
    from diffusers import AutoencoderKLWan, WanPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument's newer name is unknown to older versions
        vae = AutoencoderKLWan.from_pretrained(case.folder, subfolder="vae", torch_dtype=torch.float32)
        return WanPipeline.from_pretrained(case.folder, vae=vae, torch_dtype=dtype).to(device)


def random_pipeline(case: Case, device: torch.device, loaded: runtime.Model | None) -> Any:
    """Return diffusers' pipeline of a folder of configs, with the weights that this runtime has there."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    def build(name: str) -> Any:
        config = read_json(case.folder / name / "config.json")
        with init_empty_weights(include_buffers=False):  # 14B in float32 would take 57 GB only to be replaced
            if name == "text_encoder":
                return UMT5EncoderModel(UMT5Config(**config))
            return AutoencoderKLWan(**config) if name == "vae" else WanTransformer3DModel(**config)

    networks = true_size.fill_peer(case.folder, device, case.dtype, build, loaded)
    index = read_json(case.folder / "model_index.json")
    return WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(case.folder / "tokenizer"),
        scheduler=UniPCMultistepScheduler.from_config(read_json(case.folder / "scheduler" / "scheduler_config.json")),
        boundary_ratio=index["boundary_ratio"],
        expand_timesteps=index["expand_timesteps"],
        **networks,
    )


RIVALS: dict[str, list[type[Side]]] = {
    "diffusers": [Diffusers],
    "compiled": [DiffusersCompiled],
    "both": [Diffusers, DiffusersCompiled],
}


def rival(name: str | None) -> list[type[Side]]:
    """Return the sides that `name` asks for, none for None; ValueError where they are not installed."""
    if name is None:
        return []
    if installed("diffusers") is None:
        raise ValueError("diffusers is not installed; install it with: pip install diffusers, or leave out --against")
    return [*RIVALS[name]]
