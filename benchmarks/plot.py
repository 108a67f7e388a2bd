"""Pictures of measurements as SVG, written by hand: bars stacked by stage with a floor, and lines over a rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLOURS = ("#1e88e5", "#fb8c00", "#43a047", "#8e24aa", "#00acc1", "#757575")
WIDTH, HEIGHT, LEFT, TOP, FOOT = 960, 480, 70, 60, 110


@dataclass(frozen=True)
class Bar:
    """One bar: seconds by part from below, and the floor that it stands over (None: none)."""

    label: str
    parts: Mapping[str, float]
    floor: float | None = None


def stacked(title: str, bars: Sequence[Bar]) -> str:
    """Return bars as an SVG, their floors as black lines."""
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    top = max([sum(bar.parts.values()) for bar in bars] + [bar.floor or 0.0 for bar in bars], default=0.0) or 1.0
    step = (WIDTH - LEFT - 20) / max(len(bars), 1)
    parts = [*frame(title, top, "s"), *legend(names)]
    for index, bar in enumerate(bars):
        x, base = LEFT + step * index + 0.15 * step, 0.0
        for name, seconds in bar.parts.items():
            y, height = place(base + seconds, top), place(base, top) - place(base + seconds, top)
            colour = COLOURS[names.index(name) % len(COLOURS)]
            tip = f"<title>{escape(f'{bar.label}, {name}: {seconds:.4g} s')}</title>"
            box = f'x="{x:.1f}" y="{y:.1f}" width="{0.7 * step:.1f}" height="{height:.1f}"'
            parts.append(f'<rect {box} fill="{colour}">{tip}</rect>')
            base += seconds
        if bar.floor is not None:
            parts.append(
                line([(x - 0.1 * step, place(bar.floor, top)), (x + 0.8 * step, place(bar.floor, top))], "#000")
            )
        middle = x + 0.35 * step
        turned = f'transform="rotate(-35 {middle:.1f} {HEIGHT - FOOT + 14})" text-anchor="end"'
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - FOOT + 14}" {turned}>{escape(bar.label)}</text>')
    return document(parts)


def lines(title: str, unit: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return curves of seconds over a rate as an SVG; `unit` is the rate's."""
    points = [point for curve in curves.values() for point in curve]
    right = max((x for x, _ in points), default=1.0) or 1.0
    top = max((y for _, y in points), default=1.0) or 1.0
    parts = [*frame(title, top, "s"), *legend(list(curves))]
    for number in range(5):
        x = LEFT + (WIDTH - LEFT - 20) * number / 4
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - FOOT + 18}" text-anchor="middle">{right * number / 4:.3g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - FOOT + 40}" text-anchor="middle">{escape(unit)}</text>')
    for index, curve in enumerate(curves.values()):
        path = [(LEFT + (WIDTH - LEFT - 20) * x / right, place(y, top)) for x, y in sorted(curve)]
        colour = COLOURS[index % len(COLOURS)]
        parts.append(line(path, colour))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in path]
    return document(parts)


def frame(title: str, top: float, unit: str) -> list[str]:
    """Return the title and the grid up to `top`."""
    parts = [f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>']
    for number in range(5):
        y = place(top * number / 4, top)
        parts.append(line([(LEFT, y), (WIDTH - 20, y)], "#ccc"))
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * number / 4:.3g} {unit}</text>')
    return parts


def legend(names: Sequence[str]) -> list[str]:
    """Return a coloured word per name."""
    parts, x = [], float(LEFT)
    for index, name in enumerate(names):
        parts.append(f'<text x="{x:.0f}" y="42" fill="{COLOURS[index % len(COLOURS)]}">&#9632; {escape(name)}</text>')
        x += 9 * len(name) + 30
    return parts


def place(value: float, top: float) -> float:
    """Return the height of a value on the picture."""
    return HEIGHT - FOOT - (HEIGHT - FOOT - TOP) * value / top


def line(points: Sequence[tuple[float, float]], colour: str) -> str:
    """Return a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'


def document(parts: Sequence[str]) -> str:
    """Return the whole SVG."""
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *parts, "</svg>\n"])


def save(file: Path, picture: str) -> Path:
    """Write a picture."""
    file.write_text(picture, encoding="utf-8")
    return file
