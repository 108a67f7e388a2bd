"""The procedural world of the demo model: scenes drawn at random, rendered with exact annotations of all that moves.

A scene is a ground and a sky with landmarks that stand still on the screen or in the world (horizon, sun, hill, light
that falls from the left), one to three objects with one motion, a camera, and what the weather adds. Everything is a
function of the scene alone: the same scene gives the same frames at any size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

COLOURS = {  # sRGB in [0, 1]
    "red": (0.86, 0.10, 0.10),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.12, 0.25, 0.88),
    "yellow": (0.97, 0.86, 0.12),
    "orange": (0.97, 0.50, 0.05),
    "purple": (0.56, 0.14, 0.72),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.07),
}
SHAPES = {  # (corners, inner radius / outer radius, hole radius / outer radius)
    "ball": (64, math.cos(math.pi / 64), 0.0),
    "cube": (4, math.cos(math.pi / 4), 0.0),
    "pyramid": (3, math.cos(math.pi / 3), 0.0),
    "star": (5, 0.45, 0.0),
    "ring": (64, math.cos(math.pi / 64), 0.5),
}
MATERIALS = ("matte", "shiny")
SIZES = {"small": 0.17, "medium": 0.22, "large": 0.28}  # radius / short side of the frame
GROUNDS = {  # colour near the horizon, colour at the bottom
    "grass": ((0.55, 0.70, 0.40), (0.33, 0.50, 0.22)),
    "sand": ((0.90, 0.82, 0.60), (0.74, 0.62, 0.40)),
    "snow": ((0.93, 0.95, 0.99), (0.76, 0.81, 0.90)),
    "water": ((0.52, 0.70, 0.78), (0.18, 0.40, 0.52)),
    "road": ((0.58, 0.58, 0.60), (0.36, 0.36, 0.39)),
}
SKIES = {  # time of day: top, at the horizon, light on the world, sun or moon (u, v), its colour
    "day": ((0.42, 0.64, 0.92), (0.80, 0.90, 0.98), (1.00, 1.00, 1.00), (0.20, 0.16), (1.00, 0.98, 0.85)),
    "sunset": ((0.42, 0.30, 0.50), (0.98, 0.66, 0.42), (1.00, 0.80, 0.66), (0.20, 0.44), (1.00, 0.86, 0.50)),
    "night": ((0.04, 0.05, 0.14), (0.14, 0.16, 0.30), (0.36, 0.40, 0.58), (0.20, 0.16), (0.85, 0.88, 0.95)),
}
WEATHERS = ("clear", "fog", "rain", "snowfall")
MOTIONS = ("left", "right", "rise", "fall", "bounce", "orbit", "spin", "approach", "still")
CAMERAS = ("still", "pan left", "pan right", "zoom in", "zoom out", "orbit")
HORIZON = 0.55  # share of the frame's height
PAN = 0.35  # share of the frame's width that a pan covers in a clip
ZOOM = 1.5

# Colours that a ground hides are never put on it: neither shown nor asked for.
HIDDEN = {("white", "snow"), ("green", "grass"), ("yellow", "sand"), ("blue", "water"), ("black", "road")}


@dataclass(frozen=True)
class Thing:
    """One object: a key of SHAPES, COLOURS and SIZES, a material, and where it is against the motion's path.

    `offset` (u, v) is added to the path, in shares of the frame.
    """

    shape: str
    colour: str
    size: str
    material: str
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A scene: all that is drawn, in words; `phase` and `start` vary the path, `speed` 1 crosses it in one clip."""

    things: tuple[Thing, ...]
    motion: str
    ground: str
    time: str
    weather: str
    camera: str
    post: bool = False  # a grey post in the foreground, behind which things pass
    start: float = 0.0  # share of the path done at the first frame
    speed: float = 1.0
    phase: float = 0.0  # radians: of waves, orbits, falling flakes

    def as_json(self) -> dict[str, Any]:
        """Return the scene as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Clip:
    """Frames and what is true of them: `frames` [F, 3, H, W] in [0, 1], `masks` [n, F, H, W] visible share of each
    thing, `tracks` [n, F, 3] (x, y, radius) in pixels, present where hidden too."""

    frames: torch.Tensor
    masks: torch.Tensor
    tracks: torch.Tensor


def draw_scene(rng: np.random.Generator, hard: bool = False) -> Scene:
    """Return a random scene: mostly one thing, clear weather and a camera that stands still.

    With `hard` what is learned last is drawn more often: several things that differ, few balls, moving cameras.
    """
    ground = str(rng.choice(list(GROUNDS)))
    time = str(rng.choice(list(SKIES), p=(0.6, 0.25, 0.15)))
    legal = [c for c in COLOURS if (c, ground) not in HIDDEN and not (c == "black" and time == "night")]
    count = int(rng.choice((1, 2, 3), p=(0.35, 0.38, 0.27) if hard else (0.68, 0.2, 0.12)))
    motion = str(rng.choice(MOTIONS, p=(0.2, 0.2, 0.12, 0.12, 0.1, 0.06, 0.05, 0.07, 0.08)))
    camera = "still"
    if motion in ("still", "spin", "bounce") and rng.random() < (0.7 if hard else 0.45):
        camera = str(rng.choice(CAMERAS[1:]))
    same = count > 1 and rng.random() < (0.25 if hard else 0.6)
    shapes = [s for s in SHAPES if not (motion == "spin" and s in ("ball", "ring"))]
    if hard:
        shapes = [s for s in shapes for _ in range(1 if s == "ball" else 2)]
    first = Thing(str(rng.choice(shapes)), str(rng.choice(legal)), str(rng.choice(list(SIZES))), _material(rng))
    things = []
    for place in _places(count, motion):
        thing = (
            first
            if same or not things
            else Thing(str(rng.choice(shapes)), _other(rng, legal, things), first.size, _material(rng))
        )
        size = thing.size if count == 1 else "small"  # several share the frame
        things.append(Thing(thing.shape, thing.colour, size, thing.material, place))
    off = rng.random() < 0.2 and motion in ("left", "right", "rise", "fall")
    return Scene(
        things=tuple(things),
        motion=motion,
        ground=ground,
        time=time,
        weather=str(rng.choice(WEATHERS, p=(0.84, 0.06, 0.05, 0.05))),
        camera=camera,
        post=bool(count == 1 and motion in ("left", "right") and rng.random() < 0.08),
        start=float(rng.uniform(-0.2, 0.8)) if off else 0.0,
        speed=1.0,
        phase=float(rng.uniform(0, 2 * math.pi)),
    )


def _material(rng: np.random.Generator) -> str:
    return str(rng.choice(MATERIALS, p=(0.7, 0.3)))


def _other(rng: np.random.Generator, legal: list[str], things: list[Thing]) -> str:
    taken = {t.colour for t in things}
    return str(rng.choice([c for c in legal if c not in taken]))


def _places(count: int, motion: str) -> list[tuple[float, float]]:
    if count == 1:
        return [(0.0, 0.0)]
    if motion in ("left", "right"):  # one above the other
        return {2: [(0.0, 0.06), (0.0, -0.34)], 3: [(0.0, 0.16), (-0.04, -0.16), (0.0, -0.48)]}[count]
    return {2: [(-0.21, 0.0), (0.21, 0.0)], 3: [(-0.31, 0.0), (0.0, 0.0), (0.31, 0.0)]}[count]


def path(scene: Scene, thing: Thing, count: int, aspect: float) -> np.ndarray:
    """Return [F, 4] of one thing: u and v (shares of width and height), scale of its radius, turn in radians.

    The word alone settles the path; `aspect` is width / height of the frame.
    """
    s = scene.start + scene.speed * np.linspace(0.0, 1.0, max(count, 2))[:count]
    u, v, scale, turn = np.full(count, 0.5), np.full(count, 0.62), np.ones(count), np.zeros(count)
    many = len(scene.things) > 1
    match scene.motion:
        case "left":
            u = 0.84 - 0.68 * s
        case "right":
            u = 0.16 + 0.68 * s
        case "rise":
            v = 0.82 - 0.62 * s
        case "fall":
            v = 0.18 + 0.62 * s
        case "bounce":
            v = 0.76 - 0.46 * np.abs(np.sin(2 * math.pi * s + 0.15))
        case "orbit":
            radius = 0.12 if many else 0.2
            u = 0.5 + radius * np.cos(2 * math.pi * s - math.pi / 2) / max(aspect, 1.0)
            v = 0.5 + radius * np.sin(2 * math.pi * s - math.pi / 2) * min(aspect, 1.0)
        case "spin":
            turn = 2 * math.pi * s
        case "approach":
            scale = 0.6 + (0.8 if many else 1.1) * s
    return np.stack([u + thing.offset[0], v + thing.offset[1], scale, turn], 1)


def view(scene: Scene, count: int) -> np.ndarray:
    """Return [F, 2]: the camera's shift in u, and its zoom."""
    s = np.linspace(0.0, 1.0, max(count, 2))[:count]
    shift, zoom = np.zeros(count), np.ones(count)
    match scene.camera:
        case "pan left":
            shift = -PAN * s
        case "pan right":
            shift = PAN * s
        case "zoom in":
            zoom = 1 + (ZOOM - 1) * s
        case "zoom out":
            zoom = ZOOM - (ZOOM - 1) * s
        case "orbit":  # the far side passes by while the things stay in the middle
            shift = PAN * s
    return np.stack([shift, zoom], 1)


def render(scene: Scene, count: int, height: int, width: int, device: str | torch.device = "cpu") -> Clip:
    """Draw `count` frames of `height` x `width` pixels of a scene."""
    short = min(height, width)
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5)[None, :, None]
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5)[None, None, :]
    shift, zoom = (torch.from_numpy(c).float().to(device)[:, None, None] for c in view(scene, count).T)
    time = torch.linspace(0.0, 1.0, max(count, 2), device=device)[:count, None, None]
    still = scene.camera == "still"
    u = (x / width - 0.5) / (zoom[:1] if still else zoom) + 0.5 + (shift[:1] if still else shift)
    v = (y / height - HORIZON) / (zoom[:1] if still else zoom) + HORIZON
    frames = _background(scene, u, v, time, width / height)  # [1 or F, 3, H, W]
    frames = frames.expand(count, 3, height, width).clone()
    masks, tracks = [], []
    hold = scene.camera in ("orbit",)
    for thing in scene.things:
        way = torch.from_numpy(path(scene, thing, count, width / height)).float().to(device)
        cx = ((way[:, 0] - 0.5 - (0 if hold else 1) * shift[:, 0, 0]) * zoom[:, 0, 0] + 0.5) * width
        cy = ((way[:, 1] - HORIZON) * zoom[:, 0, 0] + HORIZON) * height
        radius = SIZES[thing.size] * short * way[:, 2] * zoom[:, 0, 0]
        turn = way[:, 3] + (2 * math.pi / 3 * time[:, 0, 0] if hold else 0.0)
        _shadow(frames, scene, x, y, cx, radius, zoom[:, 0, 0], height)
        mask = _paint(frames, scene, thing, x, y, cx, cy, radius, turn)
        masks = [m * (1 - mask) for m in masks] + [mask]
        tracks.append(torch.stack([cx, cy, radius], 1))
    if scene.post:
        post = _edge((x - 0.5 * width).abs() - 0.05 * short) * _edge(y - 0.95 * height) * torch.ones_like(y)
        tone = (0.45 - 0.15 * (x - 0.5 * width) / (0.05 * short)) * _light(scene).mean()
        frames = torch.lerp(frames, tone.clamp(0, 1).expand_as(frames), post[:, None])
        masks = [m * (1 - post) for m in masks]
    frames = _weather(scene, frames, x, y, time, short)
    frames = (frames * light_over_frame(x / width, y / height)[:, None]).clamp(0, 1)
    return Clip(
        frames,
        torch.stack(masks) if masks else frames.new_zeros(0, count, height, width),
        torch.stack(tracks) if tracks else frames.new_zeros(0, count, 3),
    )


def light_over_frame(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return how bright each place (shares of width and height) is: light falls from the left, corners are darker."""
    return (1.10 - 0.26 * u) * (1.0 - 0.22 * (((u - 0.5) ** 2 + (v - 0.5) ** 2) / 0.5))


def fog(scene: Scene, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much fog covers each height (a share of the frame's), and its tone."""
    return 0.62 * torch.exp(-(((v - HORIZON) / 0.30) ** 2)) + 0.08, 0.80 * (0.35 + 0.65 * _light(scene).mean())


def _edge(distance: torch.Tensor) -> torch.Tensor:
    """Return the covered share of a pixel at a signed distance from an edge, inside negative."""
    return (0.5 - distance / 2).clamp(0, 1)


def _light(scene: Scene) -> torch.Tensor:
    return torch.tensor(SKIES[scene.time][2])


def _background(scene: Scene, u: torch.Tensor, v: torch.Tensor, time: torch.Tensor, aspect: float) -> torch.Tensor:
    top, low, light, (sun_u, sun_v), sun = SKIES[scene.time]
    colour = lambda c: torch.tensor(c, device=u.device)[None, :, None, None]  # noqa: E731
    u, v = torch.broadcast_tensors(u, v)
    u, v = u[:, None], v[:, None]
    sky = torch.lerp(colour(top), colour(low), (v / HORIZON).clamp(0, 1) ** 1.5)
    away = torch.sqrt(((u - sun_u) * max(aspect, 1.0)) ** 2 + ((v - sun_v) / min(aspect, 1.0)) ** 2)
    glow = 0.5 * torch.exp(-((away / 0.16) ** 2)) + ((0.075 - away) / 0.03 + 0.5).clamp(0, 1)
    sky = torch.lerp(sky, colour(sun), glow.clamp(0, 1))
    hill = HORIZON - 0.20 * torch.exp(-(((u - 0.80) / 0.15) ** 2)) - 0.07 * torch.exp(-(((u - 0.45) / 0.10) ** 2))
    hill = hill - 0.12 * torch.exp(-(((u - 1.25) / 0.08) ** 2)) - 0.16 * torch.exp(-(((u + 0.28) / 0.12) ** 2))
    hills = torch.lerp(colour(low), colour((0.34, 0.42, 0.46)), 0.72) * (colour(light) * 0.5 + 0.5)
    out = torch.lerp(sky, hills, ((v - hill) / 0.025 + 0.5).clamp(0, 1))
    near, far = GROUNDS[scene.ground]
    depth = ((v - HORIZON) / (1 - HORIZON)).clamp(0, 1)
    ground = torch.lerp(colour(near), colour(far), depth)
    scaled = 0.4 / (depth + 0.25)  # perspective: stripes widen towards the viewer
    match scene.ground:
        case "grass":
            ground = ground * (1 + 0.03 * torch.sin(40 * scaled) * depth)
        case "sand":
            ground = ground * (1 + 0.03 * torch.sin(14 * scaled + 5 * (u - 0.5) / (depth + 0.3)))
        case "water":
            moving = 2 * math.pi * time[:, None]
            ground = ground + 0.035 * torch.sin(20 * scaled + moving + scene.phase) * (1 - 0.5 * depth)
        case "road":
            across = (u - 0.5).abs() / (0.06 + 0.94 * depth) * 2
            line = torch.exp(-(((across - 0.85) / 0.05) ** 2)) + torch.exp(-((across / 0.035) ** 2))
            ground = torch.lerp(ground, colour((0.92, 0.90, 0.80)), 0.7 * line.clamp(0, 1))
    ground = ground * colour(light)
    return torch.lerp(out, ground, ((v - HORIZON) / 0.025 + 0.5).clamp(0, 1))


def _shadow(frames, scene, x, y, cx, radius, zoom, height) -> None:  # type: ignore[no-untyped-def]
    ground = ((0.62 + 0.24 - HORIZON) * zoom + HORIZON) * height
    near = ((x - cx[:, None, None]) / (1.0 * radius[:, None, None])) ** 2
    near = near + ((y - ground[:, None, None]) / (0.28 * radius[:, None, None])) ** 2
    frames *= 1 - (0.22 if scene.time != "night" else 0.12) * torch.exp(-near)[:, None]


def silhouette(
    shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor, turn: torch.Tensor,
    form: tuple[int, float, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return what share of pixels (dx, dy) away from its middle a shape covers, how far its outline is there, both in
    pixels, and the direction in which the nearest side of it looks, in radians; `form` is another than SHAPES'."""
    corners, inner, hole = form or SHAPES[shape]
    size = _size(shape, radius)
    rho = torch.sqrt(dx * dx + dy * dy)
    angle = torch.atan2(dx, -dy) - turn + (math.pi / 4 if shape == "cube" else 0.0)
    half = math.pi / corners
    sector = torch.floor((angle + half) / (2 * half))
    within = (angle - sector * 2 * half).abs()
    edge = size * inner * math.sin(half) / (inner * torch.sin(half - within) + torch.sin(within))
    mask = _edge((rho - edge) * (0.8 if corners < 64 else 1.0))
    if hole:
        mask = mask * (1 - _edge(rho - hole * size))
    return mask, edge, sector * 2 * half + turn - (math.pi / 4 if shape == "cube" else 0.0)


def _size(shape: str, radius: torch.Tensor) -> torch.Tensor:
    """Return how far a shape's corners are from its middle: shapes of one size look equally large."""
    return radius * (1.15 if shape == "cube" else 1.25 if shape in ("pyramid", "star") else 1.0)


def _paint(frames, scene, thing, x, y, cx, cy, radius, turn) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Blend one thing into `frames` in place and return its mask [F, H, W]."""
    dx, dy = x - cx[:, None, None], y - cy[:, None, None]
    mask, edge, facet = silhouette(thing.shape, dx, dy, radius[:, None, None], turn[:, None, None])
    size = _size(thing.shape, radius[:, None, None])
    hole = SHAPES[thing.shape][2]
    rho = torch.sqrt(dx * dx + dy * dy)
    out = rho / edge.clamp_min(1e-3)
    match thing.shape:  # light comes from the upper left
        case "ball":
            lit = 0.72 + 0.42 * torch.sqrt((1 - (rho / size) ** 2).clamp(0, 1)) - 0.22 * (dx + dy) / size
        case "ring":
            lit = 1.05 - 0.5 * ((rho / size - 0.75) / 0.25) ** 2 * 0.6 - 0.12 * (dx + dy) / size
        case "cube":
            bevel = ((out - 0.66) / 0.06).clamp(0, 1)
            lit = 1.0 + bevel * 0.3 * (-torch.sin(facet) + torch.cos(facet)) / 1.414
        case "pyramid":
            lit = 0.98 + 0.26 * (-torch.sin(facet) + torch.cos(facet)) / 1.414
        case _:
            lit = 1.0 - 0.12 * (dx + dy) / size
    if thing.material == "shiny":
        spot = ((dx + 0.35 * size) ** 2 + (dy + 0.35 * size) ** 2) / (0.22 * size) ** 2
        shine = torch.exp(-spot) * (0.75 if not hole else 0.0)
    else:
        shine = torch.zeros_like(rho)
    light = 0.45 + 0.55 * _light(scene).to(frames.device)[None, :, None, None]
    colour = torch.tensor(COLOURS[thing.colour], device=frames.device)[None, :, None, None]
    paint = torch.lerp((colour * lit[:, None]).clamp(0, 1), torch.ones_like(colour), shine[:, None]) * light
    frames.lerp_(paint.expand_as(frames), mask[:, None].expand_as(frames))
    return mask


def _weather(scene: Scene, frames, x, y, time, short):  # type: ignore[no-untyped-def]
    height = y.shape[1]
    match scene.weather:
        case "fog":
            thick, tone = fog(scene, y / height)
            return frames + (tone - frames) * thick[:, None]
        case "rain":
            grey = frames.mean(1, keepdim=True)
            wave = torch.sin((x + 0.35 * y) * (2 * math.pi / (0.13 * short)) + scene.phase)
            fall = torch.sin(2 * math.pi * (y / (0.5 * short) - 4 * time + 0.25 * x / short))
            streak = (wave.clamp_min(0) ** 4 * fall.clamp_min(0) ** 2)[:, None]
            return torch.lerp(frames, grey, 0.35) * 0.86 + 0.12 * streak
        case "snowfall":
            cell = 0.25 * short
            drift = y - time * 2 * cell
            fx = torch.remainder(x + 0.5 * cell * torch.floor(drift / cell), cell) - 0.5 * cell
            fy = torch.remainder(drift, cell) - 0.5 * cell
            flake = torch.exp(-(fx * fx + fy * fy) / (0.028 * short) ** 2)
            return torch.lerp(frames, torch.full_like(frames, 0.97), 0.75 * flake[:, None])
    return frames
