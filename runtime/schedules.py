"""Sigma schedules: the noise levels a sampler visits, from 1 (noise) down to 0.

Sigmas are kept in float64 as the published schedulers compute them, because the model's own time is a whole number
made from them; the samplers' arithmetic rounds them to float32, again as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

TRAIN_STEPS = 1000  # of the published flow-matching schedulers
NEARLY_NOISE = 1 - 1e-6  # where samplers of higher order start: at 1 the signal's logarithm is infinite


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Return shift * s / (1 + (shift - 1) * s). Source: SD3, https://arxiv.org/abs/2403.03206, eq. 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_linear(steps: int, shift: float) -> np.ndarray:
    """Evenly spaced from 1 towards 1/1000, shifted, then 0: flow-matching UniPC as Wan publishes it."""
    sigmas = shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1], shift)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1 - NEARLY_NOISE
    return np.append(sigmas, 0.0)


def flow_euler(steps: int, shift: float) -> np.ndarray:
    """Evenly spaced from 1 to the shifted 1/1000, shifted again, then 0: the published flow-matching Euler."""
    last = shifted(np.array(1 / TRAIN_STEPS, dtype=np.float32), shift)
    sigmas = shifted(np.linspace(TRAIN_STEPS, float(last) * TRAIN_STEPS, steps) / TRAIN_STEPS, shift)
    return np.append(sigmas.astype(np.float32), 0.0)


SCHEDULES: dict[str, Callable[[int, float], np.ndarray]] = {"flow_linear": flow_linear, "flow_euler": flow_euler}


def make_schedule(name: str, steps: int, shift: float, start: float = 1.0) -> torch.Tensor:
    """Return sigmas [steps' + 1] float64, descending to 0; those above `start` are skipped and the next is `start`."""
    return started(torch.from_numpy(SCHEDULES[name](steps, shift).astype(np.float64)), start)


def given_schedule(sigmas: Sequence[float], start: float = 1.0) -> torch.Tensor:
    """Return the sigmas that were given, and 0 behind them, as `make_schedule` does."""
    return started(torch.tensor([*sigmas, 0.0], dtype=torch.float64), start)


def started(sigmas: torch.Tensor, start: float) -> torch.Tensor:
    """Return a schedule from `start` on."""
    if start < 1:
        below = sigmas[sigmas <= start]
        sigmas = torch.cat([torch.tensor([start], dtype=torch.float64), below[1:] if len(below) > 1 else below])
    return sigmas
