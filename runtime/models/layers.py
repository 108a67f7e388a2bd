"""The few modules and tables that families share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from runtime.models.spec import Stretch


def timestep_embedding(time: torch.Tensor, width: int) -> torch.Tensor:
    """Return the sinusoids [n, width] float32 of times [n], cosines first; periods 2 pi to 10000 * 2 pi."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@lru_cache(maxsize=32)
def _axis_table(size: int, length: int, theta: float, kind: str | None = None, trained: int = 0) -> torch.Tensor:
    """(cos, sin) of one axis, [length, size / 2, 2] float32, computed in float64 as published."""
    if kind == "ntk" and length > trained and size > 2:
        theta *= (length / trained) ** (size / (size - 2))
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    if kind == "riflex" and length > trained:
        own = int((2 * math.pi / frequencies - trained).abs().argmin())  # the one that would begin again
        frequencies[own] = 0.9 * 2 * math.pi / length
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=2).float()


def rotary_table(
    head_size: int,
    grid: Sequence[int],
    max_positions: int,
    theta: float = 10000.0,
    stretch: Stretch | None = None,
) -> torch.Tensor:
    """Return (cos, sin) [L, K/2, 2] float32 for a (t, h, w) grid of tokens; t takes what h and w leave of the head.

    `stretch` spreads positions where the grid is larger than weights were trained on: "ntk" slows low frequencies down
    on each axis (https://arxiv.org/abs/2309.00071, section 3.1), "riflex" the one that would repeat in time
    (https://arxiv.org/abs/2502.15894). Raises ValueError where the grid is longer than `max_positions` on an axis.
    Source: Wan `rope_params`: h and w get 2 * (K // 6) each.
    """
    if max(grid) > max_positions:
        raise ValueError(f"{tuple(grid)} tokens in (time, height, width); the model's table has {max_positions}")
    side = 2 * (head_size // 6)
    t, h, w = grid
    kind, trained = (None, (0, 0, 0)) if stretch is None else (stretch.kind, stretch.trained)
    space = kind if kind == "ntk" else None
    tables = [
        _axis_table(head_size - 2 * side, t, theta, kind, trained[0]).view(t, 1, 1, -1, 2),
        _axis_table(side, h, theta, space, trained[1]).view(1, h, 1, -1, 2),
        _axis_table(side, w, theta, space, trained[2]).view(1, 1, w, -1, 2),
    ]
    return torch.cat([table.expand(t, h, w, -1, 2) for table in tables], dim=3).flatten(0, 2).contiguous()
