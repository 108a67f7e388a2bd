"""Warm start: what only a first request would pay is paid before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.decoding import decode
from runtime.denoising import denoise, prepare_context
from runtime.latents import draw_noise
from runtime.model import Model
from runtime.request import Request
from runtime.text import run_encoder, texts_of

CHUNKS = 3  # latent frames after which every further one is decoded as the last: first, second, steady

HIGHEST = 0.999  # sigma; at 1 itself no sampler of higher order can start

Size = tuple[int, int, int]  # width, height, frames


def warmup(model: Model, sizes: Sequence[Size] = ()) -> None:
    """Run each part of a request once for each (width, height, frames), or for the model's own default.

    The text encoder where it stays, both experts, both branches of guidance, the sampler, and the autoencoder's chunks
    of every kind. Raises ValueError for sizes that the model cannot make.
    """
    own = model.spec.defaults
    for width, height, frames in sizes or [(own.width, own.height, own.num_frames)]:
        request = Request(prompt="warm", negative_prompt="cold", width=width, height=height, num_frames=frames, seed=0)
        warm(model, request.resolved(model.spec))


def warm(model: Model, request: Request) -> None:
    """Run each part of a resolved request of one window once."""
    assert request.num_frames and request.height and request.width
    shape = model.spec.latent_shape(request.num_frames, request.height, request.width)
    # One step at the highest sigma, for the first expert, and one below the boundary, for the second.
    sigmas = torch.tensor([HIGHEST, 0.5 * (request.boundary or 1.0), 0.0], dtype=torch.float64)
    with torch.inference_mode():
        # Not through the cache: a text that is known there would leave the encoder where it is.
        texts = [run_encoder(model, text).tokens for text in texts_of(request).values()]
        model.release_text_encoder()
        context = prepare_context(model, texts, shape)
        latents = denoise(model, draw_noise(shape, seed=0), context, sigmas, request)
    for _ in decode(model, latents[:, :, :CHUNKS].clone().cpu()):
        pass


def parse_sizes(text: str) -> list[Size]:
    """Return the sizes of a text such as 832x480x81,1280x720x81; ValueError for anything else."""
    sizes = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
            raise ValueError(f"{part!r} is not a size to warm; legal: WIDTHxHEIGHTxFRAMES, such as 832x480x81")
        width, height, frames = map(int, numbers)
        sizes.append((width, height, frames))
    return sizes
