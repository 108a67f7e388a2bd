"""The HTTP surface, as the clients of OpenAI's Videos and Images API speak it, and what goes beyond it.

Nothing here imports torch or decodes a picture: workers make videos, and children look at uploads.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from runtime.serve.errors import ApiError, bad, missing
from runtime.serve.forms import Upload, read_body
from runtime.serve.gate import Gate, answer, answer_http, answer_invalid
from runtime.serve.jobs import TERMINAL, Job, Store, new_id
from runtime.serve.openapi import DESCRIPTIONS, describe
from runtime.serve.schema import EDIT_STRENGTH, Asked, parse_request, read_clip, shown, structured, sync, video_object
from runtime.serve.settings import Settings

SHAPE = re.compile(r"video_[0-9a-f]{32}")
LOOK_SECONDS = 0.1  # between two looks at a job that somebody waits for
VARIANTS = ("video", "thumbnail", "spritesheet")
IMAGE_FIELDS = {"response_format": "b64_json", "output_format": "png", "background": "auto", "quality": "auto"}


class Api:
    """What all routes share: the store, the settings, and whether the server is ending."""

    def __init__(self, settings: Settings, store: Store, wake: Callable[[], None]) -> None:
        self.settings, self.store, self.wake = settings, store, wake
        self.draining = False
        self.requests: Counter[str] = Counter()
        self.ready: Callable[[], bool] = lambda: False

    def accepting(self) -> None:
        """ApiError where nothing new can be taken now."""
        if self.draining:
            raise ApiError(503, "the server is ending", code="shutting_down", retry_after=5)
        if shutil.disk_usage(self.settings.data).free < self.settings.min_free:
            raise ApiError(507, "the disk of the server is full", code="insufficient_storage")
        if not self.store.models():
            raise ApiError(503, "no model is loaded yet", code="not_ready", retry_after=1)
        self.check_queue()

    def check_queue(self) -> None:
        """ApiError where the queue is full."""
        counts = self.store.counts()
        if counts.get("queued", 0) + counts.get("in_progress", 0) >= self.settings.max_queue:
            raise self.full()

    def full(self) -> ApiError:
        """Return the error of a full queue: come again when the job that is running is done."""
        return ApiError(429, "the queue is full", code="queue_full", retry_after=min(max(self.store.soonest(), 1), 120))

    def job(self, request: Request, job_id: str) -> Job:
        """Return a video of the asking key; ApiError where there is none."""
        found = self.store.get(job_id) if SHAPE.fullmatch(job_id) else None
        if found is None or found.owner != request.state.owner:
            raise missing(f"video {job_id[:80]!r}")
        return found

    async def create(self, request: Request, verb: Callable[..., Any], kind: str = "video") -> Job:
        """Take a job: its files and its row are durable when this returns."""
        self.accepting()
        job_id = new_id("video" if kind == "video" else "image")
        folder = self.store.folder(job_id)

        def own() -> Path:
            folder.mkdir(exist_ok=True)
            return folder

        kept = False
        try:
            fields = await read_body(request, own, self.settings.max_upload)
            digest = await asyncio.to_thread(fingerprint, request.url.path, fields)
            parent, asked = await asyncio.to_thread(verb, fields, own)
            values = row(job_id, kind, request.state.owner, asked) | {"parent": parent}
            if key := request.headers.get("idempotency-key"):
                values |= {"idempotency": key[:256], "digest": digest}
            job = await asyncio.to_thread(self.keep, folder, values)
            kept = job.id == job_id
        finally:
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)
        if not kept and job.digest != digest:
            raise ApiError(422, "this Idempotency-Key was used for another request", code="idempotency_key_reused")
        self.wake()
        return job

    def keep(self, folder: Path, values: dict[str, Any]) -> Job:
        """Add a job to the store; ApiError where the queue is full."""
        folder.mkdir(exist_ok=True)
        sync(folder)
        job = self.store.create(values, max_queue=self.settings.max_queue, max_owner=self.settings.max_per_key)
        if job is None:
            raise self.full()
        return job

    def parsed(self, fields: dict[str, Any], own: Callable[[], Path], given: list[dict[str, Any]]) -> Asked:
        """Return the checked request of fields and clips."""
        return parse_request(fields, self.store.models(), own, given)

    def clip(
        self, request: Request, value: Any, name: str, own: Callable[[], Path]
    ) -> tuple[dict[str, Any], str | None]:
        """Return (clip, id of its video or None) of {"id": ...}, or of an uploaded file."""
        value = structured(value, name) if isinstance(value, str) and value.startswith("{") else value
        if not (isinstance(value, dict) and isinstance(value.get("id"), str)):
            return read_clip(value, name, own), None
        job = self.job(request, value["id"])
        source = self.output(job, "video")
        target = own() / f"{job.id}.mp4"
        if not target.exists():
            os.link(source, target)  # stays when the first video is deleted
        width, _, height = job.shown["size"].partition("x")
        facts = {
            "width": int(width),
            "height": int(height),
            "num_frames": job.shown["num_frames"],
            "fps": job.shown["fps"],
        }
        return {"file": target.name, "at": 0, "hold": 1.0, **facts}, job.id

    def output(self, job: Job, variant: str) -> Path:
        """Return the file of a completed job; ApiError where it is not there."""
        if job.status in ("queued", "in_progress"):
            raise ApiError(409, f"the video is {job.status}; ask again when it is completed", code="video_not_ready")
        if job.status != "completed" or job.output is None:
            raise ApiError(404, f"the video is {job.status}; it has no content", code=f"video_{job.status}")
        path = self.store.folder(job.id) / job.output["file" if variant == "video" else variant]
        if not path.is_file():
            self.store.fail(job, {"code": "output_missing", "message": "the file of this video is gone"})
            raise ApiError(404, "the file of this video is gone", code="output_missing")
        return path

    async def wait(self, request: Request, job: Job) -> Job:
        """Return a job when it has ended; it is cancelled where the client does not wait."""
        while job.status not in TERMINAL:
            if await request.is_disconnected():
                await asyncio.to_thread(self.store.cancel, job.id)
                raise ClientDisconnect
            if self.draining:
                raise ApiError(
                    503, f"the server is ending; {job.id} goes on later", code="shutting_down", retry_after=5
                )
            await asyncio.sleep(LOOK_SECONDS)
            found = self.store.get(job.id)
            if found is None:
                raise missing(f"video {job.id}")
            job = found
        return job


def row(job_id: str, kind: str, owner: str, asked: Asked) -> dict[str, Any]:
    """Return the store's columns of a request."""
    return {
        "id": job_id, "kind": kind, "owner": owner, "model": asked.model, "prompt": asked.request.prompt,
        "priority": asked.priority, "request": asked.record, "shown": shown(asked),
        "total": (asked.request.steps or 1) * asked.windows,
    }  # fmt: skip


def fingerprint(path: str, fields: dict[str, Any]) -> str:
    """Return a hash of a path and its body, files by content."""

    def plain(value: Any) -> Any:
        if isinstance(value, Upload):
            with value.path.open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()
        return str(value)

    return hashlib.sha256((path + json.dumps(fields, sort_keys=True, default=plain)).encode()).hexdigest()


def make_app(api: Api) -> FastAPI:
    """Return the application."""
    app = FastAPI(title="dit-runtime", version="1", docs_url=None, redoc_url=None, openapi_url=None)
    add_making(app, api)
    add_reading(app, api)
    add_images(app, api)
    add_state(app, api)
    app.add_middleware(Gate, keys=api.settings.keys, requests=api.requests)
    app.exception_handler(ApiError)(answer)
    app.exception_handler(HTTPException)(answer_http)
    app.exception_handler(RequestValidationError)(answer_invalid)
    return app


def add_making(app: FastAPI, api: Api) -> None:
    """Add what makes videos."""

    def told(job: Job) -> JSONResponse:
        return JSONResponse(video_object(job, api.store.ahead(job) if job.status == "queued" else None))

    async def make(request: Request, given: Callable[..., Any]) -> Job:
        def verb(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[str | None, Asked]:
            clips, parent = given(fields, own)
            return parent, api.parsed(fields, own, clips)

        return await api.create(request, verb)

    def from_video(request: Request, **settings: Any) -> Callable[..., Any]:
        def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
            if "video" not in fields:
                raise bad("video is missing; legal: a file, or the id of a video", "video")
            clip, parent = api.clip(request, fields.pop("video"), "video", own)
            for name, value in settings.items():
                fields.setdefault(name, value)
            return [clip], parent

        return given

    def from_prompt(request: Request) -> Callable[..., Any]:
        def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
            if not str(fields.get("prompt", "")).strip():
                raise bad("prompt is missing; say what the video shows", "prompt")
            if "video" not in fields:
                return [], None
            if str(fields.get("loop", "")).lower() not in ("true", "1"):
                raise bad("video is for /v1/videos/edits, /v1/videos/extensions, or loop", "video")
            return from_video(request)(fields, own)

        return given

    @app.post("/v1/videos", openapi_extra=describe("create"))
    async def create(request: Request) -> Response:
        return told(await make(request, from_prompt(request)))

    @app.post("/v1/videos/sync", openapi_extra=describe("create"))
    async def create_and_wait(request: Request) -> Response:
        job = await api.wait(request, await make(request, from_prompt(request)))
        if job.status == "failed":
            raise ApiError(
                500, (job.error or {}).get("message", "failed"), code=(job.error or {}).get("code", "failed")
            )
        return FileResponse(api.output(job, "video"), headers={"x-video-id": job.id})

    @app.post("/v1/videos/edits", openapi_extra=describe("edit"))
    async def edit(request: Request) -> Response:
        return told(await make(request, from_video(request, strength=EDIT_STRENGTH)))

    @app.post("/v1/videos/extensions", openapi_extra=describe("extend"))
    async def extend(request: Request) -> Response:
        return told(await make(request, from_video(request, direction="forward")))

    @app.post("/v1/videos/connections", openapi_extra=describe("connect"))
    async def connect(request: Request) -> Response:
        def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
            videos = structured(fields.pop("videos", None), "videos")
            if not isinstance(videos, list) or len(videos) != 2:
                raise bad("videos is no list of two; legal: two files, or two of {id}", "videos")
            fields["direction"] = "between"
            found = [api.clip(request, video, "videos", own) for video in videos]
            return [clip for clip, _ in found], found[0][1]

        return told(await make(request, given))

    @app.post("/v1/videos/{video_id}/remix", openapi_extra=describe("remix"))
    async def remix(request: Request, video_id: str) -> Response:
        def given(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[list[dict[str, Any]], str | None]:
            if not str(fields.get("prompt", "")).strip():
                raise bad("prompt is missing; say what the video shows", "prompt")
            clip, parent = api.clip(request, {"id": video_id}, "video", own)
            fields.setdefault("strength", EDIT_STRENGTH)
            return [clip], parent

        api.job(request, video_id)
        return told(await make(request, given))


def add_reading(app: FastAPI, api: Api) -> None:
    """Add what tells of videos, gives their files out, and ends them."""

    def told(job: Job) -> JSONResponse:
        found = video_object(job, api.store.ahead(job) if job.status == "queued" else None)
        wait = min(max((found.get("eta_seconds") or 1.0) * 100, 250), 5000)
        return JSONResponse(found, headers={"openai-poll-after-ms": str(round(wait))})

    @app.get("/v1/videos", openapi_extra=DESCRIPTIONS)
    async def videos(
        request: Request,
        after: str | None = None,
        limit: int = Query(20, ge=1, le=100),
        order: str = Query("desc", pattern="^(asc|desc)$"),
    ) -> Response:
        seq = None if after is None else api.job(request, after).seq
        jobs = api.store.page(request.state.owner, after=seq, limit=limit + 1, descending=order == "desc")
        data = [video_object(job) for job in jobs[:limit]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return JSONResponse({"object": "list", "data": data, **ends, "has_more": len(jobs) > limit})

    @app.get("/v1/videos/{video_id}", openapi_extra=DESCRIPTIONS)
    async def retrieve(request: Request, video_id: str) -> Response:
        return told(api.job(request, video_id))

    @app.delete("/v1/videos/{video_id}", openapi_extra=DESCRIPTIONS)
    async def delete(request: Request, video_id: str) -> Response:
        api.job(request, video_id)
        await asyncio.to_thread(api.store.cancel, video_id, delete=True)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    @app.post("/v1/videos/{video_id}/cancel", openapi_extra=DESCRIPTIONS)
    async def cancel(request: Request, video_id: str) -> Response:
        job = api.job(request, video_id)
        if job.status not in TERMINAL:
            await asyncio.to_thread(api.store.cancel, video_id)
        return told(api.job(request, video_id))

    @app.api_route("/v1/videos/{video_id}/content", methods=["GET", "HEAD"], openapi_extra=DESCRIPTIONS)
    async def content(request: Request, video_id: str, variant: str = "video") -> Response:
        job = api.job(request, video_id)
        if variant not in VARIANTS:
            raise bad(f"variant is {variant[:40]!r}; legal: {', '.join(VARIANTS)}", "variant")
        path = api.output(job, variant)
        headers = {"x-content-type-options": "nosniff", "cache-control": "private"}
        return FileResponse(path, headers=headers, filename=f"{job.id}{path.suffix}", content_disposition_type="inline")

    @app.get("/v1/videos/{video_id}/events", openapi_extra=DESCRIPTIONS)
    async def events(request: Request, video_id: str) -> Response:
        api.job(request, video_id)
        return StreamingResponse(follow(api, request, video_id), media_type="text/event-stream")


async def follow(api: Api, request: Request, video_id: str) -> AsyncIterator[str]:
    """Yield a job's events as they come: progress, preview (a GIF as a data: URL), done; a comment keeps it open."""
    last, shown_at, told = "", 0.0, time.monotonic()
    while not api.draining:
        job = api.store.get(video_id)
        if job is None:
            yield 'event: done\ndata: {"status": "deleted"}\n\n'
            return
        found = video_object(job, api.store.ahead(job) if job.status == "queued" else None)
        text = json.dumps({name: value for name, value in found.items() if name not in ("receipt", "stages")})
        if job.status in TERMINAL:
            yield f"event: done\ndata: {text}\n\n"
            return
        if text != last:
            yield f"event: progress\ndata: {text}\n\n"
            last, told = text, time.monotonic()
        preview = api.store.folder(video_id) / "preview.gif"
        if preview.exists() and preview.stat().st_mtime > shown_at:
            shown_at = preview.stat().st_mtime
            data = base64.b64encode(preview.read_bytes()).decode()
            yield f'event: preview\ndata: {{"image": "data:image/gif;base64,{data}"}}\n\n'
        if time.monotonic() - told > 15:
            yield ": still here\n\n"
            told = time.monotonic()
        await asyncio.sleep(LOOK_SECONDS)


def add_images(app: FastAPI, api: Api) -> None:
    """Add pictures: videos of one frame."""

    @app.post("/v1/images/generations", openapi_extra=describe("image"))
    async def images(request: Request) -> Response:
        rest: list[Asked] = []

        def verb(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[None, Asked]:
            count = fields.pop("n", 1)
            if count not in range(1, 11):
                raise bad(f"n is {str(count)[:40]!r}; legal: 1 to 10", "n")
            for name, legal in IMAGE_FIELDS.items():
                if (value := fields.pop(name, None)) not in (None, "auto", legal):
                    raise bad(f"{name} is {str(value)[:40]!r}; legal: {legal}", name)
            if not str(fields.get("prompt", "")).strip():
                raise bad("prompt is missing; say what the picture shows", "prompt")
            seed = fields.get("seed")
            for index in range(count):
                asked = dict(fields, num_frames=1, priority=fields.get("priority", 1))
                if seed is not None and index:
                    asked["seed"] = int(seed) + index
                rest.append(api.parsed(asked, own, []))
            return None, rest.pop(0)

        jobs = [await api.create(request, verb, kind="image")]
        for asked in rest:
            job_id = new_id("image")
            values = row(job_id, "image", request.state.owner, asked)
            jobs.append(await asyncio.to_thread(api.keep, api.store.folder(job_id), values))
        api.wake()
        data = []
        for job in jobs:
            done = await api.wait(request, job)
            if done.status != "completed":
                error = done.error or {}
                raise ApiError(
                    500, error.get("message", f"the picture is {done.status}"), code=error.get("code", "failed")
                )
            data.append({"b64_json": base64.b64encode(api.output(done, "video").read_bytes()).decode()})
            if done.idempotency is None:  # nobody can ask for it again
                await asyncio.to_thread(api.store.cancel, done.id, delete=True)
        return JSONResponse(
            {"created": int(jobs[0].created_at), "data": data, "size": jobs[0].shown["size"], "output_format": "png"}
        )


def add_state(app: FastAPI, api: Api) -> None:
    """Add what tells of the server itself."""

    @app.get("/v1/models", openapi_extra=DESCRIPTIONS)
    async def models() -> Response:
        found = api.store.models()
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "dit-runtime"} for name in found]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/health/live", openapi_extra=DESCRIPTIONS)
    async def live() -> Response:
        return JSONResponse({"status": "live"})

    @app.get("/health/ready", openapi_extra=DESCRIPTIONS)
    async def ready() -> Response:
        if api.draining or not api.ready():
            raise ApiError(503, "no worker is ready", code="not_ready", retry_after=1)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", openapi_extra=DESCRIPTIONS)
    async def metrics() -> Response:
        lines = ["# TYPE dit_requests_total counter"]
        lines += [f'dit_requests_total{{status="{name}"}} {count}' for name, count in sorted(api.requests.items())]
        lines.append("# TYPE dit_jobs gauge")
        lines += [f'dit_jobs{{status="{name}"}} {count}' for name, count in sorted(api.store.counts().items())]
        lines.append("# TYPE dit_stage_seconds summary")
        for name, seconds, calls in api.store.stages():
            lines.append(f'dit_stage_seconds_sum{{stage="{name}"}} {seconds:.6f}')
            lines.append(f'dit_stage_seconds_count{{stage="{name}"}} {calls}')
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())
