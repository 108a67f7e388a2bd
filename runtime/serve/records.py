"""What the store keeps of a request, turned back into the request that the pipeline takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.clips import Clip, cut_clip
from runtime.request import Request
from runtime.storyboard import Card


def request_of(record: Mapping[str, Any], folder: Path) -> Request:
    """Return the request of a record, its clips being files in `folder`."""
    cards = tuple(
        Card(card["from"], card["to"], card["prompt"], clip_of(card["clip"], folder) if card.get("clip") else None)
        for card in record.get("storyboard", ())
    )
    clips = () if cards else tuple(clip_of(clip, folder) for clip in record["clips"])
    return Request(**{**record, "clips": clips, "storyboard": cards})


def clip_of(kept: Mapping[str, Any], folder: Path) -> Clip:
    """Return the clip of {input, at, hold, and perhaps cut: (from, to) in frames}."""
    path = folder / kept["input"]
    return Clip(
        str(path) if kept.get("cut") is None else cut_clip(path, *kept["cut"]), at=kept["at"], hold=kept["hold"]
    )
