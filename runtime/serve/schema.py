"""What the API says and means: fields of a body -> runtime.Request, a job -> the video object that clients read."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.clips import Clip
from runtime.expansion import Expansion
from runtime.models.spec import Defaults, ModelSpec
from runtime.request import Request
from runtime.serve.errors import ApiError, bad
from runtime.serve.forms import Upload, parse_json
from runtime.serve.pictures import inspect, stub
from runtime.tasks import plan_task

# The API's names -> runtime.Request's, and what each is.
NUMBERS: dict[str, tuple[str, type]] = {
    "guidance_scale": ("guidance", float),
    "guidance_scale_2": ("guidance_2", float),
    "flow_shift": ("shift", float),
    "num_inference_steps": ("steps", int),
    "seed": ("seed", int),
    "fps": ("fps", float),
    "num_frames": ("num_frames", int),
    "seconds": ("seconds", float),
    "strength": ("strength", float),
    "window": ("window", int),
    "overlap": ("overlap", int),
    "width": ("width", int),
    "height": ("height", int),
}
TEXTS = {"prompt": "prompt", "negative_prompt": "negative_prompt", "sampler": "sampler", "fit": "fit"}
ALIASES = {"infer_steps": "num_inference_steps", "target_fps": "fps", "target_video_length": "num_frames"}
OWN = ("model", "size", "loop", "draft", "quality", "expand_prompt", "priority", "direction", "user")
CLIPS = ("input_reference", "last_frame", "keyframes", "video", "videos")
MODEL_FIELDS = {"prompt", "model"}  # of a body that makes nothing
QUALITIES = {"draft": True, "low": True} | dict.fromkeys(("auto", "standard", "medium", "high", "hd"), False)
KEYFRAME = {"frame", "time", "image", "image_url", "strength"}
MAX_PROMPT = 20_000  # characters
MAX_STEPS = 1000
MAX_FRAMES = 10_000
FPS = (1.0, 240.0)
PRIORITIES = range(-10, 11)
EDIT_STRENGTH = 0.6


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a server offers: models by name with their workers' facts, and who writes prompts out."""

    models: Mapping[str, Any]
    expansion: Expansion


@dataclasses.dataclass(frozen=True)
class Asked:
    """A checked request: what the store keeps of it."""

    model: str
    request: Request
    record: dict[str, Any]  # runtime.Request's fields, clips as input files
    total_frames: int
    windows: int
    priority: int
    final_size: tuple[int, int] | None = None  # (width, height) in pixels of what this is the draft of


def spec_of(card: Mapping[str, Any]) -> ModelSpec:
    """Return a model's facts from what its worker told."""
    spec = dict(card["spec"])
    tuples = {name: tuple(spec[name]) for name in ("stride", "patch")}
    return ModelSpec(**{**spec, **tuples, "defaults": Defaults(**spec["defaults"])})


def parse_request(
    fields: Mapping[str, Any], offer: Offer, folder: Callable[[], Path], given: list[dict[str, Any]]
) -> Asked:
    """Return the request that fields mean; ApiError for what is illegal.

    Uploads are decoded in a child, and lie in `folder()`; `given` are clips that come before those in the fields.
    """
    fields = {ALIASES.get(name, name): value for name, value in fields.items() if value is not None}
    legal = {*NUMBERS, *TEXTS, *OWN, *CLIPS}
    if unknown := sorted(fields.keys() - legal):
        raise bad(
            f"{unknown[0][:80]} is not known; legal: {', '.join(sorted(legal))}", unknown[0][:80], "unknown_field"
        )
    name = choose_model(fields, offer.models)
    values = read_values(fields)
    clips = [*given, *read_clips(fields, folder, values.get("fps"), offer.models[name])]
    if flag(fields, "expand_prompt"):
        values["expand"] = dataclasses.replace(offer.expansion, optional=True)
    stubs = tuple(Clip(stub(clip), at=clip["at"], hold=clip["hold"]) for clip in clips)
    spec = spec_of(offer.models[name])
    try:
        request = Request(**values, clips=stubs).resolved(spec)
        final = None
        if is_draft(fields):
            assert request.width and request.height
            final, request = (request.width, request.height), request.drafted(spec)
        assert request.fps
        plan = plan_task(request, spec, [clip.count(request.fps) for clip in stubs])
    except ValueError as error:
        message, field = named(str(error))
        raise bad(message, "size" if field in ("width", "height") and "size" in fields else field) from error
    if plan.num_frames > MAX_FRAMES:
        raise bad(f"the video would have {plan.num_frames} frames; legal: up to {MAX_FRAMES}", "seconds")
    record = {f.name: getattr(request, f.name) for f in dataclasses.fields(Request)}
    record["clips"] = [kept(clip) for clip in clips]
    priority = number(fields, "priority", int) if "priority" in fields else 0
    if priority not in PRIORITIES:
        raise bad(f"priority is {priority}; legal: {PRIORITIES[0]} to {PRIORITIES[-1]}", "priority")
    record["expand"] = None if request.expand is None else dataclasses.asdict(request.expand)
    record = {name: value for name, value in record.items() if value != ()}
    return Asked(name, request, record, plan.num_frames, len(plan.windows), priority, final)


def choose_model(fields: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """Return the model that fields name, or the first; ApiError for one that is not served."""
    name = fields.get("model") or next(iter(models))
    if not isinstance(name, str) or name not in models:
        legal = f"there is no model {str(name)[:80]!r}; legal: {', '.join(models)}"
        raise ApiError(404, legal, code="model_not_found", param="model")
    return name


def is_draft(fields: Mapping[str, Any]) -> bool:
    """Tell whether a draft is asked for, by `draft` or by `quality`."""
    quality = fields.get("quality", "draft" if flag(fields, "draft") else "auto")
    if quality not in QUALITIES:
        raise bad(f"quality is {str(quality)[:40]!r}; legal: {', '.join(QUALITIES)}", "quality")
    return QUALITIES[quality]


def read_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return runtime.Request's values of the fields that are no clips; ApiError for what no model could take."""
    values: dict[str, Any] = {ours: text(fields, theirs) for theirs, ours in TEXTS.items() if theirs in fields}
    values |= {ours: number(fields, theirs, kind) for theirs, (ours, kind) in NUMBERS.items() if theirs in fields}
    values |= size(fields)
    if (values.get("steps") or 0) > MAX_STEPS:
        raise bad(f"num_inference_steps is {values['steps']}; legal: 1 to {MAX_STEPS}", "num_inference_steps")
    if not FPS[0] <= values.get("fps", FPS[0]) <= FPS[1]:
        raise bad(f"fps is {values['fps']:g}; legal: {FPS[0]:g} to {FPS[1]:g}", "fps")
    for limited, most in (("num_frames", MAX_FRAMES), ("seconds", MAX_FRAMES / FPS[0])):
        if (values.get(limited) or 0) > most:
            raise bad(f"{limited} is {values[limited]:g}; legal: up to {most:g}", limited)
    if flag(fields, "loop"):
        values["periodic"] = True
    if "direction" in fields:
        values["direction"] = text(fields, "direction")
    values.setdefault("prompt", "")
    return values


def named(message: str) -> tuple[str, str | None]:
    """Return a message of runtime.Request with the API's name of the field that it speaks of."""
    theirs = {ours: name for name, (ours, _) in NUMBERS.items()} | {"prompt": "prompt", "the size": "size"}
    for ours, name in sorted(theirs.items(), key=lambda pair: -len(pair[0])):
        if message.startswith((f"{ours} is", f"the {ours} is")):
            return message.replace(ours, name, 1), name
    return message, None


def text(fields: Mapping[str, Any], name: str) -> str:
    """Return a field that is text, without characters that no text has."""
    value = fields[name]
    if not isinstance(value, str):
        raise bad(f"{name} is a {type(value).__name__}; legal: text", name)
    if len(value) > MAX_PROMPT:
        raise bad(f"{name} has {len(value)} characters; legal: up to {MAX_PROMPT}", name)
    return value.encode("utf-8", "replace").decode().replace("\0", "")


def number(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a field that is a number, in JSON or as text."""
    value = fields[name]
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 40:
            raise ValueError
        found = float(value)
        if not math.isfinite(found) or (kind is int and found != int(found)):
            raise ValueError
        return int(value) if kind is int and not isinstance(value, float) else kind(found)
    except ValueError:
        wanted = "a whole number" if kind is int else "a finite number"
        raise bad(f"{name} is {str(value)[:80]!r}; legal: {wanted}", name) from None


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """Return a field that is true or false, in JSON or as text."""
    value = fields.get(name, False)
    words = {"true": True, "1": True, "false": False, "0": False}
    found = value if isinstance(value, bool) else words.get(str(value).lower())
    if found is None:
        raise bad(f"{name} is {str(value)[:80]!r}; legal: true, false", name)
    return found


def size(fields: Mapping[str, Any]) -> dict[str, int]:
    """Return width and height of the field `size`, such as 832x480."""
    if "size" not in fields or fields["size"] == "auto":
        return {}
    if "width" in fields or "height" in fields:
        raise bad("size is given, and width or height as well; give one of them", "size")
    width, x, height = str(fields["size"]).lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and len(width + height) < 12):
        raise bad(f"size is {str(fields['size'])[:80]!r}; legal: WIDTHxHEIGHT in pixels, such as 832x480", "size")
    return {"width": int(width), "height": int(height)}


def read_clips(
    fields: Mapping[str, Any], folder: Callable[[], Path], fps: float | None, card: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the clips in the fields: {file, width, height, num_frames, fps, at, hold}."""
    found = []
    if "input_reference" in fields:
        found.append(read_clip(fields["input_reference"], "input_reference", folder))
    frames = structured(fields.get("keyframes", []), "keyframes")
    if not isinstance(frames, list):
        raise bad("keyframes is no list", "keyframes")
    for each in frames:
        if not isinstance(each, dict) or each.keys() - KEYFRAME:
            raise bad("a keyframe has other keys than frame or time, image or image_url, and strength", "keyframes")
        clip = read_clip(each.get("image", each.get("image_url")), "keyframes", folder)
        rate = fps or card["spec"]["defaults"]["fps"]
        at = round(number(each, "time", float) * rate) if "time" in each else number({"frame": 0} | each, "frame", int)
        found.append(clip | {"at": at, "hold": number(each, "strength", float) if "strength" in each else 1.0})
    if "last_frame" in fields:
        found.append(read_clip(fields["last_frame"], "last_frame", folder) | {"at": "end"})
    return found


def cut_of(clip: dict[str, Any], part: Any, name: str) -> dict[str, Any]:
    """Return the part of a clip from the frame `from` up to before the frame `to`."""
    if not isinstance(part, dict) or not part or part.keys() - {"from", "to"}:
        raise bad(f"{name} is {str(part)[:80]}; legal: an object with from, to, in frames", name)
    count = clip["num_frames"]
    start, stop = number({"from": 0} | part, "from", int), number({"to": count} | part, "to", int)
    if not 0 <= start < stop <= count:
        raise bad(f"{name} is frames {start} to {stop}; legal: onward, within the {count} of the video", name)
    return clip | {"cut": (start, stop), "num_frames": stop - start}


def kept(clip: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the store keeps of a clip."""
    cut = {"cut": clip["cut"]} if "cut" in clip else {}
    return {"input": clip["file"], "at": clip["at"], "hold": clip["hold"], **cut}


def structured(value: Any, name: str) -> Any:
    """Return a field that is a list or an object, as it is or as a JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode())
    except ApiError as error:
        raise bad(f"{name}: {error.message}", name) from error


def read_clip(value: Any, name: str, folder: Callable[[], Path]) -> dict[str, Any]:
    """Return an uploaded or enclosed picture or clip, looked at; nothing is fetched from an address here."""
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
        found = inspect(value.path)
    except ValueError as error:
        raise bad(f"{name}: {error}", name, "invalid_upload") from error
    return found | {"at": 0, "hold": 1.0}


def sync(folder: Path) -> None:
    """Make the files in a folder, and the folder itself, durable."""
    for path in (*folder.iterdir(), folder, folder.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
