"""Paths that tell of videos, give their files out, and end them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI, Query
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.requests import Request

from runtime.serve.api import LOOK_SECONDS, Api
from runtime.serve.errors import bad
from runtime.serve.jobs import TERMINAL, Job
from runtime.serve.openapi import DESCRIPTIONS
from runtime.serve.schema import video_object

VARIANTS = ("video", "thumbnail", "spritesheet")


def add(app: FastAPI, api: Api) -> None:
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
