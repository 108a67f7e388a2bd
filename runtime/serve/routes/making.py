"""Paths that make videos: create, edits, extensions, connections, remix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.requests import Request

from runtime.serve.api import Api
from runtime.serve.errors import ApiError, bad
from runtime.serve.jobs import Job
from runtime.serve.openapi import describe
from runtime.serve.schema import EDIT_STRENGTH, Asked, structured, video_object


def add(app: FastAPI, api: Api) -> None:
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
