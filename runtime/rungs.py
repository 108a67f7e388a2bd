"""python -m runtime calibrate: measures what skipping steps costs a model, and keeps the ways that are worth it.

First exact videos of some prompts: their velocities give the moments, from which the best steps to compute follow for
any number of them. Then videos of other prompts and seeds, exact and skipping: what those keep is what a rung promises.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import torch

from runtime.budget import Calibrated, Rung, Setting
from runtime.caches import Moments, Skips, search
from runtime.decoding import decode
from runtime.denoising import OnState, denoise, prepare_context
from runtime.fidelity import frame_ssim, psnr
from runtime.latents import draw_noise
from runtime.model import Model
from runtime.request import Request
from runtime.samplers import Past, SamplerState
from runtime.schedules import make_schedule
from runtime.text import encode_prompt

SHARES = (0.16, 0.2, 0.24, 0.28, 0.32, 0.36, 0.4, 0.48, 0.56, 0.68)  # of the steps that are computed
ORDERS = (1, 2)
SPREADS = 2.5  # standard deviations of the videos' dB that a floor lies below their mean
MARGIN = 0.5  # dB besides
ALARM = 1.5  # times the largest error seen on the held-out videos
LEAST_PROMPTS = 4


@dataclass(frozen=True)
class Made:
    """A video of a request, how long it took, and what skipping steps remembers of it."""

    frames: np.ndarray
    seconds: float
    past: Past | None = None


def calibrate(
    model: Model, request: Request, prompts: Sequence[str], say: Callable[[str], None] = lambda text: None
) -> Calibrated:
    """Measure what a model keeps for requests like `request`; its prompt and seed do not count.

    Two thirds of the prompts give the moments, the others the measures, each with a seed of its own. ValueError for
    fewer than LEAST_PROMPTS prompts, or a request with clips.
    """
    if len(prompts) < LEAST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts are given; legal: {LEAST_PROMPTS} or more, 20 are good")
    requests = [
        replace(request, prompt=prompt, seed=1000 + i, quality="exact").resolved(model.spec)
        for i, prompt in enumerate(prompts)
    ]
    if request.task != "text":
        raise ValueError(f"the task is {request.task!r}; quality is calibrated for text alone: give no clips")
    seen = max(2, len(prompts) * 2 // 3)
    moments = sum_of_products(model, requests[:seen], say)
    held_out = requests[seen:]
    exact = []
    for number, asked in enumerate(held_out, 1):
        exact.append(make(model, asked))
        say(f"exact, held out {number} of {len(held_out)}: {exact[-1].seconds:.2f} s")
    asked = requests[0]
    assert asked.steps and asked.shift is not None
    sigmas = make_schedule(model.spec.schedule, asked.steps, asked.shift).tolist()
    rungs: list[Rung] = []
    for count in sorted({max(2, round(share * asked.steps)) for share in SHARES}):
        for order in ORDERS:
            predictor = Moments(moments, order)
            computed = search(predictor, sigmas, count, order)
            skips = Skips(frozenset(computed), predictor, order, bound=float("inf"))
            rung = measure(skips, exact, [make(model, each, skips) for each in held_out])
            say(f"{count} of {asked.steps} steps, order {order}: {rung.psnr:.1f} dB, floor {rung.floor:.1f}")
            rungs.append(rung)
    return Calibrated(
        setting=Setting.of(model, asked),
        moments=tuple(tuple(round(float(value), 7) for value in row) for row in moments),
        rungs=worth_it(rungs),
        exact_seconds=round(float(np.median([video.seconds for video in exact])), 4),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        prompts=seen,
        held_out=len(held_out),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def sum_of_products(model: Model, requests: Sequence[Request], say: Callable[[str], None]) -> np.ndarray:
    """Return the moments [steps, steps] of the velocities of exact videos; see caches.Moments."""
    total, numbers = np.zeros(()), 0
    for number, request in enumerate(requests, 1):
        flat = torch.stack([velocity.flatten().double() for velocity in velocities(model, request)])
        total, numbers = total + (flat @ flat.T).cpu().numpy(), numbers + flat.shape[1]
        say(f"exact, watched {number} of {len(requests)}")
    return total / numbers


def velocities(model: Model, request: Request) -> list[torch.Tensor]:
    """Return the velocity of each step of an exact sampling, from where it stood and what it took for clean."""
    sigmas = schedule(model, request).tolist()
    found: list[torch.Tensor] = []
    noise = before = draw_noise(shape_of(model, request), request.seed or 0).to(model.device)

    def note(state: SamplerState, estimate: torch.Tensor) -> None:
        nonlocal before
        found.append((before - estimate) / sigmas[state.step - 1])
        before = state.x

    sample(model, request, noise, on_state=note)
    return found


def make(model: Model, request: Request, skips: Skips | None = None) -> Made:
    """Return a request's video, all of its frames, and the seconds from its prompt to them."""
    last: deque[SamplerState] = deque(maxlen=1)
    began = time.perf_counter()
    noise = draw_noise(shape_of(model, request), request.seed or 0)
    latents = sample(model, request, noise, skips, lambda state, _: last.append(state))
    frames = decode(model, latents.clone().cpu(), tile=model.tile).frames
    return Made(frames, time.perf_counter() - began, last[0].past)


def sample(
    model: Model, request: Request, noise: torch.Tensor, skips: Skips | None = None, on_state: OnState | None = None
) -> torch.Tensor:
    """Return the latents [1, C, T, H, W] of a resolved request of one window."""
    with torch.inference_mode():
        texts, _ = encode_prompt(model, request)
        context = prepare_context(model, texts, shape_of(model, request))
        return denoise(model, noise, context, schedule(model, request), request, on_state, skips=skips)


def shape_of(model: Model, request: Request) -> tuple[int, int, int, int]:
    """Return [C, T, H, W] of the latents of a resolved request."""
    assert request.num_frames and request.height and request.width
    return model.spec.latent_shape(request.num_frames, request.height, request.width)


def schedule(model: Model, request: Request) -> torch.Tensor:
    """Return the sigmas [steps + 1] of a resolved request."""
    assert request.steps and request.shift is not None
    return make_schedule(model.spec.schedule, request.steps, request.shift)


def measure(skips: Skips, exact: Sequence[Made], skipping: Sequence[Made]) -> Rung:
    """Return the rung of a way to skip, from the same requests made exactly and with it."""
    decibel = np.array([psnr(one.frames, other.frames) for one, other in zip(exact, skipping, strict=True)])
    likeness = [np.mean(frame_ssim(a.frames, b.frames)) for a, b in zip(exact, skipping, strict=True)]
    worst = max(video.past.worst for video in skipping if video.past is not None)
    floor = min(decibel.min(), decibel.mean() - SPREADS * decibel.std(ddof=1)) - MARGIN
    return Rung(
        computed=tuple(sorted(skips.computed)),
        order=skips.order,
        floor=round(float(floor), 2),
        psnr=round(float(decibel.mean()), 2),
        ssim=round(float(np.mean(likeness)), 5),
        seconds=round(float(np.median([video.seconds for video in skipping])), 4),
        bound=round(ALARM * worst, 3),
    )


def worth_it(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """Return the rungs from the fewest computed steps up, each with a higher floor than all before it."""
    found: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (len(rung.computed), -rung.floor)):
        if not found or rung.floor > found[-1].floor:
            found.append(rung)
    return tuple(found)


def table(found: Calibrated) -> str:
    """Return a calibration as a table to read."""
    asked = found.setting
    lines = [
        f"{asked.width}x{asked.height}, {asked.frames} frames, {asked.steps} steps, guidance {asked.guidance:g}, on "
        f"{found.device} in {found.dtype}: exact {found.exact_seconds:.2f} s, {found.held_out} held-out videos",
        f"{'computed':>10}{'order':>7}{'floor dB':>10}{'mean dB':>9}{'SSIM':>8}{'faster':>8}",
    ]
    for rung in found.rungs:
        lines.append(
            f"{len(rung.computed):>10}{rung.order:>7}{rung.floor:>10.1f}{rung.psnr:>9.1f}{rung.ssim:>8.4f}"
            f"{found.exact_seconds / rung.seconds:>7.2f}x"
        )
    return "\n".join(lines)
