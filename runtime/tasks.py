"""Request -> Plan: a task says which latent frames are known, how firmly, and from which sigma sampling starts."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.models.spec import ModelSpec
from runtime.request import Request


@dataclass(frozen=True)
class Plan:
    """What is sampled: latents of `shape` [C, T, H, W], from sigma `start` (1 = pure noise)."""

    shape: tuple[int, int, int, int]
    start: float = 1.0


def plan_task(request: Request, spec: ModelSpec) -> Plan:
    """Return the plan of a resolved request: text to video, or to an image where it asks for one frame."""
    assert request.num_frames and request.height and request.width
    return Plan(shape=spec.latent_shape(request.num_frames, request.height, request.width))
