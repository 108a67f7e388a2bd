"""Noise -> latents: composes engine, experts and guidance into one Denoiser and runs the sampler over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from runtime.engines import engine
from runtime.guidance import guided
from runtime.model import Model
from runtime.models.spec import Context, Denoiser
from runtime.request import Request
from runtime.samplers import make_sampler, start
from runtime.trace import span

OnStep = Callable[[int, int, torch.Tensor], None]

# Up to this many video tokens both guidance branches run as one batch: launches and weights are read once. Beyond it
# the matrices are large enough alone, and one branch at a time halves the memory.
BATCHED_TOKENS = 4096


class Cancelled(Exception):
    """Raised by an `on_step` callback to stop a generation between two steps."""


def prepare_context(model: Model, texts: Sequence[torch.Tensor], shape: tuple[int, int, int, int]) -> Context:
    """Return what all steps share: per expert the projected text of each prompt [S, text_dim], and positions.

    `shape` is [C, T, H, W] of the latents.
    """
    return Context(tuple(network.project(texts, model.spec.text_length, shape[1:]) for network in model.transformers))


def switch_at(sigma: float, high: Denoiser, low: Denoiser) -> Denoiser:
    """Return a Denoiser that asks `high` at and above `sigma`, `low` below it."""

    def denoise(x: torch.Tensor, at: torch.Tensor, context: Context) -> torch.Tensor:
        return (high if float(at.max()) >= sigma else low)(x, at, context)

    return denoise


def compose(model: Model, request: Request, tokens: int) -> Denoiser:
    """Return the Denoiser of a resolved request: the engine's, guided per expert, switched between experts."""
    build = engine(model.engine).build
    scales = (request.guidance, request.guidance_2)
    experts = [
        guided(build(network, i, model.fingerprint), float(scale or 0.0), batched=tokens <= BATCHED_TOKENS)
        for i, (network, scale) in enumerate(zip(model.transformers, scales, strict=False))
    ]
    if len(experts) == 1:
        return experts[0]
    assert model.spec.boundary is not None
    return switch_at(model.spec.boundary, *experts)


def denoise(
    model: Model,
    noise: torch.Tensor,
    context: Context,
    sigmas: torch.Tensor,
    request: Request,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Return the denoised latents [1, C, T, H, W] float32 of `noise`, same shape, over `sigmas` [steps + 1].

    `on_step(step, total, latents)` is called after each step with step from 1, and may raise Cancelled. Raises
    FloatingPointError where the latents stop being finite.
    """
    patch = model.spec.patch
    tokens = noise[0, 0].numel() // (patch[0] * patch[1] * patch[2])
    denoiser = compose(model, request, tokens)
    assert request.sampler is not None
    sampler = make_sampler(request.sampler, model.spec.sampler_options)
    levels = sigmas.tolist()
    total = len(levels) - 1
    state = start(noise.to(model.device))
    for step in range(total):
        with span("denoise/step"):
            velocity = denoiser(state.x, sigmas[step : step + 1], context)
            state = sampler(state, velocity, levels)
        if on_step is not None:
            on_step(step + 1, total, state.x)
    if not torch.isfinite(state.x).all():
        raise FloatingPointError(
            f"the latents are not finite after {total} steps in {model.dtype}; try --dtype float32, and if that fails "
            "too, the weights are damaged"
        )
    return state.x
