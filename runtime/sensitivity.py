"""What each linear layer costs in 8 bits: one at a time, on steps of exact samplings, against the same step in full.

Errors of different layers are nearly independent, so their squares add up: layers are ranked by the squared error that
one brings per number of its weights, which is what it saves. Sensitive ones come last, and stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from runtime.denoising import compose, denoise, prepare_context
from runtime.latents import draw_noise
from runtime.model import Model
from runtime.models.spec import Context
from runtime.request import Request
from runtime.samplers import SamplerState
from runtime.text import encode_prompt

STEPS = 3  # that each expert is asked at: early, in the middle and late
SHARES = (0.5, 0.75, 0.9, 1.0)  # of the weights that are in 8 bits
LEAST = 1e-12  # relative squared error that counts as none

Ranking = tuple[tuple[str, float], ...]  # (layer, dB that a step's velocity keeps), the least sensitive first
Place = tuple[torch.Tensor, torch.Tensor, Context, torch.Tensor]  # x, sigma, context, its exact velocity


@torch.inference_mode()
def rank(model: Model, requests: Sequence[Request], say: Callable[[str], None] = lambda text: None) -> Ranking:
    """Return every layer that may be in 8 bits with what a step keeps with it alone so, by resolved requests."""
    places = [place for request in requests for place in watched(model, request)]
    errors: dict[str, float] = {}
    for number, name in enumerate(model.fp8_layers, 1):
        asked = compose(model, requests[0], tokens_of(model, places), frozenset({name}))
        total = 0.0
        for x, sigma, context, exact in places:
            total += float((asked(x, sigma, context) - exact).square().sum() / exact.square().sum())
        errors[name] = max(total / len(places), LEAST)
        say(f"layer {number} of {len(model.fp8_layers)} in 8 bits, {name}: a step keeps {decibel(errors[name]):.1f} dB")
    order = sorted(errors, key=lambda name: errors[name] / weights_of(model, name))
    return tuple((name, round(decibel(errors[name]), 2)) for name in order)


def watched(model: Model, request: Request) -> list[Place]:
    """Return STEPS places of each expert on the way of one exact sampling."""
    assert request.num_frames and request.height and request.width and request.steps and request.shift is not None
    shape = model.spec.latent_shape(request.num_frames, request.height, request.width)
    sigmas = request.schedule(model.spec)
    noise = draw_noise(shape, request.seed or 0).to(model.device)
    context = prepare_context(model, encode_prompt(model, request)[0], shape)
    levels = sigmas.tolist()[:-1]
    boundary = request.boundary or 0.0
    wanted: set[int] = set()
    for steps in (
        [k for k, s in enumerate(levels) if s >= boundary],
        [k for k, s in enumerate(levels) if s < boundary],
    ):
        wanted |= {steps[len(steps) * (2 * i + 1) // (2 * STEPS)] for i in range(STEPS) if steps}
    found: list[Place] = []
    before = noise

    def note(state: SamplerState, estimate: torch.Tensor) -> None:
        nonlocal before
        if (step := state.step - 1) in wanted:
            found.append((before, sigmas[step : step + 1], context, (before - estimate) / levels[step]))
        before = state.x

    denoise(model, noise, context, sigmas, request, note)
    return found


def tokens_of(model: Model, places: Sequence[Place]) -> int:
    """Return how many video tokens a place has."""
    return places[0][0][0, 0].numel() // math.prod(model.spec.patch)


def weights_of(model: Model, name: str) -> int:
    """Return the number of a layer's weights; its products are in proportion."""
    component, _, layer = name.partition(".")
    parts = zip(model.checkpoint.transformers, model.transformers, strict=True)
    network = next(network for part, network in parts if part.name == component)
    return cast(nn.Linear, cast(nn.Module, network).get_submodule(layer)).weight.numel()


def counts(model: Model, ranking: Ranking) -> list[int]:
    """Return how many of the first layers hold each share of all weights, growing."""
    sizes = [weights_of(model, name) for name, _ in ranking]
    found: list[int] = []
    total = 0
    for number, size in enumerate(sizes, 1):
        total += size
        while len(found) < len(SHARES) and total >= SHARES[len(found)] * sum(sizes):
            found.append(number)
    return sorted(set(found))


def decibel(error: float) -> float:
    """Return a relative squared error in dB."""
    return -10 * math.log10(error)
