"""The clips that a body gives, by the verb that it is for: each returns a function (fields, own) -> (clips, parent).

It takes what it reads out of the fields, and gives them the verb's own settings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request

from runtime.serve.api import Api
from runtime.serve.errors import ApiError, bad
from runtime.serve.fields import structured
from runtime.serve.inputs import cut_of, found_again, linked
from runtime.serve.schema import EDIT_STRENGTH

Given = Callable[[dict[str, Any], Callable[[], Path]], tuple[list[dict[str, Any]], str | None]]

# What the final video of a draft takes over: the API's name of each, and where it stands in the draft's record.
TAKEN_OVER = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "fps": "fps", "flow_shift": "shift",
    "guidance_scale": "guidance", "guidance_scale_2": "guidance_2", "boundary_ratio": "boundary",
    "sampler": "sampler", "lora": "lora", "recipe": "recipe",
}  # fmt: skip


def from_video(api: Api, request: Request, **settings: Any) -> Given:
    """One clip in `video`, of which `clip` may name a part."""

    def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
        if "video" not in fields:
            raise bad("video is missing; legal: a file, or the id of a video", "video")
        clip, parent = api.clip(request, fields.pop("video"), "video", own)
        if "clip" in fields:
            clip = cut_of(clip, structured(fields.pop("clip"), "clip"), "clip")
        for name, value in settings.items():
            fields.setdefault(name, value)
        return [clip], parent

    return given


def from_prompt(api: Api, request: Request) -> Given:
    """No clip, but for a loop of one, and two to be connected."""

    def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
        if "videos" in fields or "end_video" in fields:
            return from_two(api, request)(fields, own)
        if not str(fields.get("prompt", "")).strip() and not fields.get("storyboard"):
            raise bad("prompt is missing; say what the video shows", "prompt")
        if "video" not in fields:
            return [], None
        if str(fields.get("loop", "")).lower() not in ("true", "1"):
            raise bad("video is for /v1/videos/edits, /v1/videos/extensions, or loop", "video")
        return from_video(api, request)(fields, own)

    return given


def from_two(api: Api, request: Request) -> Given:
    """Two clips in `videos`, or in `video` and `end_video`, to be connected."""

    def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
        if "end_video" in fields:
            if "videos" in fields or "video" not in fields:
                raise bad("end_video is given; legal: with video, which comes first, and without videos", "end_video")
            videos, names = [fields.pop("video"), fields.pop("end_video")], ("video", "end_video")
        else:
            videos, names = structured(fields.pop("videos", None), "videos"), ("videos", "videos")
        if not isinstance(videos, list) or len(videos) != 2:
            raise bad("videos is no list of two; legal: two files, or two of {id}, or video and end_video", "videos")
        fields.setdefault("direction", "between")
        found = [api.clip(request, video, name, own) for video, name in zip(videos, names, strict=True)]
        return [clip for clip, _ in found], found[0][1]

    return given


def remixed(api: Api, request: Request, video_id: str) -> Given:
    """A finished video, made anew."""

    def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
        if not str(fields.get("prompt", "")).strip():
            raise bad("prompt is missing; say what the video shows", "prompt")
        if "video" in fields:
            raise bad("the address names the video already", "video")
        fields["video"] = {"id": video_id}
        return from_video(api, request, strength=EDIT_STRENGTH)(fields, own)

    return given


def finished(api: Api, request: Request, video_id: str) -> Given:
    """A draft, scaled up and made anew with its own prompt and seed."""

    def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
        draft = api.job(request, video_id)
        if "final_size" not in draft.shown:
            raise ApiError(400, f"video {video_id} is no draft; make one with quality=draft", code="not_a_draft")
        if draft.shown["task"] not in ("text", "place"):
            raise bad(f"the draft is of the task {draft.shown['task']!r}; legal: of a prompt, or of pictures", "video")
        for name, ours in TAKEN_OVER.items():
            if draft.request.get(ours) is not None:
                fields.setdefault(name, draft.request[ours])
        fields.setdefault("model", draft.model)
        if "width" not in fields and "height" not in fields:
            fields.setdefault("size", draft.shown["final_size"])
        clips, parent = remixed(api, request, video_id)(fields, own)
        inputs = list(map(found_again, draft.request["clips"]))
        for clip in inputs:  # they stand in the final video too
            linked(api.store.folder(draft.id) / clip["file"], clip["file"], own())
        return [*clips, *inputs], parent

    return given


def anything(api: Api, request: Request) -> Given:
    """What the fields themselves say: one clip to go on from or to make anew, or what `from_prompt` takes."""

    def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
        if "video" in fields and "end_video" not in fields and ("direction" in fields or "strength" in fields):
            return from_video(api, request)(fields, own)
        return from_prompt(api, request)(fields, own)

    return given
