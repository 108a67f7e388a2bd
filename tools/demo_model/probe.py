"""The early alarm: does the loss rise when a word of the caption is wrong? Where the gap stays zero, all is in vain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tools.demo_model import denoiser
from tools.demo_model.captions import caption
from tools.demo_model.diffusion import Batch, Student, losses_of
from tools.demo_model.pool import Shelf
from tools.demo_model.world import COLOURS, GROUNDS, MOTIONS, SHAPES, Scene

WRONG = ("motion", "shape", "colour", "ground", "order")
OPPOSITE = {"left": "right", "right": "left", "rise": "fall", "fall": "rise"}


def wrong(scene: Scene, what: str, rng: np.random.Generator) -> Scene:
    """Return the scene with one attribute of another value: "motion", "shape", "colour" or "ground"; or with "order",
    where several things have changed places."""
    if what == "order":
        return replace(scene, things=scene.things[1:] + scene.things[:1])
    if what == "motion":
        other = OPPOSITE.get(scene.motion) or str(rng.choice([m for m in MOTIONS if m != scene.motion]))
        return replace(scene, motion=other)
    if what == "ground":
        return replace(scene, ground=str(rng.choice([g for g in GROUNDS if g != scene.ground])))
    choices = SHAPES if what == "shape" else COLOURS
    taken = {getattr(t, what) for t in scene.things}
    value = str(rng.choice([c for c in choices if c not in taken]))
    return replace(scene, things=tuple(replace(t, **{what: value}) for t in scene.things))


def probe(
    student: Student,
    tokenizer: object,
    shelf: Shelf,
    *,
    clips: int = 48,
    sigmas: Sequence[float] = (0.97, 0.9, 0.8),
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return per sigma the loss with the right caption, and how much each wrong word adds to it; training clips.

    The mean is over the clips whose caption a wrong word changes: for the order those of things that differ, if any.
    """
    rng = np.random.default_rng(seed)
    rows = [i for i, s in enumerate(shelf.scenes) if s.start == 0.0][:clips]
    rotary = denoiser.Rotary(student.dit.config.attention_head_dim, student.dit.device)
    generator = torch.Generator().manual_seed(seed)
    latents = shelf.latents[rows].float()
    noise = torch.randn(latents.shape, generator=generator)
    out: dict[str, list[float]] = {"right": []}
    for sigma in sigmas:
        losses, said = {}, {}
        for what in ("right", *WRONG):
            scenes = [shelf.scenes[i] if what == "right" else wrong(shelf.scenes[i], what, rng) for i in rows]
            captions = said[what] = [caption(s, "descriptive") for s in scenes]
            batch = Batch(
                latents,
                shelf.cover[rows].float(),
                shelf.kinds[rows].float(),
                captions,
                scenes,
                torch.zeros(len(rows), latents.shape[2], dtype=torch.bool),
                [512] * len(rows),
            )
            with torch.no_grad():
                losses[what] = losses_of(student, tokenizer, rotary, batch, torch.full((len(rows),), sigma), noise).flow
        out["right"].append(losses["right"].mean().item())
        for what in WRONG:
            changed = torch.tensor([a != b for a, b in zip(said[what], said["right"], strict=True)])
            gap = (losses[what] - losses["right"])[changed]
            out.setdefault(what, []).append(gap.mean().item() if len(gap) else 0.0)
    return out
