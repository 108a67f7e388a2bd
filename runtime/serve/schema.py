"""What the API means: fields of a body -> runtime.Request."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.expansion import Expansion
from runtime.models.spec import Defaults, ModelSpec
from runtime.request import Request
from runtime.serve.errors import ApiError, bad
from runtime.serve.fields import flag, number, size, text
from runtime.serve.inputs import CLIPS, Found, Read, card_stub, clip_stub, kept, read_cards, read_characters, read_clips
from runtime.serve.loras import lora_by_name, read_loras
from runtime.tasks import plan_task
from runtime.video import check_encodable

# The API's names -> runtime.Request's, and what each is.
NUMBERS: dict[str, tuple[str, type]] = {
    "guidance_scale": ("guidance", float),
    "guidance_scale_2": ("guidance_2", float),
    "boundary_ratio": ("boundary", float),
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
TEXTS = {name: name for name in ("prompt", "negative_prompt", "sampler", "fit", "recipe")}
ALIASES = {
    "infer_steps": "num_inference_steps", "target_fps": "fps", "target_video_length": "num_frames",
    "reference_url": "input_reference", "image_reference": "input_reference", "true_cfg_scale": "guidance_scale",
}  # fmt: skip
OWN = ("model", "size", "loop", "draft", "quality", "expand_prompt", "priority", "direction", "user", "lora")
MODEL_FIELDS = {"prompt", "model"}  # of a body that makes nothing
QUALITIES = {"draft": True, "low": True} | dict.fromkeys(("auto", "standard", "medium", "high", "hd"), False)
FAST = "fast"
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
class Given:
    """What looks at a field that stands for a picture or clip, and those that come before the ones in the fields."""

    read: Read
    clips: Sequence[Found] = ()
    references: Sequence[Found] = ()


@dataclasses.dataclass(frozen=True)
class Asked:
    """A checked request: what the store keeps of it."""

    model: str
    request: Request
    record: dict[str, Any]  # runtime.Request's fields, clips as input files; `lora`: NAME or NAME:STRENGTH of each
    total_frames: int
    windows: int
    priority: int
    final_size: tuple[int, int] | None = None  # (width, height) in pixels of what this is the draft of

    @property
    def prompt(self) -> str:
        """What it shows, in words; of a storyboard, line by line."""
        return "\n".join(card.prompt for card in self.request.storyboard) or self.request.prompt


def again(asked: Asked, seed: int | None = None) -> Asked:
    """Return a request once more, with another seed: one that is given, or a random one."""
    seed = secrets.randbelow(2**31) if seed is None else seed % 2**64
    return dataclasses.replace(
        asked, request=dataclasses.replace(asked.request, seed=seed), record=asked.record | {"seed": seed}
    )


def check_frame(asked: Asked) -> None:
    """ApiError for a size that the file of a video cannot hold, which a picture may have."""
    try:
        check_encodable(".mp4", asked.request.height, asked.request.width)
    except ValueError as error:
        raise bad(str(error), "size") from error


def spec_of(card: Mapping[str, Any]) -> ModelSpec:
    """Return a model's facts from what its worker told."""
    spec = dict(card["spec"])
    tuples = {name: tuple(spec[name]) for name in ("stride", "patch")}
    return ModelSpec(**{**spec, **tuples, "defaults": Defaults(**spec["defaults"])})


def parse_request(fields: Mapping[str, Any], offer: Offer, given: Given) -> Asked:
    """Return the request that fields mean; ApiError for what is illegal."""
    fields = named_once(fields)
    legal = {*NUMBERS, *TEXTS, *OWN, *CLIPS}
    if unknown := sorted(fields.keys() - legal):
        raise bad(
            f"{unknown[0][:80]} is not known; legal: {', '.join(sorted(legal))}", unknown[0][:80], "unknown_field"
        )
    name = choose_model(fields, offer.models)
    spec = spec_of(offer.models[name])
    values = read_values(fields)
    clips = [*given.clips, *read_clips(fields, given.read, values.get("fps") or spec.defaults.fps)]
    references = [*given.references, *read_characters(fields, given.read)]
    cards = read_cards(fields, given.read)
    for task, path in (("direction", "/v1/videos/extensions"), ("strength", "/v1/videos/edits")):
        if task in fields and not clips:
            raise bad(f"{task} is given, and no video that it is for; legal: with video, at {path}", task)
    if cards and clips:
        raise bad("a storyboard's cards bring their own pictures; give no others beside it", "storyboard")
    if flag(fields, "expand_prompt"):
        values["expand"] = dataclasses.replace(offer.expansion, optional=True)
    try:
        values |= {"clips": tuple(map(clip_stub, clips)), "references": tuple(map(clip_stub, references))}
        values |= {"storyboard": tuple(map(card_stub, cards))}
    except ValueError as error:
        raise bad(str(error), "storyboard" if cards else "keyframes") from error
    request, frames, windows, final = planned(values, spec, fields)
    if frames > MAX_FRAMES:
        raise bad(f"the video would have {frames} frames; legal: up to {MAX_FRAMES}", "seconds")
    priority = number(fields, "priority", int) if "priority" in fields else 0
    if priority not in PRIORITIES:
        raise bad(f"priority is {priority}; legal: {PRIORITIES[0]} to {PRIORITIES[-1]}", "priority")
    record = {f.name: getattr(request, f.name) for f in dataclasses.fields(Request)}
    record |= {
        "clips": list(map(kept, clips)),
        "references": list(map(kept, references)),
        "storyboard": [card | {"clip": card["clip"] and kept(card["clip"])} for card in cards],
        "expand": None if request.expand is None else dataclasses.asdict(request.expand),
        "lora": read_loras(fields["lora"], offer.models[name].get("loras", ())) if "lora" in fields else [],
    }
    return Asked(name, request, record, frames, windows, priority, final)


def named_once(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say something by their own names; ApiError for one that is given under two."""
    found: dict[str, Any] = {}
    for given, value in fields.items():
        if value is not None:
            name = ALIASES.get(given, given)
            if name in found:
                raise bad(f"{name} is given twice, as {given} as well", name)
            found[name] = value
    lora_by_name(found)
    return found


def planned(
    values: Mapping[str, Any], spec: ModelSpec, fields: Mapping[str, Any]
) -> tuple[Request, int, int, tuple[int, int] | None]:
    """Return (the resolved request, its frames, its windows, the final size where it is a draft)."""
    try:
        request, final = Request(**values).resolved(spec), None
        if read_quality(fields)[0]:
            assert request.width and request.height
            final, request = (request.width, request.height), request.drafted(spec)
        assert request.fps
        plan = plan_task(request, spec)
    except ValueError as error:
        message, field = named(str(error))
        field = field or ("storyboard" if values["storyboard"] else None)
        raise bad(message, "size" if field in ("width", "height") and "size" in fields else field) from error
    return request, plan.num_frames, len(plan.windows), final


def choose_model(fields: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """Return the model that fields name, or the first; ApiError for one that is not served."""
    name = fields.get("model") or next(iter(models))
    if not isinstance(name, str) or name not in models:
        legal = f"there is no model {str(name)[:80]!r}; legal: {', '.join(models)}"
        raise ApiError(404, legal, code="model_not_found", param="model")
    return name


def read_quality(fields: Mapping[str, Any]) -> tuple[bool, str | float]:
    """Return (is a draft asked for, by `draft` or by `quality`; what may be given up for speed, as runtime.Request has
    it): words of OpenAI's clients mean the exact video, or its draft."""
    given = fields.get("quality", "draft" if flag(fields, "draft") else "auto")
    if isinstance(given, str) and given in QUALITIES:
        return QUALITIES[given], "exact"
    if given == FAST:
        return False, FAST
    try:
        floor = number(fields, "quality", float)
    except ApiError:
        floor = 0.0
    if floor <= 0:
        legal = f"{', '.join(QUALITIES)}, {FAST}, or a floor in dB against the exact video, such as 32"
        raise bad(f"quality is {str(given)[:40]!r}; legal: {legal}", "quality")
    return False, floor


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
    values["quality"] = read_quality(fields)[1]
    values.setdefault("prompt", "")
    return values


def named(message: str) -> tuple[str, str | None]:
    """Return a message of runtime.Request with the API's name of the field that it speaks of."""
    theirs = {ours: name for name, (ours, _) in NUMBERS.items()} | {name: name for name in (*TEXTS, "direction")}
    theirs |= {"the size": "size"}
    for ours, name in sorted(theirs.items(), key=lambda pair: -len(pair[0])):
        if message.startswith((f"{ours} is", f"the {ours} is")):
            return message.replace(ours, name, 1), name
    return message, None
