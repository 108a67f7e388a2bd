"""Paths that make videos: create, edits, extensions, connections, remix, and the final video of a draft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from runtime.serve.api import Api
from runtime.serve.database import Job
from runtime.serve.errors import ApiError
from runtime.serve.given import Given, finished, from_prompt, from_two, from_video, remixed
from runtime.serve.openapi import describe
from runtime.serve.results import Result
from runtime.serve.schema import EDIT_STRENGTH, Asked


def add(app: FastAPI, api: Api) -> None:
    """Add what makes videos."""

    def told(job: Job) -> JSONResponse:
        return JSONResponse(api.object(job))

    async def make(request: Request, given: Given) -> Job:
        def verb(fields: dict[str, Any], own: Callable[[], Path]) -> tuple[str | None, Asked]:
            clips, parent = given(fields, own)
            return parent, api.parsed(request, fields, own, clips)

        return await api.create(request, verb)

    @app.post("/v1/videos", openapi_extra=describe("create"))
    async def create(request: Request) -> Response:
        return told(await make(request, from_prompt(api, request)))

    @app.post("/v1/videos/sync", openapi_extra=describe("create"))
    async def create_and_wait(request: Request) -> Response:
        job = await api.wait(request, await make(request, from_prompt(api, request)))
        if job.status == "failed":
            raise ApiError(
                500, (job.error or {}).get("message", "failed"), code=(job.error or {}).get("code", "failed")
            )
        return Result(api.output(job, "video"), headers={"x-video-id": job.id})

    @app.post("/v1/videos/edits", openapi_extra=describe("edit"))
    async def edit(request: Request) -> Response:
        return told(await make(request, from_video(api, request, strength=EDIT_STRENGTH)))

    @app.post("/v1/videos/extensions", openapi_extra=describe("extend"))
    async def extend(request: Request) -> Response:
        return told(await make(request, from_video(api, request, direction="forward")))

    @app.post("/v1/videos/connections", openapi_extra=describe("connect"))
    async def connect(request: Request) -> Response:
        return told(await make(request, from_two(api, request)))

    @app.post("/v1/videos/{video_id}/remix", openapi_extra=describe("remix"))
    async def remix(request: Request, video_id: str) -> Response:
        api.job(request, video_id)
        return told(await make(request, remixed(api, request, video_id)))

    @app.post("/v1/videos/{video_id}/finish", openapi_extra=describe("finish"))
    async def finish(request: Request, video_id: str) -> Response:
        api.job(request, video_id)
        return told(await make(request, finished(api, request, video_id)))
