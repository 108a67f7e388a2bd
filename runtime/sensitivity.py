"""What each layer costs in 8 bits: one at a time, on steps of exact samplings, against the same step in full.

Errors of different layers are nearly independent, so their squares add up: layers are ranked by the squared error that
one brings per multiplication of its products, which are what it saves. Sensitive ones come last, and stay as they were.
Attention takes part where a step is faster for it; a linear layer in 8 bits always is, where there are such products.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from runtime import precision
from runtime.denoising import compose, denoise, prepare_context
from runtime.latents import draw_noise
from runtime.model import Model
from runtime.models.spec import Context, Denoiser
from runtime.request import Request
from runtime.samplers import SamplerState
from runtime.text import encode_prompt

STEPS = 3  # that each expert is asked at: early, in the middle and late
SHARES = (0.5, 0.75, 0.9, 1.0)  # of the products that are in 8 bits
TIMES = 3  # that a step is timed
LEAST = 1e-12  # relative squared error that counts as none

Ranking = tuple[tuple[str, float], ...]  # (layer, dB that a step's velocity keeps), the least sensitive first
Place = tuple[torch.Tensor, torch.Tensor, Context, torch.Tensor]  # x, sigma, context, its exact velocity


@torch.inference_mode()
def rank(model: Model, requests: Sequence[Request], say: Callable[[str], None] = lambda text: None) -> Ranking:
    """Return each layer that is worth being in 8 bits with what a step keeps with it alone so, by resolved requests."""
    places = [place for request in requests for place in watched(model, request)]
    tokens, errors = tokens_of(model, places[0][0]), dict[str, float]()
    layers = worth_trying(model, requests[0], places, say)
    for number, name in enumerate(layers, 1):
        asked = compose(model, requests[0], tokens, frozenset({name}))
        total = 0.0
        for x, sigma, context, exact in places:
            total += float((asked(x, sigma, context) - exact).square().sum() / exact.square().sum())
        errors[name] = max(total / len(places), LEAST)
        say(f"layer {number} of {len(layers)} in 8 bits, {name}: a step keeps {decibel(errors[name]):.1f} dB")
    order = sorted(errors, key=lambda name: errors[name] / products_of(model, name, tokens))
    return tuple((name, round(decibel(errors[name]), 2)) for name in order)


def worth_trying(
    model: Model, request: Request, places: Sequence[Place], say: Callable[[str], None]
) -> tuple[str, ...]:
    """Return the layers that may be in 8 bits, without attention where the device has such products and a step is no
    faster with it so."""
    attention = frozenset(name for name in model.fp8_layers if not isinstance(layer_of(model, name), nn.Linear))
    if not attention or not precision.gains(model.device):
        return model.fp8_layers
    full, narrow = (
        seconds(compose(model, request, tokens_of(model, places[0][0]), layers), places[0])
        for layers in (frozenset[str](), attention)
    )
    say(f"a step: {full:.3f} s, with attention in 8 bits {narrow:.3f} s")
    return tuple(name for name in model.fp8_layers if narrow < full or name not in attention)


def seconds(asked: Denoiser, place: Place) -> float:
    """Return what a step takes at best, behind one that warms up."""
    found = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        float(asked(*place[:3]).sum())  # waits for the device
        found.append(time.perf_counter() - began)
    return min(found[1:])


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


def tokens_of(model: Model, x: torch.Tensor) -> int:
    """Return how many video tokens latents [1, C, T, H, W] are."""
    return x[0, 0].numel() // math.prod(model.spec.patch)


def layer_of(model: Model, name: str) -> nn.Module:
    """Return one of `model.fp8_layers` as it was loaded."""
    component, _, layer = name.partition(".")
    parts = zip(model.checkpoint.transformers, model.transformers, strict=True)
    return next(cast(nn.Module, network).get_submodule(layer) for part, network in parts if part.name == component)


def products_of(model: Model, name: str, tokens: int) -> int:
    """Return how often a layer multiplies for each of so many video tokens: a linear one by each of its weights."""
    layer = layer_of(model, name)
    return layer.weight.numel() if isinstance(layer, nn.Linear) else 2 * tokens * math.prod(model.costs.heads)


def counts(model: Model, ranking: Ranking, tokens: int) -> list[int]:
    """Return how many of the first layers hold each share of all products, growing."""
    sizes = [products_of(model, name, tokens) for name, _ in ranking]
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
