"""How much of everything a training takes, and the one function that does it all, from nothing to a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer

from tools.demo_model import autoencoder, export, text
from tools.demo_model.diffusion import Stage, Student, train
from tools.demo_model.pool import Bucket, Shelf, fill, measure
from tools.demo_model.probe import probe
from tools.demo_model.training import Run

BUCKETS = (
    Bucket(0.26, 17, 96, 160),
    Bucket(0.30, 17, 96, 160, hard=True),
    Bucket(0.10, 1, 96, 160, hard=True),  # pictures teach what belongs to which thing for a fifth of a clip's tokens
    Bucket(0.05, 17, 64, 96, hard=True),
    Bucket(0.07, 17, 64, 96),
    Bucket(0.03, 17, 64, 64),
    Bucket(0.03, 17, 96, 64),
    Bucket(0.04, 33, 96, 160),
    Bucket(0.03, 17, 160, 96),
    Bucket(0.02, 9, 96, 160),
    Bucket(0.02, 49, 64, 96),
    Bucket(0.02, 1, 96, 160),
    Bucket(0.01, 1, 128, 128),
    Bucket(0.01, 1, 192, 320),
    Bucket(0.01, 17, 192, 320),
)
SQUARES = (Bucket(0.9, 17, 96, 96, crop=True), Bucket(0.1, 1, 96, 96, crop=True))  # to compare the framing with
LADDER = (1, 4, 16)  # shares of the training's steps after which averaged weights are kept, as checkpoints to compare


@dataclass(frozen=True)
class Recipe:
    """Steps of the autoencoder on pictures, on clips, and of its decoder alone; clips in the pool; the stages of the
    DiT; the networks' sizes."""

    pictures: int
    clips: int
    finish: int
    pool: int
    stages: tuple[Stage, ...]
    width: int = 256
    layers: int = 6
    ffn: int = 1024
    text_width: int = 128
    buckets: tuple[Bucket, ...] = BUCKETS
    batch: int = 1  # how many times the clips of a step that the CPU takes


SMOKE = (Bucket(0.8, 9, 64, 64), Bucket(0.2, 1, 64, 64))
# On the CPU as it was found out: the first stage has no weight on things and no losses of kinds; the third has larger
# batches (the optimizer's time is the same), and noise levels where shapes and colours are settled.
CPU = (
    Stage(4200),
    Stage(5000, 3000, things=6.0, kinds=0.3, covers=0.8, compiled=True),
    Stage(3600, 4800, rate=2e-3, things=6.0, kinds=0.3, covers=0.5, compiled=True, shift=5.0),
)
GPU = (Stage(30000, 38400, things=6.0, kinds=0.3, covers=0.8, compiled=True),)
RECIPES = {
    "smoke": Recipe(
        2, 2, 1, 8, (Stage(8, 200), Stage(8, 200, things=1.0, kinds=0.3)),
        width=128, ffn=256, text_width=64, buckets=SMOKE,
    ),
    "cpu": Recipe(500, 4050, 900, 9000, CPU),
    "gpu": Recipe(2000, 12000, 4000, 60000, GPU, batch=8),
}  # fmt: skip


def train_autoencoder(folder: Path, recipe: Recipe, *, seed: int, say: Callable[[str], None]) -> AutoencoderKLWan:
    """Return the trained autoencoder with its latents' statistics; taken from `folder` where it is finished there."""
    done = folder / "vae"
    if not (done / "config.json").exists():
        vae = autoencoder.train(folder, recipe.pictures, recipe.clips, seed=seed, batch_scale=recipe.batch, say=say)
        mean, std = measure(vae, seed=seed + 1)
        vae.register_to_config(latents_mean=mean, latents_std=std)
        vae.save_pretrained(done)
    vae = AutoencoderKLWan.from_pretrained(done)
    autoencoder.channels_last(vae)
    return vae


def make(folder: Path, recipe: Recipe, *, seed: int = 0, say: Callable[[str], None] = print) -> Path:
    """Train everything and write the checkpoint to `folder`/checkpoint; a stopped run goes on where it was.

    What was learned after a sixteenth and a quarter of the DiT's steps lies in `folder`/ladder.

    Deterministic: the same recipe, seed, machine and number of threads give the same checkpoint.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = train_autoencoder(folder, recipe, seed=seed, say=say)
    text.write_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    shelves: list[Shelf] = fill(vae.to(device), recipe.buckets, recipe.pool, seed=seed + 2, say=say, device=device)
    torch.manual_seed(seed)
    student = Student(
        width=recipe.width,
        layers=recipe.layers,
        ffn=recipe.ffn,
        text_width=recipe.text_width,
        channels=vae.config.z_dim,
    ).to(device)

    total = sum(stage.steps for stage in recipe.stages)
    before = 0
    for number, stage in enumerate(recipe.stages):

        def watch(run: Run, before: int = before) -> None:
            gaps = probe(student, tokenizer, shelves[0], clips=min(48, len(shelves[0].scenes)))
            told = ", ".join(f"{k} {' '.join(f'{v:+.4f}' for v in row)}" for k, row in gaps.items())
            say(f"probe after {before + run.step}: {told}")
            for rung in LADDER[:-1]:
                if before + run.step == total * rung // LADDER[-1]:
                    torch.save(run.averaged(), folder / f"student-{rung}x.pt")

        train(
            folder / f"dit-{number + 1}", student, tokenizer, shelves, stage, seed=seed + number, say=say, watch=watch,
            watch_every=max(total // LADDER[-1], 1),
        )  # fmt: skip
        before += stage.steps
    torch.save(student.state_dict(), folder / f"student-{LADDER[-1]}x.pt")
    vae = autoencoder.finish(folder, vae, recipe.finish, seed=seed, batch_scale=recipe.batch, say=say)
    for rung in LADDER:
        if (kept := folder / f"student-{rung}x.pt").exists():
            student.load_state_dict(torch.load(kept, weights_only=True))
            place = folder / ("checkpoint" if rung == LADDER[-1] else f"ladder/{rung}x")
            export.write(place, copy.deepcopy(vae).cpu(), copy.deepcopy(student).cpu())
    return folder / "checkpoint"
