"""Trains text encoder and DiT together by flow matching on a pool of latents, with some latent frames known.

Four losses stand beside the flow's and go with their heads at the end. Hidden states must tell where their token
stands (the architecture knows distances only, and "starts at the right" needs a place), which shapes and colours it
shows, and which cells of it a thing covers (what a caption says about motion, shape and colour is a small part of the
flow's loss and all of these). The text encoder's must tell at each word of a thing which shape, colour and place that
thing has: from the flow's loss alone they stay a bag of words, and no state says whose colour a colour is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tools.demo_model import denoiser, text
from tools.demo_model.captions import owners, training_caption
from tools.demo_model.pool import CELLS, KINDS, Shelf
from tools.demo_model.training import Run
from tools.demo_model.world import Scene

PLACE_TAPS, KIND_TAPS, COVER_TAPS = (1, 3), (2, 3), (3, 4)


class Student(nn.Module):
    """What is trained: text encoder, DiT, and the heads of the auxiliary losses."""

    def __init__(self, *, width: int, layers: int, ffn: int, text_width: int, channels: int) -> None:
        super().__init__()
        self.encoder = text.build(text_width)
        self.dit = denoiser.build(width=width, layers=layers, ffn=ffn, text=text_width, channels=channels)
        self.run_block = denoiser.run_block
        self.place = nn.ModuleList([nn.Linear(width, 3) for _ in PLACE_TAPS])
        self.cover = nn.ModuleList([nn.Linear(width, CELLS * CELLS) for _ in COVER_TAPS])
        self.kind = nn.ModuleList([nn.Linear(width, len(KINDS)) for _ in KIND_TAPS])
        self.word = nn.Linear(text_width, len(KINDS) + 2)

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


def draw_sigma(count: int, generator: torch.Generator, shift: float = 3.0) -> torch.Tensor:
    """Return sigmas [B]: half as sampling with `shift` visits them, half around the middle; few at the clean end."""
    even = torch.rand(count, generator=generator)
    shifted = shift * even / (1 + (shift - 1) * even)
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


@dataclass(frozen=True)
class Stage:
    """A part of the training: steps, tokens per step, learning rate, how much more the flow's error counts where things
    are, the weights of the losses of kinds and covers at the start (a quarter at the end), whether blocks are compiled,
    and the shift of the noise levels (`draw_sigma`)."""

    steps: int
    tokens: int = 2400
    rate: float = 3e-3
    things: float = 0.0
    kinds: float = 0.0
    covers: float = 0.6
    compiled: bool = False
    shift: float = 3.0


@dataclass
class Batch:
    """Latents x0 [B, C, T, H, W] float32, cover [B, T, h, w, 16] and kinds [B, T, h, w, 13] as a Shelf's, captions and
    the scenes that they tell of, known [B, T], padded texts' lengths."""

    latents: torch.Tensor
    cover: torch.Tensor
    kinds: torch.Tensor
    captions: list[str]
    scenes: list[Scene]
    known: torch.Tensor
    lengths: list[int]


def draw_batch(shelves: Sequence[Shelf], rng: np.random.Generator, tokens: int) -> Batch:
    """Return as many clips of one bucket as hold about `tokens` tokens."""
    shares = np.array([s.bucket.share for s in shelves])
    shelf = shelves[rng.choice(len(shelves), p=shares / shares.sum())]
    size = max(1, round(tokens / shelf.bucket.tokens))
    rows = rng.integers(len(shelf.scenes), size=size)
    latents, cover, kinds = (part[rows].float() for part in (shelf.latents, shelf.cover, shelf.kinds))
    if latents.shape[2] > 2 and rng.random() < 0.06:  # loops have no first frame
        latents, cover, kinds = latents[:, :, 1:], cover[:, 1:], kinds[:, 1:]
    scenes = [shelf.scenes[i] for i in rows]
    captions = ["" if rng.random() < 0.1 else training_caption(scene, rng) for scene in scenes]
    lengths = [int(n) for n in rng.choice((512, 226, 128, 64), size=size, p=(0.7, 0.1, 0.1, 0.1))]
    return Batch(latents, cover, kinds, captions, scenes, draw_known(size, latents.shape[2], rng), lengths)


@dataclass
class Losses:
    """Losses per sample [B]: the flow's error as it is, and with things counted more; of places, kinds, covers and
    words."""

    flow: torch.Tensor
    weighted: torch.Tensor
    places: torch.Tensor
    kinds: torch.Tensor
    covers: torch.Tensor
    words: torch.Tensor


def word_truth(captions: Sequence[str], scenes: Sequence[Scene], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the words of captions should tell [B, length, kinds + 2], and which of them tell it [B, length].

    That is the shape and the colour of the thing that a word tells of, and four times its offset in the scene.
    """
    truth, tells = torch.zeros(len(captions), length, len(KINDS) + 2), torch.zeros(len(captions), length)
    for row, (caption, scene) in enumerate(zip(captions, scenes, strict=True)):
        for at, things in enumerate(owners(caption, scene)):  # known words: a token each
            if things:
                tells[row, at] = 1
                truth[row, at, [KINDS.index(things[0].shape), KINDS.index(things[0].colour)]] = 1
                truth[row, at, -2:] = 4 * torch.tensor([t.offset for t in things]).mean(0)
    return truth, tells


def _near_things(cover: torch.Tensor) -> torch.Tensor:
    """Return [B, T, H, W] of a cover [B, T, H/2, W/2, 16]: what things cover of each latent cell or one beside."""
    cells = cover.unflatten(-1, (2, CELLS // 2, 2, CELLS // 2)).amax((5, 7))  # [B, T, h, w, 2, 2]
    cells = cells.transpose(3, 4).flatten(2, 3).flatten(3, 4)
    return F.max_pool2d(cells, 3, stride=1, padding=1)


def _of_words(student: Student, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the loss [B] of what the text encoder's states [B, S, D] tell of the things that their words tell of."""
    said = student.word(F.layer_norm(hidden.float(), hidden.shape[-1:]))
    truth, tells = (part.to(said.device) for part in word_truth(batch.captions, batch.scenes, said.shape[1]))
    wrong = F.binary_cross_entropy_with_logits(said[..., :-2], truth[..., :-2], reduction="none").sum(2)
    wrong = wrong + (said[..., -2:] - truth[..., -2:]).square().sum(2)
    return (wrong * tells).sum(1) / tells.sum(1).clamp_min(1)


def losses_of(
    student: Student, tokenizer: object, rotary: denoiser.Rotary, batch: Batch, sigma: torch.Tensor,
    noise: torch.Tensor, things: float = 0.0,
) -> Losses:  # fmt: skip
    """Return the losses of a batch at noise levels `sigma` [B]; known frames stay clean and do not count."""
    device = student.dit.device
    x0, noise, known = batch.latents.to(device), noise.to(device), batch.known.to(device)
    at = torch.where(known, 0.0, sigma.to(device)[:, None])  # [B, T]
    level = at[:, None, :, None, None]
    taps = sorted({*PLACE_TAPS, *KIND_TAPS, *COVER_TAPS})
    with torch.autocast(device.type, torch.bfloat16):
        hidden, bias = encode_text(student, tokenizer, batch.captions, batch.lengths)
        x = ((1 - level) * x0 + level * noise).bfloat16()
        velocity, kept = denoiser.forward(student.dit, x, at, hidden, bias, rotary, taps, student.run_block)
    unknown = (~known).float()
    error = (velocity.float() - (noise - x0)).square().mean(1)  # [B, T, H, W]
    weight = 1 + things * _near_things(batch.cover.to(device))
    weight = weight / weight.mean((1, 2, 3), keepdim=True)
    flow, weighted = ((e.mean((2, 3)) * unknown).sum(1) / unknown.sum(1) for e in (error, error * weight))
    states = {tap: F.layer_norm(h, h.shape[-1:]) for tap, h in zip(taps, kept, strict=True)}
    grid = batch.cover.shape[1:4]
    axes = torch.meshgrid(
        *(torch.linspace(-1, 1, n, device=device) if n > 1 else torch.zeros(1, device=device) for n in grid),
        indexing="ij",
    )
    place = torch.stack(axes, -1).flatten(1, 2)  # [T, hw, 3]

    def told(heads: nn.ModuleList, at: tuple[int, ...], truth: torch.Tensor) -> torch.Tensor:
        truth = truth.to(device).flatten(2, 3)
        found = [
            F.binary_cross_entropy_with_logits(head(states[tap]), truth, reduction="none").mean((1, 2))
            for head, tap in zip(heads, at, strict=True)
        ]
        return torch.stack(found).mean(0)  # [B, values of a token]

    places = [
        (head(states[tap]) - place).square().mean((1, 2, 3))
        for head, tap in zip(student.place, PLACE_TAPS, strict=True)
    ]
    kinds = told(student.kind, KIND_TAPS, batch.kinds).sum(1)
    covers = told(student.cover, COVER_TAPS, batch.cover).mean(1)
    return Losses(flow, weighted, torch.stack(places).mean(0), kinds, covers, _of_words(student, hidden, batch))


def train(
    folder: Path, student: Student, tokenizer: object, shelves: Sequence[Shelf], stage: Stage, *, seed: int = 0,
    say: Callable[[str], None] = print, watch: Callable[[Run], None] | None = None, watch_every: int = 500,
) -> Student:  # fmt: skip
    """Train a stage in `folder`; return the student with averaged weights."""
    torch.manual_seed(seed)
    steps = stage.steps
    run = Run(
        folder, student, student.optimizers(stage.rate), steps, warm=min(100, steps // 10 + 1), flat=0.35, decay=0.999
    )
    student.run_block = torch.compile(denoiser.run_block, dynamic=True) if stage.compiled else denoiser.run_block
    rotary = denoiser.Rotary(student.dit.config.attention_head_dim, student.dit.device)
    since, seen = time.monotonic(), []
    while run.step < steps:
        rng = np.random.default_rng((seed, 7, run.step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch = draw_batch(shelves, rng, stage.tokens)
        sigma = draw_sigma(len(batch.captions), generator, stage.shift)
        noise = torch.randn(batch.latents.shape, generator=generator)
        found = losses_of(student, tokenizer, rotary, batch, sigma, noise, stage.things)
        done = min(1.0, 1.5 * run.step / steps)  # what stands beside the flow is learned first
        loss = found.weighted + (0.3 - 0.27 * done) * found.places + 0.3 * found.words
        loss = loss + (1 - 0.75 * done) * (stage.kinds * found.kinds + stage.covers * found.covers)
        run.update(loss.mean())
        seen.append([getattr(found, f.name).detach().mean().item() for f in fields(found)])
        if run.step % 100 == 0 or run.step == steps:
            values = dict(zip((f.name for f in fields(found)), np.mean(seen, 0).tolist(), strict=True))
            seconds = time.monotonic() - since
            run.log(**values, seconds=seconds)
            told = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            say(f"{folder.name} {run.step}/{steps}: {told}, {seconds:.0f} s")
            seen = []
        if watch is not None and run.step % watch_every == 0:
            watch(run)
    run.save()
    student.load_state_dict(run.averaged())
    return student
