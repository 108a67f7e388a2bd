"""Warm start: what only a first request would pay is paid before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from runtime.clips import Clip
from runtime.decoding import decode
from runtime.known import given_frames
from runtime.model import Model
from runtime.pipeline import begin, sample
from runtime.request import Request
from runtime.text import run_encoder, texts_of

CHUNKS = 3  # latent frames after which every further one is decoded as the last: first, second, steady
HIGHEST = 0.999  # sigma; at 1 itself no sampler of higher order can start

Size = tuple[int, int, int]  # width, height, frames


def warmup(model: Model, sizes: Sequence[Size] = ()) -> None:
    """Run each part of a request once for each (width, height, frames), or for the model's own default.

    The text encoder where it stays, what pictures go through where the weights take them, both experts, both branches
    of guidance, the sampler, and the autoencoder's chunks of every kind; a machine that nobody measured is measured.
    Raises ValueError for sizes that the model cannot make, or has no memory for.
    """
    own, takes = model.spec.defaults, model.spec.conditioning
    for width, height, frames in sizes or [(own.width, own.height, own.num_frames)]:
        picture = Clip(np.zeros((height, width, 3), np.uint8))
        given: list[tuple[Clip, ...]] = [()] if takes in ("blend", "clean_tokens") else []
        for clips in given + [(picture,)] * (takes != "blend"):
            asked = Request(
                prompt="warm",
                negative_prompt="cold",
                width=width,
                height=height,
                num_frames=frames,
                clips=clips,
                seed=0,
            )
            warm(model, asked)


def warm(model: Model, request: Request) -> None:
    """Run each part of a request of one window once."""
    request = request.resolved(model.spec)
    # One step at the highest sigma, for the first expert, and one below the boundary, for the second.
    sigmas = HIGHEST, 0.5 * (request.boundary or 1.0)
    job = begin(model, replace(request, recipe=None, sigmas=sigmas, steps=len(sigmas)))
    with torch.inference_mode():
        # Not through the cache: a text that is known there would leave the encoder where it is.
        for text in texts_of(request).values():
            run_encoder(model, text)
    latents = sample(job, 0, given_frames(job.plan.windows[0], job.footage, ()))
    for _ in decode(model, latents[:, :, :CHUNKS]):
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
