"""Pictures and clips of a body: {file, width, height, num_frames, fps, at, hold}, and perhaps `cut` and `mask`."""

from __future__ import annotations

import base64
import binascii
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.clips import Clip
from runtime.serve.errors import bad
from runtime.serve.fields import number, structured, text
from runtime.serve.forms import Upload
from runtime.serve.pictures import inspect, stub
from runtime.storyboard import Card

CLIPS = ("input_reference", "last_frame", "keyframes", "storyboard", "characters")
KEYFRAME = {"frame", "time", "image", "image_url", "strength"}
CARD = {"from": "start", "to": "end"}  # a card's times, and what else they may be called
CARD_FRAMES = ("image", "image_url", "clip")

Found = dict[str, Any]
Read = Callable[[Any, str], Found]  # (what stands for a picture or clip, the field's name) -> it, in the job's folder


def read_clips(fields: Mapping[str, Any], read: Read, rate: float) -> list[Found]:
    """Return the clips that stand in certain places; `rate` in frames per second is for those given by time."""
    found = []
    if "input_reference" in fields:
        found.append(read(fields["input_reference"], "input_reference"))
    frames = structured(fields.get("keyframes", []), "keyframes")
    if not isinstance(frames, list):
        raise bad("keyframes is no list", "keyframes")
    for each in frames:
        if not isinstance(each, dict) or each.keys() - KEYFRAME:
            raise bad("a keyframe has other keys than frame or time, image or image_url, and strength", "keyframes")
        if each.keys().isdisjoint(("image", "image_url")):
            raise bad("a keyframe has no image; legal: image or image_url, and frame or time", "keyframes")
        clip = read(each.get("image", each.get("image_url")), "keyframes")
        at = round(number(each, "time", float) * rate) if "time" in each else number({"frame": 0} | each, "frame", int)
        found.append(clip | {"at": at, "hold": number(each, "strength", float) if "strength" in each else 1.0})
    if "last_frame" in fields:
        found.append(read(fields["last_frame"], "last_frame") | {"at": "end"})
    return found


def read_cards(fields: Mapping[str, Any], read: Read) -> list[dict[str, Any]]:
    """Return the cards of a storyboard, {from, to, prompt, clip or None} each, times in seconds."""
    cards = structured(fields.get("storyboard", []), "storyboard")
    if not isinstance(cards, list):
        raise bad("storyboard is no list", "storyboard")
    found = []
    for given in cards:
        legal = {*CARD, *CARD.values(), *CARD_FRAMES, "prompt"}
        if not isinstance(given, dict) or given.keys() - legal or "prompt" not in given:
            raise bad("a card has other keys than from, to, prompt, and perhaps image or clip", "storyboard")
        card = {name: given.get(name, given.get(other)) for name, other in CARD.items()}
        times = {name: number(card, name, float) for name in CARD}
        frames = [given[name] for name in CARD_FRAMES if name in given]
        if len(frames) > 1:
            raise bad("a card has an image and a clip; give one", "storyboard")
        clip = read(frames[0], "storyboard") if frames else None
        found.append({**times, "prompt": text(given, "prompt"), "clip": clip})
    return found


def read_characters(fields: Mapping[str, Any], read: Read) -> list[Found]:
    """Return the pictures of the characters that a video shows."""
    characters = structured(fields.get("characters", []), "characters")
    if not isinstance(characters, list):
        raise bad("characters is no list", "characters")
    return [read({"id": each} if isinstance(each, str) else each, "characters") for each in characters]


def clip_stub(found: Mapping[str, Any]) -> Clip:
    """Return a clip with its facts and no frames, for checks in a process that decodes nothing."""
    mask = np.ones((1, 1), bool) if "mask" in found else None
    return Clip(stub(found), at=found["at"], hold=found["hold"], mask=mask)


def card_stub(card: Mapping[str, Any]) -> Card:
    """Return a card with its clip's facts and no frames."""
    return Card(card["from"], card["to"], card["prompt"], None if card["clip"] is None else clip_stub(card["clip"]))


def kept(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the store keeps of a clip."""
    return {"input": found["file"], **{name: value for name, value in found.items() if name != "file"}}


def found_again(kept: Mapping[str, Any]) -> Found:
    """Return the clip of which the store keeps this."""
    return {"file": kept["input"], **{name: value for name, value in kept.items() if name != "input"}}


def cut_of(clip: Found, part: Any, name: str) -> Found:
    """Return the part of a clip from the frame `from` up to before the frame `to`."""
    if not isinstance(part, dict) or not part or part.keys() - {"from", "to"}:
        raise bad(f"{name} is {str(part)[:80]}; legal: an object with from, to, in frames", name)
    count = clip["num_frames"]
    start, stop = number({"from": 0} | part, "from", int), number({"to": count} | part, "to", int)
    if not 0 <= start < stop <= count:
        raise bad(f"{name} is frames {start} to {stop}; legal: onward, within the {count} of the video", name)
    return clip | {"cut": (start, stop), "num_frames": stop - start}


def read_upload(value: Any, name: str, folder: Callable[[], Path], *, mask: bool = False) -> Found:
    """Return an uploaded or enclosed picture or clip, looked at in a child; ApiError for what is none.

    A `mask` becomes white where it was transparent: there the picture is made anew.
    """
    if isinstance(value, dict) and isinstance(value.get("image_url"), str | Upload):
        value = value["image_url"]
    if isinstance(value, str):
        head, comma, data = value.partition(",")
        if not head.startswith("data:") or not comma or not head.endswith(";base64"):
            raise bad(f"{name} is text that is no data: URL; addresses are not fetched, send the file itself", name)
        try:
            content = base64.b64decode(data, validate=True)
        except binascii.Error:
            raise bad(f"{name} is no base64", name) from None
        value = Upload(folder() / f"upload-{secrets.token_hex(4)}")
        value.path.write_bytes(content)
    if not isinstance(value, Upload):
        raise bad(f"{name} is no file; legal: a file of the form, or a data: URL", name)
    try:
        found = inspect(value.path, mask=mask)
    except ValueError as error:
        raise bad(f"{name}: {error}", name, "invalid_upload") from error
    return found | {"at": 0, "hold": 1.0}


def linked(source: Path, name: str, folder: Path) -> str:
    """Return the name of a file that stays in a folder when its source is deleted."""
    if not (folder / name).exists():
        os.link(source, folder / name)
    return name
