"""Recipes: how distilled weights are sampled, as their publishers do: few noise levels, a sampler, no guidance.

A recipe is asked for by name, because a LoRA file does not say which one it was made for; a checkpoint may name its own
in runtime.json. Times follow the checkpoint's scheduler: one that takes whole thousandths (UniPC) rounds them down.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sigmas that the network is asked at, from noise down (0 comes after the last), and what else belongs to them."""

    sigmas: tuple[float, ...]
    sampler: str
    guidance: float = 1.0


QUARTERS = (1.0, 15 / 16, 5 / 6, 5 / 8)  # 1, 3/4, 1/2, 1/4, shifted by 5 (`schedules.shifted`)

RECIPES = {
    # LightX2V's step distillation of Wan 2.1: times 1000, 750, 500, 250, shifted by 5; noise is drawn anew each time.
    "lightx2v-4": Recipe(QUARTERS, "lcm"),
    # Wan2.2-Lightning, two experts: the same times; the first two are the first expert's.
    "lightning-4": Recipe(QUARTERS, "euler"),
    # FastWan, distribution matching: times 1000, 757, 522 as they are; noise is drawn anew each time.
    "fastwan-3": Recipe((1.0, 0.757, 0.522), "lcm"),
}
