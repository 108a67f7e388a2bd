"""A storyboard: cards in time, each with a prompt and perhaps a picture or clip that it begins with.

Cards may not overlap. Where they leave a hole, the card before it goes on; a hole at the beginning belongs to the first
card. A card's picture or clip is known to what leads up to it, so the space before a card is the time to get there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from runtime.clips import Clip

KEYS = ("from", "to", "prompt", "image", "clip")


@dataclass(frozen=True)
class Card:
    """What happens from one second to another, and the frames that it begins with."""

    start: float
    end: float
    prompt: str
    clip: Clip | None = None

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
                raise ValueError(f"a card's {name} is {given!r}; legal: seconds")
        if not 0 <= self.start < self.end:
            raise ValueError(f"a card goes from {self.start:g} to {self.end:g} seconds; legal: onward, from 0 at least")
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"the card at {self.start:g} seconds has no prompt; legal: some text")

    def record(self) -> dict[str, Any]:
        """Return what a receipt says of it; `card_of` reads it again where its clip came from a file."""
        plain = {"from": self.start, "to": self.end, "prompt": self.prompt}
        if self.clip is None:
            return plain
        clip = self.clip.record()
        return plain | {"clip": clip if "mask" in clip else clip["frames"]}


def card_of(given: Any, folder: Path) -> Card:
    """Return the card of {"from", "to", "prompt", "image" or "clip"}; paths are relative to `folder`."""
    if isinstance(given, Card):
        return given
    if not isinstance(given, Mapping) or not {"from", "to", "prompt"} <= given.keys() or given.keys() - set(KEYS):
        raise ValueError(f"a card is {given!r}; legal: an object with from, to, prompt, and perhaps image or clip")
    if "image" in given and "clip" in given:
        raise ValueError(f"the card at {given['from']} seconds has an image and a clip; give one")
    found = given.get("image") or given.get("clip")
    if found is not None:
        found = Clip(**found) if isinstance(found, Mapping) else Clip(folder / found)
    return Card(given["from"], given["to"], given["prompt"], found)


def check_cards(cards: tuple[Card, ...]) -> tuple[Card, ...]:
    """Return the cards in the order of time; ValueError where two overlap."""
    ordered = tuple(sorted(cards, key=lambda card: card.start))
    for before, after in pairwise(ordered):
        if before.end > after.start:
            raise ValueError(
                f"the card from {before.start:g} to {before.end:g} seconds overlaps the one from {after.start:g} to "
                f"{after.end:g}; legal: one card at a time, so end the first at {after.start:g} or before"
            )
    return ordered


def read_storyboard(path: str | Path) -> tuple[Card, ...]:
    """Return the cards of a JSON file, a list of them or {"cards": [...]}; ValueError for anything else."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); legal: a list of cards") from error
    cards = given.get("cards") if isinstance(given, dict) else given
    if not isinstance(cards, list) or not cards:
        raise ValueError(f"{path} holds no cards; legal: a list of objects with from, to and prompt")
    return check_cards(tuple(card_of(card, Path(path).parent) for card in cards))
