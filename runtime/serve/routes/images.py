"""Paths that make pictures, which are videos of one frame: generations and edits, at once or as they come along."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.requests import ClientDisconnect, Request

from runtime.serve.api import LOOK_SECONDS, Api, row
from runtime.serve.database import TERMINAL, Job
from runtime.serve.errors import ApiError, bad, missing
from runtime.serve.fields import flag, number
from runtime.serve.inputs import read_upload
from runtime.serve.jobs import new_id
from runtime.serve.openapi import DESCRIPTIONS, describe
from runtime.serve.results import Result
from runtime.serve.schema import EDIT_STRENGTH, Asked, again

# Fields that have one effect here: what they may say.
FIXED = {
    "response_format": ("b64_json", "url"), "output_format": ("png",), "background": ("auto", "opaque"),
    "moderation": ("auto", "low"), "output_compression": (100,),
}  # fmt: skip
MAX_PICTURES, MAX_PARTIAL, MAX_IMAGES = 10, 3, 16
URL_SECONDS = 3600.0  # that a picture can be had by its address
IMAGE = re.compile(r"image_[0-9a-f]{32}")


@dataclass(frozen=True)
class Options:
    """How many pictures, and whether they are told of while they are made."""

    count: int
    stream: bool
    partial: int
    url: bool = False  # their addresses are told, not their bytes


def add(app: FastAPI, api: Api) -> None:
    """Add pictures."""

    async def make(request: Request, given: Callable[..., Asked], name: str) -> Response:
        rest: list[Asked] = []
        options = Options(1, False, 0)

        def verb(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[None, Asked]:
            nonlocal options
            options = read_options(fields)
            seed = fields.get("seed")
            asked = {**fields, "num_frames": 1, "priority": fields.get("priority", 1)}
            first = given(dict(asked), own)
            for index in range(1, options.count):
                changed = {} if seed is None else {"seed": number(fields, "seed", int) + index}
                rest.append(again(first, **changed))
            return None, first

        jobs = [await api.create(request, verb, kind="image")]
        for asked in rest:
            jobs.append(await asyncio.to_thread(beside, api, jobs[0], asked))
        api.wake()
        if options.stream:
            return StreamingResponse(follow(api, jobs[0], name, options.partial), media_type="text/event-stream")
        return await finished(api, request, jobs, url=options.url)

    @app.post("/v1/images/generations", openapi_extra=describe("image"))
    async def generations(request: Request) -> Response:
        def given(fields: dict[str, Any], own: Callable[[], Path]) -> Asked:
            return api.parsed(request, fields, own, [])

        return await make(request, given, "image_generation")

    @app.post("/v1/images/edits", openapi_extra=describe("image_edit"))
    async def edits(request: Request) -> Response:
        def given(fields: dict[str, Any], own: Callable[[], Path]) -> Asked:
            images = fields.pop("image", None)
            images = images if isinstance(images, list) else [images]
            if not images or images[0] is None or len(images) > MAX_IMAGES:
                raise bad(f"image is missing, or more than {MAX_IMAGES}; legal: a file, or several", "image")
            first, *others = [api.clip(request, image, "image", own)[0] for image in images]
            if (mask := fields.pop("mask", None)) is not None:
                first |= {"mask": read_upload(mask, "mask", own, mask=True)["file"]}
            else:
                fields.setdefault("strength", EDIT_STRENGTH)
            return api.parsed(request, fields, own, [first], others)

        return await make(request, given, "image_edit")

    @app.api_route("/v1/images/{image_id}/content", methods=["GET", "HEAD"], openapi_extra=DESCRIPTIONS)
    async def content(request: Request, image_id: str) -> Response:
        job = api.store.kept(image_id) if IMAGE.fullmatch(image_id) else None
        if job is None or job.owner != request.state.owner:
            raise missing(f"image {image_id[:80]!r}")
        headers = {"cache-control": "private"}
        path = api.output(job, "video")
        return Result(path, headers=headers, filename=f"{job.id}.png", content_disposition_type="inline")


def read_options(fields: dict[str, Any]) -> Options:
    """Take what is about pictures alone out of the fields; ApiError for what is illegal."""
    count = number({"n": 1} | fields, "n", int)
    partial = number({"partial_images": 0} | fields, "partial_images", int)
    stream = flag(fields, "stream")
    url = fields.get("response_format") == "url"
    for name in ("n", "partial_images", "stream"):
        fields.pop(name, None)
    if not 1 <= count <= MAX_PICTURES:
        raise bad(f"n is {count}; legal: 1 to {MAX_PICTURES}", "n")
    if not 0 <= partial <= MAX_PARTIAL:
        raise bad(f"partial_images is {partial}; legal: 0 to {MAX_PARTIAL}", "partial_images")
    if stream and count > 1:
        raise bad(f"n is {count}; legal with stream: 1", "n")
    if stream and url:
        raise bad("response_format is 'url'; legal with stream: b64_json", "response_format")
    for name, legal in FIXED.items():
        if (value := fields.pop(name, None)) is not None and str(value) not in map(str, legal):
            raise bad(f"{name} is {str(value)[:40]!r}; legal: {', '.join(map(str, legal))}", name)
    if not str(fields.get("prompt", "")).strip():
        raise bad("prompt is missing; say what the picture shows", "prompt")
    return Options(count, stream, partial, url)


def beside(api: Api, first: Job, asked: Asked) -> Job:
    """Take one more picture of what another was asked for, with the same inputs."""
    job_id = new_id("image")
    folder = api.store.folder(job_id)
    folder.mkdir()
    for given in asked.record["clips"] + asked.record["references"]:
        for name in {given["input"], given.get("mask", given["input"])}:
            if not (folder / name).exists():
                os.link(api.store.folder(first.id) / name, folder / name)
    return api.keep(folder, row(job_id, "image", first.owner, asked))


async def finished(api: Api, request: Request, jobs: Sequence[Job], *, url: bool) -> Response:
    """Return the answer with all pictures when they are made; what nobody waits for is cancelled."""
    data = []
    try:
        for job in jobs:
            content = picture(api, await api.wait(request, job))
            data.append({"url": f"{request.base_url}v1/images/{job.id}/content"} if url else {"b64_json": content})
    except (ApiError, ClientDisconnect):
        for job in jobs:
            await asyncio.to_thread(api.store.cancel, job.id)
        raise
    for job in jobs:
        await forget(api, job, URL_SECONDS if url else 0.0)
    return JSONResponse({"created": int(jobs[0].created_at), "data": data, **described(jobs[0])})


async def follow(api: Api, job: Job, name: str, partial: int) -> AsyncIterator[str]:
    """Yield a picture's events: up to `partial` looks at it while it is made, and it."""
    told = 0
    while job.status not in TERMINAL and not api.draining:
        preview = api.store.folder(job.id) / "preview.gif"
        if told < partial and job.progress >= 90 * (told + 1) / (partial + 1) and preview.exists():
            image = await asyncio.to_thread(enlarged, preview, job.shown["size"])
            yield event(f"{name}.partial_image", job, b64_json=image, partial_image_index=told)
            told += 1
        await asyncio.sleep(LOOK_SECONDS / 4)
        found = api.store.get(job.id)
        if found is None:
            return
        job = found
    try:
        yield event(f"{name}.completed", job, b64_json=picture(api, job))
    except ApiError as error:
        yield f"event: error\ndata: {json.dumps(error.body())}\n\n"
    await forget(api, job)


def event(kind: str, job: Job, **values: Any) -> str:
    """Return one event."""
    found = {"type": kind, "created_at": int(job.created_at), **described(job), **values}
    return f"event: {kind}\ndata: {json.dumps(found)}\n\n"


def described(job: Job) -> dict[str, Any]:
    """Return what is told of a picture."""
    return {"size": job.shown["size"], "output_format": "png", "quality": "auto", "background": "opaque"}


def picture(api: Api, job: Job) -> str:
    """Return the picture of a job that has ended; ApiError where there is none."""
    if job.status != "completed":
        error = job.error or {}
        raise ApiError(500, error.get("message", f"the picture is {job.status}"), code=error.get("code", "failed"))
    return base64.b64encode(api.output(job, "video").read_bytes()).decode()


def enlarged(preview: Path, size: str) -> str:
    """Return the first frame of a preview as a PNG at a size."""
    width, _, height = size.partition("x")
    found = io.BytesIO()
    with Image.open(preview) as frame:
        frame.convert("RGB").resize((int(width), int(height)), Image.Resampling.BICUBIC).save(found, "PNG")
    return base64.b64encode(found.getvalue()).decode()


async def forget(api: Api, job: Job, seconds: float = 0.0) -> None:
    """Remove a picture as soon as nobody can ask for it again."""
    if job.idempotency is None:
        await asyncio.to_thread(api.store.cancel, job.id, delete=True, undo=seconds)
