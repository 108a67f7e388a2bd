"""What the words of a command line mean: sizes, ranges, levels; and a parser that says in one line what is wrong."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

MOST_RANGE = 1_000_000  # frames that one range may name


class Parser(argparse.ArgumentParser):
    """argparse's, without the whole usage before every mistake."""

    def error(self, message: str) -> NoReturn:
        """Print one line, and exit with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


def parse_whole(text: str) -> int:
    """Return a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def parse_number(text: str) -> float:
    """Return a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def parse_size(text: str) -> tuple[int, int]:
    """Return (width, height) of a text such as 832x480."""
    width, x, height = text.lower().partition("x")
    if not x or not width.isdecimal() or not height.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; legal: WIDTHxHEIGHT in pixels, such as 832x480")
    return int(width), int(height)


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Return the sizes of a text such as 832x480,1280x720."""
    return [parse_size(part) for part in text.split(",")]


def parse_quality(text: str) -> str | float:
    """Return a quality by its name, or a floor in dB as a number."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_levels(text: str) -> tuple[float, ...]:
    """Return the noise levels of a text such as 1,0.94,0.83."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers; legal: noise levels such as 1,0.94,0.83") from None


def parse_ranges(text: str) -> tuple[int, ...]:
    """Return the frames of a text such as 12-20,33."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 <= last - first < MOST_RANGE:
            raise argparse.ArgumentTypeError(f"{part!r} is no range of frames; legal: such as 12-20,33")
        found += range(first, last + 1)
    return tuple(found)
