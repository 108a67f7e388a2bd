"""What the store keeps of a request, turned back into the request that the pipeline takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.clips import Clip, cut_clip
from runtime.request import Request
from runtime.storyboard import Card


def request_of(record: Mapping[str, Any], folder: Path) -> Request:
    """Return the request of a record, its clips being files in `folder`; LoRAs are the model's, see `loras_of`."""

    def clips(name: str) -> tuple[Clip, ...]:
        return tuple(clip_of(clip, folder) for clip in record.get(name, ()))

    cards = tuple(
        Card(card["from"], card["to"], card["prompt"], None if card["clip"] is None else clip_of(card["clip"], folder))
        for card in record.get("storyboard", ())
    )
    given = {"clips": () if cards else clips("clips"), "references": clips("references"), "storyboard": cards}
    return Request(**{name: value for name, value in {**record, **given}.items() if name != "lora"})


def loras_of(record: Mapping[str, Any]) -> list[str]:
    """Return NAME or NAME:STRENGTH of each LoRA that a record asks for."""
    return list(record.get("lora", ()))


def clip_of(kept: Mapping[str, Any], folder: Path) -> Clip:
    """Return the clip of {input, at, hold, and perhaps cut: (from, to) in frames, mask: a picture}."""
    frames = str(folder / kept["input"])
    clip = Clip(cut_clip(frames, *kept["cut"]) if "cut" in kept else frames, at=kept["at"], hold=kept["hold"])
    return replace(clip, mask=folder / kept["mask"]) if "mask" in kept else clip
