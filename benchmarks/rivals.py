"""Plain TeaCache and EasyCache, to compare with: what they do to the network's rows, in our own sampler.

They wrap the rows before guidance, as published, and hold one request each: a Denoiser that counts in `asked`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from runtime.denoising import prepare_context
from runtime.guidance import guided
from runtime.latents import draw_noise
from runtime.model import Model
from runtime.models.spec import Context
from runtime.request import Request
from runtime.samplers import make_sampler, start
from runtime.text import encode_prompt

WARM = 0.2  # share of the steps that EasyCache computes at first, as published (10 of 50)


class EasyCache:
    """Adds the last computed difference of output and input to x, while a running estimate of the change is small.

    Source: https://arxiv.org/abs/2507.02860 and its published code for Wan 2.1; the conditional row decides.
    """

    def __init__(self, model: Model, steps: int, threshold: float) -> None:
        self.network: Any = model.transformers[0]
        self.steps, self.threshold, self.asked, self.step = steps, threshold, 0, -1
        self.last_x: torch.Tensor | None = None
        self.computed_x: torch.Tensor | None = None
        self.last_out: torch.Tensor | None = None
        self.difference: torch.Tensor | None = None
        self.rate: float | None = None
        self.total = 0.0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        self.step += 1
        fixed = self.step < WARM * self.steps or self.step == self.steps - 1 or self.threshold <= 0
        if not fixed and self.rate is not None and self.last_x is not None and self.last_out is not None:
            assert self.difference is not None
            change = float((x - self.last_x).abs().mean() / self.last_out[-1:].abs().mean())
            self.total += self.rate * change
            if self.total < self.threshold:
                self.last_x = x
                return x + self.difference
        out = self.network(x, sigma, context.experts[0])
        self.asked += 1
        if self.last_out is not None and self.computed_x is not None:
            moved = float((x - self.computed_x).abs().mean())
            self.rate = float((out[-1:] - self.last_out[-1:]).abs().mean()) / max(moved, 1e-12)
        self.last_x = self.computed_x = x
        self.last_out, self.difference, self.total = out, out - x, 0.0
        return out


class TeaCache:
    """Adds the last computed change of the blocks, while the time's modulation, rescaled by `fit`, has moved little.

    Source: https://arxiv.org/abs/2411.19108 and its published code for Wan 2.1; first and last step are computed.
    """

    def __init__(self, model: Model, steps: int, threshold: float, fit: np.ndarray) -> None:
        self.network: Any = model.transformers[0]
        self.steps, self.threshold, self.fit, self.asked, self.step = steps, threshold, fit, 0, -1
        self.signal: torch.Tensor | None = None
        self.total = 0.0
        self.residual = self.into = torch.empty(0)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        self.step += 1
        signal = modulation(self.network, sigma)
        if self.signal is not None:
            self.total += abs(float(np.polyval(self.fit, distance(signal, self.signal))))
        self.signal = signal
        compute = self.step in (0, self.steps - 1) or self.total >= self.threshold
        if compute:
            self.total, self.asked = 0.0, self.asked + 1
        return self.network(x, sigma, context.experts[0], self.computed if compute else self.reused)

    def computed(self, block: nn.Module, h: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Run a block, and keep by how much all of them together change what comes in."""
        if block is self.network.blocks[0]:
            self.into = h
        out = block(h, *arguments)
        if block is self.network.blocks[-1]:
            self.residual = out - self.into
        return out

    def reused(self, block: nn.Module, h: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Take the first block for all of them."""
        return h + self.residual if block is self.network.blocks[0] else h


def modulation(network: Any, sigma: torch.Tensor) -> torch.Tensor:
    """Return the time's modulation of the first block."""
    return network.modulate_time(network.times(sigma))[0][0]


def distance(new: torch.Tensor, old: torch.Tensor) -> float:
    """Return the mean absolute change relative to the old mean."""
    return float((new - old).abs().mean() / old.abs().mean())


def polynomial(model: Model, request: Request) -> np.ndarray:
    """Return TeaCache's rescaling for a model: degree 4, from changes of the modulation to those of the output."""
    assert request.steps and request.shift is not None and request.seed is not None and request.sampler is not None
    assert request.num_frames and request.height and request.width
    shape = model.spec.latent_shape(request.num_frames, request.height, request.width)
    sigmas = request.schedule(model.spec)
    sampler = make_sampler(request.sampler, model.spec.sampler_options)
    network: Any = model.transformers[0]
    outputs: list[torch.Tensor] = []

    def rows(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        outputs.append(network(x, sigma, context.experts[0]))
        return outputs[-1]

    denoiser = guided(rows, float(request.guidance or 0.0), batched=True)
    with torch.inference_mode():
        context = prepare_context(model, encode_prompt(model, request)[0], shape)
        state = start(draw_noise(shape, request.seed).to(model.device))
        for step in range(request.steps):
            state = sampler(state, denoiser(state.x, sigmas[step : step + 1], context), sigmas.tolist())
        signals = [modulation(network, sigma[None]) for sigma in sigmas[:-1]]
        moves = [distance(b, a) for a, b in pairwise(signals)]
        changes = [distance(b, a) for a, b in pairwise(outputs)]
    return np.polyfit(moves, changes, min(4, len(moves) - 1))
