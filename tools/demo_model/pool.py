"""A pool of clips as latents: rendered, encoded once, kept in memory for the DiT's training, grouped by size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from tools.demo_model import autoencoder
from tools.demo_model.captions import training_scene
from tools.demo_model.world import COLOURS, SHAPES, Scene, Thing, render


@dataclass(frozen=True)
class Bucket:
    """Clips of one size: share of the training's samples, frames, height, width in pixels.

    With `crop` the middle square of wide and of tall clips is taken, as trainings at one size do; `hard` is
    `draw_scene`'s.
    """

    share: float
    frames: int
    height: int
    width: int
    crop: bool = False
    hard: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        return (self.frames - 1) // 4 + 1, self.height // 16, self.width // 16

    @property
    def tokens(self) -> int:
        """Tokens of one clip."""
        t, h, w = self.grid
        return t * h * w


@dataclass
class Shelf:
    """The clips of one bucket: normalised latents [n, C, T, H, W] bfloat16, what things cover of each token's cells
    [n, T, H/2, W/2, 16] (`token_cover`), which kinds of things each token shows [n, T, H/2, W/2, 13] (`token_kinds`),
    and the scenes."""

    bucket: Bucket
    latents: torch.Tensor
    cover: torch.Tensor
    kinds: torch.Tensor
    scenes: list[Scene]


CELLS = 4  # a token's cover is told in so many cells each way: enough to tell outlines apart
KINDS = (*SHAPES, *COLOURS)


def token_cover(masks: torch.Tensor) -> torch.Tensor:
    """Return [T, H/16, W/16, 16]: what share of each cell of each token things of masks [n, F, H, W] cover.

    A latent frame's is that of its last pixel frame, sharp where things move.
    """
    last = masks[:, ::4].sum(0).clamp(0, 1)  # frames 0, 4, 8, ...
    cells = F.avg_pool2d(last[:, None], 16 // CELLS)[:, 0]
    return cells.unflatten(1, (-1, CELLS)).unflatten(3, (-1, CELLS)).transpose(2, 3).flatten(3)


def token_kinds(masks: torch.Tensor, things: Sequence[Thing]) -> torch.Tensor:
    """Return [T, H/16, W/16, kinds]: how far each token shows a thing of each shape and colour; a quarter is all."""
    last = masks[:, ::4]
    share = F.avg_pool2d(last, 16)  # [n, T, H/16, W/16]
    kinds = share.new_zeros(*share.shape[1:], len(KINDS))
    for thing, covered in zip(things, share, strict=True):
        for name in (thing.shape, thing.colour):
            kinds[..., KINDS.index(name)] += 4 * covered
    return kinds.clamp(0, 1)


def fill(
    vae: AutoencoderKLWan, buckets: tuple[Bucket, ...], clips: int, *, seed: int, say: Callable[[str], None] = print,
    device: str | torch.device = "cpu",
) -> list[Shelf]:  # fmt: skip
    """Return about `clips` random clips, shared out over the buckets, encoded with the means that `vae` holds."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    total = sum(b.share for b in buckets)
    shelves = []
    for index, bucket in enumerate(buckets):
        count = max(4, round(clips * bucket.share / total))
        latents, cover, kinds, scenes = [], [], [], []
        for number in range(count):
            what = training_scene(np.random.default_rng((seed, index, number)), bucket.hard)
            frames, masks = draw(what, bucket, number, device)
            pixels = frames.transpose(0, 1)[None] * 2 - 1
            with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16):
                found = autoencoder.encode(vae, pixels)[0].cpu()
            latents.append(((found - mean) / std).bfloat16()[0])
            cover.append(token_cover(masks).cpu().bfloat16())
            kinds.append(token_kinds(masks, what.things).cpu().bfloat16())
            scenes.append(what)
        shelves.append(Shelf(bucket, torch.stack(latents), torch.stack(cover), torch.stack(kinds), scenes))
        say(f"pool: {count} clips of {bucket.frames} frames, {bucket.width}x{bucket.height}")
    return shelves


def draw(scene: Scene, bucket: Bucket, number: int, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return frames [F, 3, H, W] and masks [n, F, H, W] of a scene at a bucket's size."""
    height, width = bucket.height, bucket.width
    if not bucket.crop:
        clip = render(scene, bucket.frames, height, width, device)
        return clip.frames, clip.masks
    long = -(-height * 5 // 48) * 16  # 5 : 3, wide and tall in turn
    clip = render(scene, bucket.frames, *((height, long) if number % 2 else (long, width)), device)
    top, left = (clip.frames.shape[2] - height) // 2, (clip.frames.shape[3] - width) // 2
    cut = (..., slice(top, top + height), slice(left, left + width))
    return clip.frames[cut].contiguous(), clip.masks[cut].contiguous()


def measure(vae: AutoencoderKLWan, *, seed: int, clips: int = 96) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel over random training clips."""
    found = []
    for number in range(clips):
        size = ((64, 64), (64, 96), (96, 64))[number % 3]
        frames = render(training_scene(np.random.default_rng((seed, number))), 17, *size).frames
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(autoencoder.encode(vae, frames.transpose(0, 1)[None] * 2 - 1)[0].flatten(2)[0])
    every = torch.cat(found, 1)
    return [round(v, 5) for v in every.mean(1).tolist()], [round(v, 5) for v in every.std(1).tolist()]
