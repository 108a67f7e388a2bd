"""Trains text encoder and DiT together by flow matching on a pool of latents, with some latent frames known.

Two losses stand beside the flow's and go with their heads at the end: hidden states must tell where their token stands
(the architecture knows distances only, and "starts at the right" needs a place) and which cells of it a thing covers
(what a caption says about motion and shape is a small part of the flow's loss and all of this one).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tools.demo_model import denoiser, text
from tools.demo_model.captions import training_caption
from tools.demo_model.pool import CELLS, Shelf
from tools.demo_model.training import Run

PLACE_TAPS, COVER_TAPS = (1, 3), (3, 4)


class Student(nn.Module):
    """What is trained: text encoder, DiT, and the heads of the two auxiliary losses."""

    def __init__(self, *, width: int, layers: int, ffn: int, text_width: int, channels: int) -> None:
        super().__init__()
        self.encoder = text.build(text_width)
        self.dit = denoiser.build(width=width, layers=layers, ffn=ffn, text=text_width, channels=channels)
        self.place = nn.ModuleList([nn.Linear(width, 3) for _ in PLACE_TAPS])
        self.cover = nn.ModuleList([nn.Linear(width, CELLS * CELLS) for _ in COVER_TAPS])

    def optimizers(self, rate: float) -> list[torch.optim.Optimizer]:
        """Return Muon for the matrices of the blocks, AdamW for all else."""
        matrices, rest = [], []
        for name, p in self.named_parameters():
            inner = ".blocks." in name or ".block." in name
            (matrices if inner and p.ndim == 2 and "relative_attention_bias" not in name else rest).append(p)
        return [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate / 2, betas=(0.9, 0.98), weight_decay=0.0),
        ]


def draw_sigma(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return sigmas [B]: half as sampling with shift 3 visits them, half around the middle; few at the clean end."""
    even = torch.rand(count, generator=generator)
    shifted = 3 * even / (1 + 2 * even)
    middle = torch.sigmoid(0.8 + 1.2 * torch.randn(count, generator=generator))
    return torch.where(torch.rand(count, generator=generator) < 0.5, shifted, middle).clamp(0.002, 1.0)


def draw_known(count: int, frames: int, rng: np.random.Generator) -> torch.Tensor:
    """Return [B, T], true where a latent frame is given: the first, the head, the tail, both ends, or any; or none."""
    known = torch.zeros(count, frames, dtype=torch.bool)
    if frames == 1:
        return known
    for row in known:
        if rng.random() > 0.35:
            continue
        kind, some = rng.choice(5, p=(0.45, 0.15, 0.15, 0.15, 0.10)), int(rng.integers(1, frames))
        match kind:
            case 0:
                row[0] = True
            case 1:
                row[:some] = True
            case 2:
                row[-some:] = True
            case 3:
                row[0] = row[-1] = True
            case _:
                row[torch.from_numpy(rng.random(frames) < 0.4)] = True
        if row.all():
            row[-1] = False
    return known


def encode_text(
    student: Student, tokenizer: object, captions: Sequence[str], length: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return text [B, S + 1, D], a zero token at the end, and the bias [B, 1, 1, S + 1] that makes it n tokens."""
    ids, mask = text.tokenize(tokenizer, list(captions))
    device = student.dit.device
    ids, mask = ids.to(device), mask.to(device)
    hidden = student.encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    hidden = F.pad(hidden, (0, 0, 0, 1))
    padding = torch.tensor(length, device=device)[:, None] - mask.sum(1, keepdim=True)
    bias = torch.where(mask > 0, 0.0, float("-inf"))
    return hidden, torch.cat([bias, padding.clamp_min(1).log()], 1)[:, None, None].float()


@dataclass
class Batch:
    """Latents x0 [B, C, T, H, W] float32, cover [B, T, h, w, 16], captions, known [B, T], padded texts' lengths."""

    latents: torch.Tensor
    cover: torch.Tensor
    captions: list[str]
    known: torch.Tensor
    lengths: list[int]


def draw_batch(shelves: Sequence[Shelf], rng: np.random.Generator, tokens: int) -> Batch:
    """Return as many clips of one bucket as hold about `tokens` tokens."""
    shares = np.array([s.bucket.share for s in shelves])
    shelf = shelves[rng.choice(len(shelves), p=shares / shares.sum())]
    size = max(1, round(tokens / shelf.bucket.tokens))
    rows = rng.integers(len(shelf.scenes), size=size)
    latents, cover = shelf.latents[rows].float(), shelf.cover[rows].float()
    if latents.shape[2] > 2 and rng.random() < 0.06:  # loops have no first frame
        latents, cover = latents[:, :, 1:], cover[:, 1:]
    captions = ["" if rng.random() < 0.1 else training_caption(shelf.scenes[i], rng) for i in rows]
    lengths = [int(n) for n in rng.choice((512, 226, 128, 64), size=size, p=(0.7, 0.1, 0.1, 0.1))]
    return Batch(latents, cover, captions, draw_known(size, latents.shape[2], rng), lengths)


def flow_loss(
    student: Student, tokenizer: object, rotary: denoiser.Rotary, batch: Batch, sigma: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return per sample [B] the flow's squared error over unknown frames, and the losses of places and covers."""
    device = student.dit.device
    x0, noise, known = batch.latents.to(device), noise.to(device), batch.known.to(device)
    at = torch.where(known, 0.0, sigma.to(device)[:, None])  # [B, T]
    level = at[:, None, :, None, None]
    with torch.autocast(device.type, torch.bfloat16):
        hidden, bias = encode_text(student, tokenizer, batch.captions, batch.lengths)
        x = ((1 - level) * x0 + level * noise).bfloat16()
        taps = sorted({*PLACE_TAPS, *COVER_TAPS})
        velocity, kept = denoiser.forward(student.dit, x, at, hidden, bias, rotary, taps)
    unknown = (~known).float()
    error = (velocity.float() - (noise - x0)).square().mean((1, 3, 4))  # [B, T]
    flow = (error * unknown).sum(1) / unknown.sum(1)
    states = {tap: F.layer_norm(h, h.shape[-1:]) for tap, h in zip(taps, kept, strict=True)}
    cover = batch.cover.to(device).flatten(2, 3)
    grid = batch.cover.shape[1:4]
    axes = torch.meshgrid(
        *(torch.linspace(-1, 1, n, device=device) if n > 1 else torch.zeros(1, device=device) for n in grid),
        indexing="ij",
    )
    place = torch.stack(axes, -1).flatten(1, 2)  # [T, hw, 3]
    places = sum(
        (head(states[tap]) - place).square().mean((1, 2, 3))
        for head, tap in zip(student.place, PLACE_TAPS, strict=True)
    )
    covers = sum(
        F.binary_cross_entropy_with_logits(head(states[tap]), cover, reduction="none").mean((1, 2, 3))
        for head, tap in zip(student.cover, COVER_TAPS, strict=True)
    )
    return flow, places / len(PLACE_TAPS), covers / len(COVER_TAPS)


def train(
    folder: Path, student: Student, tokenizer: object, shelves: Sequence[Shelf], steps: int, *, tokens: int = 2400,
    rate: float = 3e-3, seed: int = 0, say: Callable[[str], None] = print, watch: Callable[[Run], None] | None = None,
    watch_every: int = 500,
) -> Student:  # fmt: skip
    """Train for `steps` steps of about `tokens` tokens; return the student with averaged weights."""
    torch.manual_seed(seed)
    run = Run(
        folder / "dit", student, student.optimizers(rate), steps, warm=min(100, steps // 10 + 1), flat=0.35, decay=0.999
    )
    rotary = denoiser.Rotary(student.dit.config.attention_head_dim, student.dit.device)
    since, seen = time.monotonic(), []
    while run.step < steps:
        rng = np.random.default_rng((seed, 7, run.step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch = draw_batch(shelves, rng, tokens)
        sigma = draw_sigma(len(batch.captions), generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        flow, places, covers = flow_loss(student, tokenizer, rotary, batch, sigma, noise)
        placing = 0.3 - 0.27 * min(1.0, 1.5 * run.step / steps)  # places are learned first
        run.update(flow.mean() + placing * places.mean() + 0.6 * covers.mean())
        seen.append((flow.mean().item(), places.mean().item(), covers.mean().item()))
        if run.step % 100 == 0 or run.step == steps:
            values = np.mean(seen, 0)
            flow_, place_, cover_, seconds = *(float(v) for v in values), time.monotonic() - since
            run.log(flow=flow_, place=place_, cover=cover_, seconds=seconds)
            say(f"dit {run.step}/{steps}: flow {flow_:.4f}, place {place_:.4f}, cover {cover_:.4f}, {seconds:.0f} s")
            seen = []
        if watch is not None and run.step % watch_every == 0:
            watch(run)
    run.save()
    student.load_state_dict(run.averaged())
    return student
