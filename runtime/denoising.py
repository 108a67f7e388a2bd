"""Noise -> latents: composes engine, experts and guidance into one Denoiser and runs the sampler over it.

Known frames are held by a wrapper as well: whatever the network says of them, their velocity leads to what is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch

from runtime.caches import EXACT, Savings, cached
from runtime.engines import engine
from runtime.engines.cuda_graph import captured
from runtime.guidance import guided
from runtime.model import Model
from runtime.models.spec import Context, Denoiser, Stretch
from runtime.request import Request
from runtime.samplers import SamplerState, make_sampler, start
from runtime.trace import span

OnStep = Callable[[int, int, torch.Tensor, torch.Tensor], None]  # step from 1, total, latents, estimate
OnState = Callable[[SamplerState, torch.Tensor], None]  # all that a resume needs, estimate

# Up to this many video tokens both guidance branches run as one batch: launches and weights are read once. Beyond it
# the matrices are large enough alone, and one branch at a time halves the memory.
BATCHED_TOKENS = 4096
RESAMPLE = 2  # times each step is taken where known frames are blended in; more agrees better and costs as much more


@dataclass(frozen=True)
class Known:
    """Latents [1, C, T, H, W] that are known, and how firmly each frame is held [T]: 0 not at all, 1 to the end.

    A frame is held while sigma is above 1 - hold; below it the network may change it.
    """

    latents: torch.Tensor
    hold: torch.Tensor


@dataclass(frozen=True)
class Terms:
    """What one sampling is held to, beside its noise, context and sigmas."""

    known: Known | None = None  # held; where sigmas begin below 1 also what sampling starts from
    channels: torch.Tensor | None = None  # [1, C', T, H, W], seen behind those of x
    periodic: bool = False  # the last frame is followed by the first
    savings: Savings = EXACT  # what is given up for speed


PLAIN = Terms()


class Cancelled(Exception):
    """Raised by an `on_step` callback to stop a generation between two steps."""


def prepare_context(
    model: Model,
    texts: Sequence[torch.Tensor],
    shape: tuple[int, int, int, int],
    pictures: torch.Tensor | None = None,
    channels: torch.Tensor | None = None,
    positions: str | None = None,
) -> Context:
    """Return what all steps share: per expert the projected text of each prompt [S, text_dim], and positions.

    `shape` is [C, T, H, W] of the latents; `pictures` are image embeddings [P, S, D], `channels` [1, C', T, H, W] those
    of known frames, where the weights take them. `positions` is how they are spread beyond the model's own size.
    """
    own, stretch = model.spec.defaults, None
    if positions is not None:
        trained = model.spec.latent_shape(own.num_frames, own.height, own.width)[1:]
        t, h, w = (n // p for n, p in zip(trained, model.spec.patch, strict=True))
        stretch = Stretch(positions, (t, h, w))
    control = channels if model.spec.conditioning == "control" else None
    # The last expert first: where experts take turns on the device, the first one is then there for the first step.
    projected = [
        network.project(texts, model.spec.text_length, shape[1:], pictures=pictures, control=control, stretch=stretch)
        for network in reversed(model.transformers)
    ]
    return Context(tuple(reversed(projected)))


def switch_at(sigma: float, high: Denoiser, low: Denoiser) -> Denoiser:
    """Return a Denoiser that asks `high` at and above `sigma`, `low` below it."""

    def denoise(x: torch.Tensor, at: torch.Tensor, context: Context) -> torch.Tensor:
        return (high if float(at.max()) >= sigma else low)(x, at, context)

    return denoise


def held(denoiser: Denoiser, known: Known, *, clean: bool) -> Denoiser:
    """Return a Denoiser that leads known frames to what is known: their velocity is (x - known) / sigma.

    `clean` shows them to the network without noise, at sigma 0 (Wan 2.2 TI2V, https://arxiv.org/abs/2503.20314);
    otherwise it sees them as noisy as the others.
    """

    def denoise(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        level = float(sigma.max())
        firm = known.hold > 1.0 - level
        if not firm.any():
            return denoiser(x, sigma, context)
        there = firm.view(1, 1, -1, 1, 1).to(x.device)
        if clean:
            seen, at = torch.where(there, known.latents, x), torch.where(firm, 0.0, sigma.view(-1, 1))
            velocity = denoiser(seen, at, context)
        else:
            velocity = denoiser(x, sigma, context)
        return torch.where(there, (x - known.latents) / level, velocity)

    return denoise


def widened(denoiser: Denoiser, channels: torch.Tensor) -> Denoiser:
    """Return a Denoiser whose network sees `channels` [1, C', T, H, W] behind those of x."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        return denoiser(torch.cat([x, channels], dim=1), sigma, context)

    return denoise


def rolled(denoiser: Denoiser, called: int = 0) -> Denoiser:
    """Return a Denoiser for which time is a circle: each call sees the frames turned further, so none is the first.

    The turns are by the golden section of the length, which soon has started everywhere; `called` is how many were
    taken before.
    Source of the idea: latent shift, https://arxiv.org/abs/2502.20307.
    """
    calls = count(called)

    def denoise(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        frames = x.shape[2]
        turn = round(next(calls) * frames * (math.sqrt(5) - 1) / 2) % frames
        return denoiser(x.roll(turn, dims=2), sigma, context).roll(-turn, dims=2)

    return denoise


def compose(model: Model, request: Request, tokens: int, fp8: frozenset[str] = frozenset()) -> Denoiser:
    """Return the Denoiser of a resolved request: the engine's, guided per expert, switched between experts.

    `fp8` are layers of `model.fp8_layers` that are in 8 bits.
    """
    build = engine(model.engine).build
    scales = (request.guidance, request.guidance_2)
    experts = [
        guided(build(network, i, model.fingerprint), float(scale or 0.0), batched=tokens <= BATCHED_TOKENS)
        for i, (network, scale) in enumerate(zip(model.in_fp8(fp8), scales, strict=False))
    ]
    if model.engine == "cuda_graph":
        experts = [captured(expert) for expert in experts]
    if len(experts) == 1:
        return experts[0]
    assert request.boundary is not None
    return switch_at(request.boundary, *experts)


def denoise(
    model: Model,
    noise: torch.Tensor | SamplerState,
    context: Context,
    sigmas: torch.Tensor,
    request: Request,
    on_state: OnState | None = None,
    terms: Terms = PLAIN,
) -> torch.Tensor:
    """Return the denoised latents [1, C, T, H, W] float32 of `noise`, same shape, over `sigmas` [steps + 1].

    `on_state(state, estimate)` is called after each step, with what the step took for the clean latents, and may raise
    Cancelled. A state in the place of `noise` goes on from there, to the same numbers.
    Raises FloatingPointError where the latents stop being finite.
    """
    known, skips = terms.known, terms.savings.skips
    resumed = noise.to(model.device) if isinstance(noise, SamplerState) else None
    noise = noise.x if isinstance(noise, SamplerState) else noise
    patch = model.spec.patch
    tokens = noise[0, 0].numel() // (patch[0] * patch[1] * patch[2])
    levels = sigmas.tolist()
    denoiser = compose(model, request, tokens, terms.savings.fp8)
    cache = None
    if skips is not None:
        denoiser = cache = cached(denoiser, skips, levels, resumed.past if resumed is not None else None)
    if terms.channels is not None and model.spec.conditioning == "channels":
        denoiser = widened(denoiser, terms.channels.to(model.device))
    state = start(noise.to(model.device))
    if known is not None:
        denoiser = held(denoiser, known, clean=model.spec.conditioning == "clean_tokens")
        first = float(sigmas[0])
        if first < 1 - 1e-5:
            state = start((1.0 - first) * known.latents + first * state.x)
    if resumed is not None:
        state = resumed
    rounds = visits(model, request, known)
    if terms.periodic:
        denoiser = rolled(denoiser, called=state.step * rounds)
    assert request.sampler is not None and request.seed is not None
    sampler = make_sampler(request.sampler, {**model.spec.sampler_options, "seed": request.seed})
    total = len(levels) - 1
    generator = torch.Generator().manual_seed((request.seed + 1) % 2**64)
    for _ in range(min(state.step, total - 1) * (rounds - 1)):
        torch.randn(state.x.shape, generator=generator)  # as drawn before the state that was resumed
    for step in range(state.step, total):
        with span("denoise/step", number=step + 1):
            for left in reversed(range(rounds if step < total - 1 else 1)):
                seen = state.x
                velocity = denoiser(seen, sigmas[step : step + 1], context)
                moved = sampler(state, velocity, levels)
                state = renoised(state, moved, levels, generator) if left else moved
        if cache is not None:
            state = replace(state, past=cache.past)
        if on_state is not None:
            on_state(state, torch.sub(seen, velocity, alpha=levels[step]))
    x = state.x
    if known is not None:
        x = torch.where((known.hold == 1).view(1, 1, -1, 1, 1).to(x.device), known.latents, x)
    if not torch.isfinite(x).all():
        raise FloatingPointError(
            f"the latents are not finite after {total} steps in {model.dtype}; try --dtype float32, and if that fails "
            "too, the weights are damaged"
        )
    return x


def visits(model: Model, request: Request, known: Known | None) -> int:
    """Return how often each step is taken: more than once only where known frames are blended in from outside.

    Each further time lets the rest agree with them (RePaint, https://arxiv.org/abs/2201.09865).
    """
    blended = known is not None and model.spec.conditioning == "blend" and bool((known.hold == 1).any())
    return (request.resample or RESAMPLE) if blended else 1


def renoised(
    before: SamplerState, after: SamplerState, sigmas: Sequence[float], generator: torch.Generator
) -> SamplerState:
    """Return the state of a step with its x taken back from the step behind it: noised up to where it began."""
    low, high = sigmas[after.step], sigmas[before.step]
    signal = (1 - high) / (1 - low)
    fresh = torch.randn(after.x.shape, generator=generator).to(after.x.device)
    x = signal * after.x + math.sqrt(high**2 - (signal * low) ** 2) * fresh
    return replace(before, x=x, corrected=None)
