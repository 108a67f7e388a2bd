"""Samplers: pure step functions over an explicit state, state -> velocity -> state.

All take a flow-matching velocity: x = (1 - sigma) * video + sigma * noise, velocity = noise - video.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

LEGAL_OPTIONS = {"unipc": ("order", "solver", "skip_corrector"), "euler": (), "lcm": ("seed",)}


@dataclass(frozen=True)
class Past:
    """What skipping steps remembers: the last computed velocities, and how good predictions of them were."""

    steps: tuple[int, ...] = ()  # where the network was asked last, newest first
    velocities: tuple[torch.Tensor, ...] = ()  # what it said there
    count: int = 0  # steps computed so far
    forced: int = 0  # of these, those that only the guard asked for
    checks: int = 0  # computed steps that were predicted as well
    ratios: float = 0.0  # sum over them of (error of the prediction / expected error)^2
    worst: float = 0.0  # the largest of these ratios
    alarm: bool = False  # the newest prediction was worse than its bound

    def to(self, device: torch.device) -> Past:
        """Return the same on a device."""
        return replace(self, velocities=tuple(velocity.to(device) for velocity in self.velocities))


@dataclass(frozen=True)
class SamplerState:
    """All that a resume needs."""

    step: int
    x: torch.Tensor  # [B, C, T, H, W] float32
    history: tuple[torch.Tensor, ...] = ()  # the last predictions of the clean video, newest first
    corrected: torch.Tensor | None = None  # the x that the last step started from, after correction
    past: Past | None = None  # where steps are skipped

    def to(self, device: torch.device) -> SamplerState:
        """Return the state on a device."""
        corrected = None if self.corrected is None else self.corrected.to(device)
        history = tuple(past.to(device) for past in self.history)
        past = None if self.past is None else self.past.to(device)
        return SamplerState(self.step, self.x.to(device), history, corrected, past)


Step: TypeAlias = "Callable[[SamplerState, torch.Tensor, Sequence[float]], SamplerState]"


def euler(state: SamplerState, velocity: torch.Tensor, sigmas: Sequence[float]) -> SamplerState:
    """One Euler step of the flow's ordinary differential equation."""
    here, there = (float(np.float32(s)) for s in sigmas[state.step : state.step + 2])
    return SamplerState(state.step + 1, state.x.add(velocity, alpha=there - here))


def lcm(state: SamplerState, velocity: torch.Tensor, sigmas: Sequence[float], *, seed: int = 0) -> SamplerState:
    """One step to the clean video that the network sees, and back up to the next sigma with fresh noise.

    The noise follows from the seed and the step alone, so that a resumed run draws the same.
    Source: multistep consistency sampling, https://arxiv.org/abs/2303.01469, algorithm 1.
    """
    here, there = (float(np.float32(s)) for s in sigmas[state.step : state.step + 2])
    clean = state.x.sub(velocity, alpha=here)
    if there == 0:
        return SamplerState(state.step + 1, clean)
    fresh = fresh_noise(state.x, seed, state.step)
    return SamplerState(state.step + 1, (1 - there) * clean + there * fresh)


def fresh_noise(x: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Return the noise like x that a step draws, on x's device; the numbers are the CPU's on every device."""
    import torch

    digest = hashlib.sha256(f"seed {seed}, behind step {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randn(x.shape, generator=generator).to(x.device)


def unipc(
    state: SamplerState,
    velocity: torch.Tensor,
    sigmas: Sequence[float],
    *,
    order: int = 2,
    solver: str = "bh2",
    skip_corrector: tuple[int, ...] = (),
) -> SamplerState:
    """One step of UniPC on the prediction of the clean video: correct where we stand, then predict the next x.

    The order falls to 1 at both ends. Source: https://arxiv.org/abs/2302.04867, algorithms 5 to 8, B(h) as `solver`.
    """
    step, steps = state.step, len(sigmas) - 1
    here = float(np.float32(sigmas[step]))
    clean = state.x.sub(velocity, alpha=here)
    x = state.x
    if state.corrected is not None and step - 1 not in skip_corrector:
        used = effective_order(step - 1, steps, order)
        x = _update(state.corrected, sigmas, step - 1, step, state.history, used, solver, newest=clean)
    history = (clean, *state.history[: order - 1])
    ahead = _update(x, sigmas, step, step + 1, history, effective_order(step, steps, order), solver)
    return SamplerState(step + 1, ahead, history, x)


def effective_order(step: int, steps: int, order: int) -> int:
    """Return the order used at a step: it grows from 1 as history does, and falls to 1 at the end."""
    return min(order, step + 1, steps - step)


def _update(
    x: torch.Tensor,
    sigmas: Sequence[float],
    start: int,
    end: int,
    history: tuple[torch.Tensor, ...],
    order: int,
    solver: str,
    newest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move x from sigmas[start] to sigmas[end]; with `newest`, the prediction at `end`, as a corrector.

    Scalars are float64, made from float32 sigmas; the result is one weighted sum of tensors.
    """
    level = [float(np.float32(s)) for s in sigmas]

    def log_snr(i: int) -> float:
        return math.log(1 - level[i]) - math.log(level[i]) if level[i] > 0 else math.inf

    h = log_snr(end) - log_snr(start)
    phi_1 = math.expm1(-h)
    base = -h if solver == "bh1" else phi_1
    ratios = [(log_snr(start - i) - log_snr(start)) / h for i in range(1, order)]
    weights = _weights([*ratios, 1.0] if newest is not None else ratios, h, phi_1, base)
    signal = 1 - level[end]
    terms = [(history[i], -signal * base * w / r) for i, (w, r) in enumerate(zip(weights, ratios, strict=False), 1)]
    if newest is not None:
        terms.append((newest, -signal * base * weights[-1]))
    out = x * (level[end] / level[start])
    out.add_(history[0], alpha=-signal * phi_1 - sum(w for _, w in terms))
    for tensor, weight in terms:
        out.add_(tensor, alpha=weight)
    return out


def _weights(ratios: list[float], h: float, phi_1: float, base: float) -> list[float]:
    """Solve UniPC's order conditions for the weights of the differences; order 1 has the published shortcut 1/2."""
    if not ratios:
        return []
    if len(ratios) == 1:
        return [0.5]
    rows, right = [], []
    phi, factorial = phi_1 / -h - 1, 1
    for power in range(len(ratios)):
        rows.append([r**power for r in ratios])
        right.append(phi * factorial / base)
        factorial *= power + 2
        phi = phi / -h - 1 / factorial
    return list(np.linalg.solve(np.array(rows), np.array(right)))


def make_sampler(name: str, options: Mapping[str, Any] | None = None) -> Step:
    """Return the step function called `name`, with those of `options` that it has; ValueError names the legal ones."""
    if name not in LEGAL_OPTIONS:
        raise ValueError(f"sampler {name!r} is not known; legal: {', '.join(sorted(LEGAL_OPTIONS))}")
    chosen = {key: value for key, value in (options or {}).items() if key in LEGAL_OPTIONS[name]}
    return partial({"unipc": unipc, "euler": euler, "lcm": lcm}[name], **chosen)


def start(noise: torch.Tensor) -> SamplerState:
    """Return the state before the first step."""
    return SamplerState(0, noise)
