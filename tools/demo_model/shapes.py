"""Reads shapes by their silhouettes: things that touch are parted, and each is what its outline overlaps best.

Fixed rules, nothing learned: every shape of the world is laid over a thing at every turn, at sizes about its area,
sharp and blurred, its middle on the thing's; the overlap is counted in shares of pixels, so that a blurred edge tells
as much as a sharp one. What is blurred too much to tell is a ball.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from tools.demo_model.world import SHAPES, silhouette

UNLIKE = 0.7  # least overlap (intersection / union) of something that is a shape at all
TURNS = {"ball": 1, "cube": 8, "pyramid": 12, "star": 8, "ring": 1}  # turns tried within one symmetry
CORNERS = {"pyramid": 3, "cube": 4, "star": 5}
FORMS = {name: [form] for name, form in SHAPES.items()}  # what a shape may look like (SHAPES)
FORMS["star"].append((5, 0.6, 0.0))  # stouter arms
FORMS["ring"].append((*SHAPES["ring"][:2], 0.3))  # a hole half closed
REACHES = (0.94, 1.0, 1.06)  # sizes tried, against that of the same area
BLURS = (
    0.0,
    0.12,
    0.24,
    0.36,
    0.48,
)  # standard deviations tried, against the radius of a disc of the thing's area; the last two for balls
DEEP = 0.45  # how deep inside a part, against its greatest depth, things that touch no longer do
GRID = 40  # a thing is looked at in so many samples each way
SPAN = 1.6  # half the window's side against the radius of a disc of the thing's area; the last two for balls


def parted(mask: torch.Tensor, least: int) -> list[torch.Tensor]:
    """Return the things of one frame's mask [H, W] with at least so many pixels, largest first.

    Connected parts, and those of a part whose necks are narrow: what is deep inside it and hangs together there is one
    thing, and gets all that is nearest to it.
    """
    height, width = mask.shape
    coarse = F.max_pool2d(mask[None].float(), 2, ceil_mode=True)[0]  # labels spread in half as many steps
    labels = _labels(coarse > 0).repeat_interleave(2, 0).repeat_interleave(2, 1)[:height, :width] * mask
    numbers, sizes = labels[labels > 0].unique(return_counts=True)
    found = [p for n in numbers[sizes >= least] for p in _necks_cut(labels == n)]
    return sorted((p for p in found if int(p.sum()) >= least), key=lambda p: -int(p.sum()))


def _labels(mask: torch.Tensor) -> torch.Tensor:
    """Return for a mask [H, W] a number per connected part, 0 outside."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(1, *mask.shape) * mask
    while True:
        grown = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(grown, labels):
            return labels[0]
        labels = grown


def _necks_cut(part: torch.Tensor) -> list[torch.Tensor]:
    """Return the things that one connected part [H, W] consists of."""
    ys, xs = torch.nonzero(part, as_tuple=True)
    box = (slice(int(ys.min()), int(ys.max()) + 1), slice(int(xs.min()), int(xs.max()) + 1))
    left = (part[box] | _holes(part[box])).float()[None]
    depth, kernels = left.clone(), itertools.cycle((((3, 1), (1, 3)), ((3, 3),)))
    while left.any():  # a cross and a square in turn take off nearly equally much all around
        left = torch.stack([_worn(left, kernel) for kernel in next(kernels)]).amin(0)
        depth += left
    seeds = _labels(depth[0] >= DEEP * depth.max())
    numbers = seeds[seeds > 0].unique()
    if len(numbers) == 1:
        return [part]
    at = torch.nonzero(seeds)
    nearest = torch.cdist(torch.nonzero(part[box]).float(), at.float()).argmin(1)
    owners = seeds[at[:, 0], at[:, 1]][nearest]
    pieces = []
    for number in numbers:
        piece = torch.zeros_like(part)
        piece[ys[owners == number], xs[owners == number]] = True
        pieces.append(piece)
    return pieces


def _worn(mask: torch.Tensor, kernel: tuple[int, int]) -> torch.Tensor:
    """Return a mask [1, H, W] without the pixels that have others than its own within a kernel of 3 or 1 each way."""
    padded = F.pad(mask, (kernel[1] // 2, kernel[1] // 2, kernel[0] // 2, kernel[0] // 2))
    return -F.max_pool2d(-padded, kernel, stride=1)


def _holes(part: torch.Tensor) -> torch.Tensor:
    """Return what a part encloses."""
    outside = _labels(~F.pad(part, (1, 1, 1, 1)))
    return ((outside > 0) & (outside != outside[0, 0]))[1:-1, 1:-1]


@lru_cache(maxsize=1)
def _candidates() -> tuple[list[tuple[str, float]], torch.Tensor]:
    """Return every (shape, turn) at every size and blur, and their silhouettes [n, GRID, GRID]."""
    at = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
    scale = GRID / 2 / SPAN  # samples per radius of a disc of the same area
    dy, dx = (a * GRID / 2 for a in torch.meshgrid(at, at, indexing="ij"))
    names, drawn = [], []
    for shape, form, step in ((s, f, t) for s in SHAPES for f in FORMS[s] for t in range(TURNS[s])):
        turn = 2 * math.pi / CORNERS.get(shape, 1) * step / TURNS[shape]
        unit = silhouette(shape, dx, dy, torch.tensor(scale), torch.tensor(turn), form)[0].sum()
        for reach in REACHES:
            radius = scale * reach * torch.sqrt(math.pi * scale**2 / unit)
            names.append((shape, turn))
            drawn.append(silhouette(shape, dx, dy, radius, torch.tensor(turn), form)[0])
    sharp = torch.stack(drawn)
    found = [(names, _blurred(sharp, blur * scale)) for blur in BLURS[:3]]
    balls = [i for i, (shape, _) in enumerate(names) if shape == "ball"]
    found += [([names[i] for i in balls], _blurred(sharp[balls], blur * scale)) for blur in BLURS[3:]]
    return [name for some, _ in found for name in some], torch.cat([silhouettes for _, silhouettes in found])


def _blurred(drawn: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return [n, H, W] blurred by `sigma` pixels."""
    if sigma == 0:
        return drawn
    reach = math.ceil(3 * sigma)
    bell = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    bell = bell / bell.sum()
    across = F.conv2d(drawn[:, None], bell.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(across, bell.view(1, 1, -1, 1), padding=(reach, 0))[:, 0]


def shape_of(cover: torch.Tensor) -> tuple[str, float] | None:
    """Return the shape and turn (radians) of one thing that covers shares [H, W] of the pixels; None where it is like
    none, or the frame's edge cuts it."""
    inside = cover > 0.5
    if not inside.any() or inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any():
        return None
    height, width = cover.shape
    area = float(cover.sum())
    y, x = (cover.sum(d) @ (torch.arange(n) + 0.5) / area for d, n in ((1, height), (0, width)))
    half = SPAN * math.sqrt(area / math.pi)  # of the window, in pixels
    names, drawn = _candidates()
    theta = torch.tensor([[half * 2 / width, 0, 2 * x / width - 1], [0, half * 2 / height, 2 * y / height - 1]])
    grid = F.affine_grid(theta[None], [1, 1, GRID, GRID], align_corners=False)
    seen = F.grid_sample(cover[None, None], grid, align_corners=False)[0]  # [1, GRID, GRID]
    overlap = torch.minimum(seen, drawn).sum((1, 2)) / torch.maximum(seen, drawn).sum((1, 2))
    best = int(overlap.argmax())
    return names[best] if overlap[best] >= UNLIKE else None
