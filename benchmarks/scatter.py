"""A picture of speed against fidelity as SVG: one dot per setting."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 60, 20, 20, 50
COLOURS = {"TeaCache": "#c0392b", "EasyCache": "#d68910", "steps": "#7f8c8d", "": "#1f6fb2"}


def scatter(dots: Sequence[tuple[str, float, float]]) -> str:
    """Return an SVG of (name, times faster than exact, dB that 95 % of the videos keep)."""
    fastest = max([2.0, *(x for _, x, _ in dots)]) * 1.08
    low, high = min(y for *_, y in dots) - 2, max(y for *_, y in dots) + 2

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - 1) / (fastest - 1) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in (1 + 0.5 * i for i in range(int((fastest - 1) / 0.5) + 1)):
        x, _ = place(tick, low)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}x</text>')
    for tick in range(int(low // 4 + 1) * 4, int(high) + 1, 4):
        _, y = place(1, tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">times faster than exact</text>')
    parts.append(
        f'<text x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})" text-anchor="middle">dB that 95 % of '
        "the videos keep</text>"
    )
    for name, faster, decibel in dots:
        x, y = place(faster, decibel)
        colour = next(colour for word, colour in COLOURS.items() if word in name)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        anchor, beside = ("end", x - 8) if x > WIDTH * 0.7 else ("start", x + 8)
        parts.append(
            f'<text x="{beside:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
