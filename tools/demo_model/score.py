"""What a video of the demo world shows, read from its pixels by fixed rules: no learned judge, nothing to tune away.

The background is the empty scene that differs least; what differs from it is a thing; its colour is the nearest of the
palette, its shape the strongest symmetry of its outline, its motion the way of its middle. Renders and autoencoder
reconstructions are read first: they are the ceiling of what a model can reach.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from tools.demo_model.shapes import CORNERS, parted, shape_of
from tools.demo_model.world import (
    CAMERAS,
    COLOURS,
    GROUNDS,
    HORIZON,
    SKIES,
    WEATHERS,
    Scene,
    fog,
    light_over_frame,
    render,
    view,
)  # fmt: skip

THING = 0.012  # least share of the frame that counts as a thing
DIFFERENT = 0.17  # least distance of a pixel from the empty scene
EDGE = 4  # pixels that a blurred edge reaches outwards
DIRECTIONS = ("left", "right", "rise", "fall", "approach")


@dataclass(frozen=True)
class Reading:
    """What was read: words of the world, and the track [F, 3] (u, v, area in shares of the frame; NaN: nothing)."""

    ground: str
    time: str
    weather: str
    camera: str
    count: int
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    motion: str
    track: np.ndarray


@lru_cache(maxsize=8)
def _templates(count: int, height: int, width: int) -> tuple[list[Scene], torch.Tensor]:
    """Return every empty scene and three frames of each [n, 3, 3, h, w], small."""
    scenes = [
        Scene((), "still", ground, time, weather, camera)
        for ground in GROUNDS for time in SKIES for weather in WEATHERS
        for camera in CAMERAS[: 5 if count > 1 else 1]
    ]  # fmt: skip
    frames = []
    for scene in scenes:
        clip = render(scene, 3 if count > 1 else 1, height // 2, width // 2)
        frames.append(clip.frames)
    return scenes, torch.stack(frames)


def empty_scene(frames: torch.Tensor) -> Scene:
    """Return the empty scene that is nearest to frames [F, 3, H, W] in [0, 1]."""
    count, _, height, width = frames.shape
    scenes, templates = _templates(count, height, width)
    some = frames[[0, count // 2, count - 1]] if count > 1 else frames
    some = F.avg_pool2d(some, 2)
    distance = (templates - some).abs().amax(2).clamp(max=0.25).mean((1, 2, 3))
    return scenes[int(distance.argmin())]


def _clear(frames: torch.Tensor, scene: Scene) -> torch.Tensor:
    """Undo what light over the frame, fog and rain do to colours; the reverse of the last lines of `world.render`."""
    height, width = frames.shape[-2:]
    y = ((torch.arange(height) + 0.5) / height)[:, None]
    x = ((torch.arange(width) + 0.5) / width)[None, :]
    frames = frames / light_over_frame(x, y)
    if scene.weather == "fog":
        thick, tone = fog(scene, y)
        return ((frames - tone * thick) / (1 - thick)).clamp(0, 1)
    if scene.weather == "rain":
        frames = frames / 0.86
        return ((frames - 0.35 * frames.mean(1, keepdim=True)) / 0.65).clamp(0, 1)
    return frames


def _nearest_colour(pixels: torch.Tensor, time: str) -> torch.Tensor:
    """Return the index of the palette's nearest colour, at any shading, of each of [n, 3]."""
    light = 0.45 + 0.55 * torch.tensor(SKIES[time][2])
    shades = torch.tensor([0.55, 0.7, 0.85, 1.0, 1.15])
    palette = torch.tensor(list(COLOURS.values())) * light  # [colours, 3]
    lit = (palette[:, None] * shades[:, None]).clamp(max=1)  # [colours, shades, 3]
    return torch.cdist(pixels, lit.flatten(0, 1)).unflatten(1, lit.shape[:2]).amin(2).argmin(1)


def _cover(pixels: torch.Tensor, empty: torch.Tensor, part: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return what share of each pixel [H, W] a thing covers, from how far its colour is from the empty scene's towards
    the thing's; 0 on other things. pixels and empty are [3, H, W]."""
    away = (pixels - empty).abs().amax(0)
    colour = pixels[:, part].median(1).values[:, None, None]
    way = colour - empty
    share = ((pixels - empty) * way).sum(0) / way.square().sum(0).clamp_min(1e-3)
    share = torch.maximum(share, away / away[part].median())
    near = F.max_pool2d(part[None].float(), 2 * EDGE + 1, stride=1, padding=EDGE)[0] > 0
    return share.clamp(0, 1) * (near & ~others)


def _settle_motion(track: np.ndarray, turns: list[tuple[int, float]]) -> str:
    seen = track[~np.isnan(track[:, 0])]
    if len(seen) < 3:
        return "still"
    third = max(len(seen) // 4, 1)
    first, last = seen[:third].mean(0), seen[-third:].mean(0)
    du, dv, growth = last[0] - first[0], last[1] - first[1], last[2] / max(first[2], 1e-6)
    range_u, range_v = np.ptp(seen[:, 0]), np.ptp(seen[:, 1])
    closed = math.hypot(*(seen[-1, :2] - seen[0, :2])) < 0.12
    if closed and range_v > 0.16 and range_u > 0.09:
        return "orbit"
    if abs(du) > 0.18 and abs(du) > 0.8 * abs(dv):
        return "left" if du < 0 else "right"
    if abs(dv) > 0.18:
        return "rise" if dv < 0 else "fall"
    if growth > 1.7:
        return "approach"
    if range_v > 0.16:
        return "orbit" if range_u > 0.09 else "bounce"
    steps = [abs(math.remainder(b - a, 2 * math.pi / n)) for (n, a), (m, b) in itertools.pairwise(turns) if n == m]
    if len(steps) > 2 and np.median(steps) > 0.12:
        return "spin"
    return "still"


def read(frames: np.ndarray) -> Reading:
    """Return what frames [F, H, W, 3] uint8 show."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    count, _, height, width = pixels.shape
    scene = empty_scene(pixels)
    empty = render(scene, count, height, width).frames
    pixels, empty = _clear(pixels, scene), _clear(empty, scene)
    different = (pixels - empty).abs().amax(1) > DIFFERENT
    shift, zoom = view(scene, count).T
    names = list(COLOURS)
    counts: list[int] = []
    shapes: Counter[str] = Counter()
    hues: Counter[str] = Counter()
    track = np.full((count, 3), np.nan)
    turns: list[tuple[int, float]] = []
    for f in range(count):
        parts = parted(different[f], int(THING * height * width * min(zoom[f], 1.0) ** 2))
        parts = [p for p in parts if p.sum() > 0.25 * parts[0].sum()]
        counts.append(len(parts))
        if not parts:
            continue
        ys, xs = torch.nonzero(torch.stack(parts).any(0)).T.numpy()
        u = ((xs.mean() + 0.5) / width - 0.5) / zoom[f] + 0.5 + shift[f]
        v = ((ys.mean() + 0.5) / height - HORIZON) / zoom[f] + HORIZON
        track[f] = u, v, len(xs) / (height * width * zoom[f] ** 2)
        for part in parts:
            others = torch.stack([p for p in parts if p is not part] or [torch.zeros_like(part)]).any(0)
            cover = _cover(pixels[f], empty[f], part, others)
            core = part & (cover > 0.8)
            nearest = _nearest_colour(pixels[f, :, core if core.any() else part].T, scene.time)
            hues[names[int(nearest.bincount(minlength=len(names)).argmax())]] += 1
            if (found := shape_of(cover)) is not None:
                shapes[found[0]] += 1
                if part is parts[0] and found[0] in CORNERS:
                    turns.append((CORNERS[found[0]], found[1]))
    present = [c for c in counts if c] or [1]
    number = int(np.median(present))
    # What half of one thing's frames show: of several things' frames so much less.
    often = lambda found: tuple(sorted(k for k, v in found.items() if v >= 0.5 / number * sum(found.values())))  # noqa: E731
    camera, motion = scene.camera, _settle_motion(track, turns)
    if camera == "pan right" and motion == "right":  # the thing stays in the middle while the world passes
        screen = track[~np.isnan(track[:, 0]), 0] - shift[~np.isnan(track[:, 0])]
        if np.ptp(screen) < 0.1:
            camera, motion = "orbit", "still"
    return Reading(
        scene.ground,
        scene.time,
        scene.weather,
        camera,
        number if any(counts) else 0,
        often(hues),
        often(shapes),
        motion,
        track,
    )


def whole(frames: np.ndarray) -> bool:
    """Return whether the middle frame of [F, H, W, 3] uint8 shows a thing, and none that the frame's edge cuts."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    count, _, height, width = pixels.shape
    empty = render(empty_scene(pixels), count, height, width).frames
    different = (pixels - empty).abs().amax(1)[count // 2] > DIFFERENT
    parts = parted(different, int(THING * height * width))
    return bool(parts) and not any(p[0].any() or p[-1].any() or p[:, 0].any() or p[:, -1].any() for p in parts)


def judge(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Return which attributes of the scene that was asked for the reading shows; only those that the scene settles."""
    colours = tuple(sorted({t.colour for t in scene.things}))
    shapes = tuple(sorted({t.shape for t in scene.things}))
    out = {
        "colour": reading.colours == colours,
        "shape": reading.shapes == shapes,
        "count": reading.count == len(scene.things),
        "background": reading.ground == scene.ground,
        "time": reading.time == scene.time,
        "weather": reading.weather == scene.weather,
        "camera": reading.camera == scene.camera,
    }
    if len(reading.track) > 1 and scene.camera == "still":
        out["motion"] = reading.motion == scene.motion
        if scene.motion in DIRECTIONS:
            out["direction"] = reading.motion == scene.motion
    return out


def table(judged: list[dict[str, bool]]) -> dict[str, tuple[int, int]]:
    """Return per attribute how many were right, of how many."""
    keys = [
        k
        for k in ("colour", "background", "direction", "motion", "shape", "count", "time", "weather", "camera")
        if any(k in j for j in judged)
    ]
    return {k: (sum(j[k] for j in judged if k in j), sum(k in j for j in judged)) for k in keys}
