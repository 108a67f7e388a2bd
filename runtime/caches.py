"""Skipped steps: the network computes the velocity at some steps, and at the others it is predicted from those.

A prediction is a weighted sum of the last computed velocities. Where a model was calibrated, the weights are those of
least squares over its own trajectories; elsewhere they are a line through the last two. At each computed step the
prediction is made as well, so what it would have cost is known there: that is the guard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from runtime.models.spec import Context, Denoiser
from runtime.samplers import Past

# (last computed steps, how many are computed) -> (error so far, all computed steps)
Ways = dict[tuple[tuple[int, ...], int], tuple[float, tuple[int, ...]]]
LEAST = 1e-3  # relative error of a prediction below which a worse one is no alarm


class Predictor(Protocol):
    """How a velocity follows from earlier ones."""

    def weigh(self, step: int, past: Sequence[int]) -> tuple[list[float], float]:
        """Return the weights of the velocities computed at the steps `past`, newest first, and the relative error
        (root of mean squares over that of the velocity) that is expected of their sum at `step`."""
        ...


@dataclass(frozen=True)
class Line:
    """A line through the last two computed velocities over sigma; `expected` is the error that it may have."""

    sigmas: Sequence[float]
    expected: float

    def weigh(self, step: int, past: Sequence[int]) -> tuple[list[float], float]:
        """Return weights that need no calibration, for one velocity or more."""
        if len(past) == 1:
            return [1.0], self.expected
        here, newest, older = (self.sigmas[i] for i in (step, *past[:2]))
        slope = (here - newest) / (newest - older)
        return [1.0 + slope, -slope], self.expected


@dataclass(frozen=True)
class Moments:
    """Least squares over the trajectories that a calibration saw.

    `products` [steps, steps] are the means, over prompts and numbers, of the products of the velocities of two steps.
    """

    products: np.ndarray
    order: int  # how many past velocities are used

    def weigh(self, step: int, past: Sequence[int]) -> tuple[list[float], float]:
        """Return the best weights on average, and what they leave."""
        used = list(past[: self.order])
        square = self.products[np.ix_(used, used)]
        right, own = self.products[used, step], self.products[step, step]
        ridge = 1e-5 * np.diag(np.diag(square))  # velocities of neighbouring steps are nearly the same
        weights = np.linalg.solve(square + ridge, right)
        left = own - 2 * weights @ right + weights @ square @ weights
        return [float(w) for w in weights], math.sqrt(max(float(left / own), 0.0))


@dataclass(frozen=True)
class Skips:
    """Which steps are computed, how the others are predicted, and when a prediction is not trusted."""

    computed: frozenset[int]
    predictor: Predictor
    order: int  # how many past velocities are kept
    bound: float  # times the expected error beyond which the steps that follow are computed


@dataclass(frozen=True)
class Savings:
    """What is given up for speed: steps that are predicted (None: none), layers in 8 bits beside those loaded so."""

    skips: Skips | None = None
    fp8: frozenset[str] = frozenset()


EXACT = Savings()


class Cached:
    """A Denoiser that asks the network at the computed steps alone; all it remembers is `past`, which may be saved."""

    def __init__(self, denoiser: Denoiser, skips: Skips, sigmas: Sequence[float], past: Past | None) -> None:
        self.denoiser, self.skips, self.past = denoiser, skips, past or Past()
        self.steps = {sigma: step for step, sigma in enumerate(sigmas[:-1])}

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        """Return the velocity of x, computed or predicted."""
        past, skips = self.past, self.skips
        step = self.steps.get(float(sigma.max()))
        if step is None:  # every frame is known, and shown to the network without noise
            return self.denoiser(x, sigma, context)
        if not past.steps:
            velocity = self.denoiser(x, sigma, context)
            self.past = Past((step,), (velocity,), count=1)
            return velocity
        weights, expected = skips.predictor.weigh(step, past.steps)
        predicted = weighted(weights, past.velocities)
        planned = step in skips.computed
        if not (planned or past.alarm):
            return predicted
        velocity = self.denoiser(x, sigma, context)
        error = float((predicted - velocity).norm() / velocity.norm())
        ratio = error / max(expected, LEAST)
        self.past = Past(
            steps=(step, *past.steps)[: skips.order],
            velocities=(velocity, *past.velocities)[: skips.order],
            count=past.count + 1,
            forced=past.forced + (not planned),
            checks=past.checks + 1,
            ratios=past.ratios + ratio**2,
            worst=max(past.worst, ratio),
            alarm=not ratio <= skips.bound,  # also of NaN
        )
        return velocity


def cached(denoiser: Denoiser, skips: Skips, sigmas: Sequence[float], past: Past | None = None) -> Cached:
    """Return a Denoiser that skips steps of the schedule `sigmas` [steps + 1]; `past` is what a resumed one knows.

    Source of the idea of reuse: TeaCache, https://arxiv.org/abs/2411.19108; of the check on computed steps: EasyCache,
    https://arxiv.org/abs/2507.02860. The predictions are our own.
    """
    return Cached(denoiser, skips, sigmas, past)


def weighted(weights: Sequence[float], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the weighted sum of tensors, of as many as there are weights."""
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=False):
        total = total.add_(tensor, alpha=weight)
    return total


def search(predictor: Predictor, sigmas: Sequence[float], count: int, order: int) -> tuple[int, ...]:
    """Return the `count` steps to compute of a schedule `sigmas` [steps + 1], so that predictions err least.

    The error of a step counts as the square of what is expected of it times how far the step goes; early errors grow
    on the way down, by `growth`. Exact by dynamic programming over the last `order` computed steps.
    """
    steps = len(sigmas) - 1
    reach = [growth(sigmas[k]) * (sigmas[k] - sigmas[k + 1]) ** 2 for k in range(steps)]
    best: Ways = {((0,), 1): (0.0, (0,))}
    for step in range(1, steps):
        found: Ways = {}
        losses = {past: reach[step] * predictor.weigh(step, past)[1] ** 2 for past in {past for past, _ in best}}
        for (past, used), (loss, path) in best.items():
            options = [(past, used, loss + losses[past], path)]
            if used < count:
                options.append(((step, *past)[:order], used + 1, loss, (*path, step)))
            for key, number, total, way in options:
                if len(way) + steps - 1 - step < count:
                    continue
                if (key, number) not in found or total < found[key, number][0]:
                    found[key, number] = total, way
        best = found
    return min(best.values())[1]


def growth(sigma: float) -> float:
    """Return by how much a squared error made at sigma grows until the end, as measured on the built-in model.

    Single steps were replaced there: from 15 times near noise over 1 in the middle to a fourth at 0.35; the last
    steps, which nothing corrects, count 3 times.
    """
    places = (0.0, 0.21, 0.29, 0.36, 0.49, 0.59, 0.67, 0.73, 0.84, 0.89, 0.92, 1.0)
    values = (4.0, 2.6, 1.0, 0.3, 0.8, 1.1, 1.6, 2.3, 3.6, 4.4, 14.0, 15.0)
    return float(np.interp(sigma, places, values))
