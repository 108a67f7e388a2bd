"""python -m benchmarks stages --quality --alternatives: other ways to ask less of a network, beside ours at their cost.

What is in runtime/caches.py was chosen by this: each way is measured against predicted steps that ask the network no
more, on the same prompts and seeds. The cost of a step without the unconditional row is half of one, that of a first
block its share of the blocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.quality import SEED, TUNED, Maker, Take, held_out_prompts, kept, matched, plain
from runtime import budget, rungs
from runtime.caches import Moments, Savings, Skips, search
from runtime.fidelity import psnr
from runtime.model import Model
from runtime.models.spec import Context
from runtime.request import Request

GUIDED = 0.6  # share of the steps, the first ones, with guidance or with both rows
ORDER = 2


class OneRow:
    """Asks the conditional row alone behind the first steps: without guidance there, or with the last difference.

    Sources: guidance in an interval, https://arxiv.org/abs/2404.07724; the other row reused, FasterCache,
    https://arxiv.org/abs/2410.19355.
    """

    def __init__(self, model: Model, both: int, *, reuse: bool) -> None:
        self.network: Any = model.transformers[0]
        self.both, self.reuse, self.asked, self.step = both, reuse, 0.0, -1
        self.difference: torch.Tensor | float = 0.0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        self.step += 1
        if self.step < self.both:
            self.asked += 1
            rows = self.network(x, sigma, context.experts[0])
            self.difference = rows[:1] - rows[1:] if self.reuse else 0.0
            return rows
        self.asked += 0.5
        row = self.network(x, sigma, context.row(1).experts[0])
        return torch.cat([row + self.difference, row])


class FirstBlock:
    """Computes the first block at every step, and the others where it has changed; else what they last changed counts.

    Source: first-block cache of ParaAttention, after https://arxiv.org/abs/2411.19108; the last step is computed.
    """

    def __init__(self, model: Model, steps: int, threshold: float) -> None:
        self.network: Any = model.transformers[0]
        self.steps, self.threshold, self.asked, self.step = steps, threshold, 0.0, -1
        self.first: torch.Tensor | None = None
        self.into = self.rest = torch.empty(0)
        self.reused = False

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        self.step += 1
        return self.network(x, sigma, context.experts[0], self.run)

    def run(self, block: nn.Module, h: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Run a block, or pass by."""
        blocks = self.network.blocks
        if block is not blocks[0]:
            out = h if self.reused else block(h, *arguments)
            if block is blocks[-1] and not self.reused:
                self.rest = out - self.into
            return out
        out = block(h, *arguments)
        first = out - h
        self.reused = self.first is not None and self.step < self.steps - 1
        if self.first is not None:
            self.reused &= bool((first - self.first).abs().mean() < self.threshold * self.first.abs().mean())
        self.asked += 1 / len(blocks) if self.reused else 1.0
        if self.reused:
            return out + self.rest
        self.first, self.into = first, out
        return out


def predicted(model: Model, known: budget.Calibrated, count: int, request: Request) -> Take:
    """Make a request with `count` steps computed and the others predicted."""
    moments = Moments(np.array(known.moments), ORDER)
    computed = search(moments, request.schedule(model.spec).tolist(), count, ORDER)
    skips = Skips(frozenset(computed), moments, ORDER, bound=float("inf"))
    made = rungs.make(model, request, Savings(skips))
    return Take(made.frames, made.seconds, count)


def run(model: Model, request: Request, count: int, say: Callable[[str], None]) -> str:
    """Measure `count` prompts and return the table; ValueError for a model that was not calibrated for the request."""
    known, _ = budget.find(model, budget.Setting.of(model, request))
    if known is None or request.steps is None:
        raise ValueError(f"{model.spec.name} was not calibrated for this request; run: python -m runtime calibrate")
    steps = request.steps
    requests = [
        Request(**request.record() | {"prompt": prompt, "seed": SEED + i}).resolved(model.spec)
        for i, prompt in enumerate(held_out_prompts(count + TUNED))
    ]
    tuning, asked_for = requests[:TUNED], requests[TUNED:]
    both = round(GUIDED * steps)

    def first_block(limit: float) -> Maker:
        return partial(plain, model, lambda: FirstBlock(model, steps, limit), steps)

    ways: dict[str, Maker] = {
        f"guidance in the first {both} steps": partial(plain, model, lambda: OneRow(model, both, reuse=False), steps),
        f"both rows in the first {both} steps": partial(plain, model, lambda: OneRow(model, both, reuse=True), steps),
        "first-block reuse": first_block(matched(first_block, len(known.rungs[0].computed) + 2, tuning[:1])),
    }
    exact = [rungs.make(model, each).frames for each in asked_for]
    lines = ["| | network steps | 95 % keep | mean |", "| --- | ---: | ---: | ---: |"]
    for name, make in ways.items():
        takes = [make(each) for each in asked_for]
        cost = statistics.mean(take.asked for take in takes)
        ours = [predicted(model, known, int(cost), each) for each in asked_for]
        lines += [line(name, cost, takes, exact), line("predicted steps beside it", int(cost), ours, exact)]
        say("\n".join(lines[-2:]))
    return "\n".join(lines)


def line(name: str, cost: float, takes: Sequence[Take], exact: Sequence[np.ndarray]) -> str:
    """Return a row of the table."""
    decibel = [psnr(take.frames, frames) for take, frames in zip(takes, exact, strict=True)]
    return f"| {name} | {cost:.1f} | {kept(decibel):.1f} dB | {statistics.mean(decibel):.1f} dB |"
