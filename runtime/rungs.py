"""python -m runtime calibrate: measures what skipping steps and 8 bits cost a model, and keeps what is worth it.

First exact videos of some prompts: their velocities give the moments, from which the best steps to compute follow for
any number of them. Then videos of other prompts and seeds, exact and saving: what those keep is what a rung promises.
Layers in 8 bits are ranked by what each costs (runtime/sensitivity.py), and the first half, and more of them, are
measured; beside predicted steps where the device gains time by them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import torch

from runtime import precision, sensitivity
from runtime.budget import Calibrated, Rung, Setting, device_name, first_layers
from runtime.caches import EXACT, Moments, Savings, Skips, search
from runtime.decoding import decode
from runtime.denoising import OnState, Terms, denoise, prepare_context
from runtime.fidelity import frame_ssim, psnr
from runtime.latents import draw_noise
from runtime.model import Model
from runtime.request import Request
from runtime.samplers import Past, SamplerState
from runtime.text import encode_prompt

SHARES = (0.16, 0.2, 0.24, 0.28, 0.32, 0.36, 0.4, 0.48, 0.56, 0.68)  # of the steps that are computed
ORDERS = (1, 2)
# Standard deviations of the videos' dB that a floor lies below their mean: with these 8 of them say, 95 times of 100,
# what 95 % of all keep (one-sided tolerance factor, https://www.itl.nist.gov/div898/handbook/prc/section2/prc263.htm).
SPREADS = 3.2
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
    model: Model,
    request: Request,
    prompts: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
    *,
    fp8: bool | None = None,
) -> Calibrated:
    """Measure what a model keeps for requests like `request`; its prompt and seed do not count.

    Two thirds of the prompts give the moments, the others the measures, each with a seed of its own. `fp8` says whether
    layers in 8 bits are measured (None: where the device gains time by them). ValueError for fewer than LEAST_PROMPTS
    prompts, a request with clips, or a model whose weights are in 8 bits already.
    """
    requests = requests_for(model, request, prompts)
    seen = max(2, len(prompts) * 2 // 3)
    moments = sum_of_products(model, requests[:seen], say)
    held_out = requests[seen:]
    exact = []
    for number, asked in enumerate(held_out, 1):
        exact.append(make(model, asked))
        say(f"exact, held out {number} of {len(held_out)}: {exact[-1].seconds:.2f} s")
    trial = Trial(held_out, exact, say)
    # A step of a few-step schedule is too far from the one before to be predicted from it.
    rungs = () if requests[0].sigmas is not None else worth_it(trial.skipping(model, moments), {0: 1.0})
    ranking: sensitivity.Ranking = ()
    narrow: list[Rung] = []
    if precision.gains(model.device) if fp8 is None else fp8:
        ranking = sensitivity.rank(model, requests[:2], say)
        narrow = trial.narrow(model, ranking)
        if precision.gains(model.device):
            rungs = worth_it([*rungs, *narrow, *trial.both(model, moments, rungs, ranking)], paces(narrow, exact))
    return Calibrated(
        setting=Setting.of(model, requests[0]),
        moments=tuple(tuple(round(float(value), 7) for value in row) for row in moments),
        rungs=rungs,
        exact_seconds=seconds_of(exact),
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        prompts=seen,
        held_out=len(held_out),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        ranking=ranking,
        fp8=tuple(narrow),
    )


def requests_for(model: Model, request: Request, prompts: Sequence[str]) -> list[Request]:
    """Return the exact requests of a calibration, resolved; ValueError for what cannot be calibrated."""
    if len(prompts) < LEAST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts are given; legal: {LEAST_PROMPTS} or more, 20 are good")
    if request.task != "text":
        raise ValueError(f"the task is {request.task!r}; quality is calibrated for text alone: give no clips")
    if model.precision != "full":
        raise ValueError("the model's weights are in 8 bits, and exact videos are measured against: load it in full")
    return [
        replace(request, prompt=prompt, seed=1000 + i, quality="exact").resolved(model.spec)
        for i, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True)
class Trial:
    """Requests that no calibration saw, and their exact videos: what ways to save are measured on."""

    requests: Sequence[Request]
    exact: Sequence[Made]
    say: Callable[[str], None]

    def skipping(self, model: Model, moments: np.ndarray) -> list[Rung]:
        """Return rungs that predict steps: for each number of computed ones the best of them."""
        asked = self.requests[0]
        assert asked.steps
        sigmas = asked.schedule(model.spec).tolist()
        rungs: list[Rung] = []
        for count in sorted({max(2, round(share * asked.steps)) for share in SHARES}):
            for order in ORDERS:
                predictor = Moments(moments, order)
                computed = search(predictor, sigmas, count, order)
                savings = Savings(Skips(frozenset(computed), predictor, order, bound=float("inf")))
                rungs.append(self.measured(model, savings, computed, order))
        return rungs

    def narrow(self, model: Model, ranking: sensitivity.Ranking) -> list[Rung]:
        """Return rungs that compute all steps with more and more layers in 8 bits."""
        steps = self.requests[0].steps
        assert steps
        return [
            self.measured(model, Savings(None, first_layers(ranking, count)), tuple(range(steps)), 1, count)
            for count in sensitivity.counts(model, ranking, self.tokens(model))
        ]

    def both(
        self, model: Model, moments: np.ndarray, rungs: Sequence[Rung], ranking: sensitivity.Ranking
    ) -> list[Rung]:
        """Return each rung that predicts steps with each number of layers in 8 bits."""
        found: list[Rung] = []
        for rung in rungs:
            skips = Skips(frozenset(rung.computed), Moments(moments, rung.order), rung.order, bound=float("inf"))
            for count in sensitivity.counts(model, ranking, self.tokens(model)):
                savings = Savings(skips, first_layers(ranking, count))
                found.append(self.measured(model, savings, rung.computed, rung.order, count))
        return found

    def tokens(self, model: Model) -> int:
        """Return how many video tokens a request has."""
        return math.prod(shape_of(model, self.requests[0])[1:]) // math.prod(model.spec.patch)

    def measured(self, model: Model, savings: Savings, computed: Sequence[int], order: int, fp8: int = 0) -> Rung:
        """Return the rung of a way to save, from the same requests made exactly and with it."""
        made = [make(model, each, savings) for each in self.requests]
        pairs = list(zip(self.exact, made, strict=True))
        decibel = np.array([psnr(one.frames, other.frames) for one, other in pairs])
        likeness = [np.mean(frame_ssim(a.frames, b.frames)) for a, b in pairs]
        worst = max((video.past.worst for video in made if video.past is not None), default=0.0)
        floor = min(decibel.min(), decibel.mean() - SPREADS * decibel.std(ddof=1)) - MARGIN
        self.say(
            f"{len(computed)} of {self.requests[0].steps} steps, order {order}, {fp8} layers in 8 bits: "
            f"{decibel.mean():.1f} dB, floor {floor:.1f}"
        )
        return Rung(
            computed=tuple(sorted(computed)),
            order=order,
            floor=round(float(floor), 2),
            psnr=round(float(decibel.mean()), 2),
            ssim=round(float(np.mean(likeness)), 5),
            seconds=seconds_of(made),
            bound=round(ALARM * worst, 3),
            fp8=fp8,
        )


def paces(narrow: Sequence[Rung], exact: Sequence[Made]) -> dict[int, float]:
    """Return what a step takes with so many layers in 8 bits, by what it takes with none."""
    return {0: 1.0} | {rung.fp8: rung.seconds / seconds_of(exact) for rung in narrow}


def seconds_of(videos: Sequence[Made]) -> float:
    """Return the median."""
    return round(float(np.median([video.seconds for video in videos])), 4)


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
    sigmas = request.schedule(model.spec).tolist()
    found: list[torch.Tensor] = []
    noise = before = draw_noise(shape_of(model, request), request.seed or 0).to(model.device)

    def note(state: SamplerState, estimate: torch.Tensor) -> None:
        nonlocal before
        found.append((before - estimate) / sigmas[state.step - 1])
        before = state.x

    sample(model, request, noise, on_state=note)
    return found


def make(model: Model, request: Request, savings: Savings = EXACT) -> Made:
    """Return a request's video, all of its frames, and the seconds from its prompt to them."""
    last: deque[SamplerState] = deque(maxlen=1)
    began = time.perf_counter()
    noise = draw_noise(shape_of(model, request), request.seed or 0)
    latents = sample(model, request, noise, savings, lambda state, _: last.append(state))
    frames = decode(model, latents.clone().cpu()).frames
    return Made(frames, time.perf_counter() - began, last[0].past)


def sample(
    model: Model, request: Request, noise: torch.Tensor, savings: Savings = EXACT, on_state: OnState | None = None
) -> torch.Tensor:
    """Return the latents [1, C, T, H, W] of a resolved request of one window."""
    with torch.inference_mode():
        texts, _ = encode_prompt(model, request)
        context = prepare_context(model, texts, shape_of(model, request))
        return denoise(model, noise, context, request.schedule(model.spec), request, on_state, Terms(savings=savings))


def shape_of(model: Model, request: Request) -> tuple[int, int, int, int]:
    """Return [C, T, H, W] of the latents of a resolved request."""
    assert request.num_frames and request.height and request.width
    return model.spec.latent_shape(request.num_frames, request.height, request.width)


def worth_it(rungs: Sequence[Rung], paces: Mapping[int, float]) -> tuple[Rung, ...]:
    """Return the rungs from the fastest up, each with a higher floor than all before it; bits only where they gain.

    `paces` is the time of a step with so many layers in 8 bits, by that with none.
    """
    found: list[Rung] = []
    cost = {rung: len(rung.computed) * paces[rung.fp8] for rung in rungs}
    for rung in sorted(rungs, key=lambda rung: (cost[rung], -rung.floor)):
        faster = not rung.fp8 or paces[rung.fp8] < 1
        if faster and (not found or rung.floor > found[-1].floor):
            found.append(rung)
    return tuple(found)


def table(found: Calibrated) -> str:
    """Return a calibration as a table to read."""
    asked = found.setting
    lines = [
        f"{asked.width}x{asked.height}, {asked.frames} frames, {asked.steps} steps, guidance {asked.guidance:g}, on "
        f"{found.device} in {found.dtype}: exact {found.exact_seconds:.2f} s, {found.held_out} held-out videos",
        f"{'computed':>10}{'order':>7}{'8 bits':>8}{'floor dB':>10}{'mean dB':>9}{'SSIM':>8}{'faster':>8}",
    ]
    lines += [row(found, rung) for rung in found.rungs]
    if found.fp8:
        simulated = "" if found.device != "cpu" else ", simulated here: its time says nothing"
        lines.append(f"all steps, with more and more of {len(found.ranking)} layers in 8 bits{simulated}:")
        lines += [row(found, rung) for rung in found.fp8]
        least, most = found.ranking[0], min(found.ranking, key=lambda pair: pair[1])
        lines.append(
            f"one layer alone in 8 bits: {least[0]} keeps {least[1]:.1f} dB of a step, {most[0]} {most[1]:.1f}"
        )
    return "\n".join(lines)


def row(found: Calibrated, rung: Rung) -> str:
    """Return a line of the table."""
    return (
        f"{len(rung.computed):>10}{rung.order:>7}{rung.fp8:>8}{rung.floor:>10.1f}{rung.psnr:>9.1f}{rung.ssim:>8.4f}"
        f"{found.exact_seconds / rung.seconds:>7.2f}x"
    )
