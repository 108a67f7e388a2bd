"""The path that tells how a video is coming along, as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from starlette.requests import Request

from runtime.serve.api import LOOK_SECONDS, Api
from runtime.serve.database import TERMINAL, Job
from runtime.serve.openapi import DESCRIPTIONS
from runtime.serve.shown import brief

OPEN_SECONDS = 15.0  # of silence before a comment keeps the connection open


def add(app: FastAPI, api: Api) -> None:
    """Add the events of a video."""

    @app.get("/v1/videos/{video_id}/events", openapi_extra=DESCRIPTIONS)
    async def events(request: Request, video_id: str) -> Response:
        job, last = api.job(request, video_id), request.headers.get("last-event-id", "")
        if job.status in TERMINAL and last.startswith("done"):
            return Response(status_code=204)  # tells a browser not to come again
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(follow(api, video_id, last), media_type="text/event-stream", headers=headers)


async def follow(api: Api, video_id: str, last: str) -> AsyncIterator[str]:
    """Yield a job's events as they come: progress, preview (a GIF as a data: URL), done; a comment keeps it open.

    An event tells the whole state, so who comes back with the id of the last one it saw gets what is newer.
    """
    seen, _, shown = last.partition(".")
    told = time.monotonic()
    while not api.draining:
        job = api.store.get(video_id)
        if job is None:
            yield 'id: done\nevent: done\ndata: {"status": "deleted"}\n\n'
            return
        text, digest = state(api, job)
        if job.status in TERMINAL:
            yield f"id: done\nevent: done\ndata: {text}\n\n"
            return
        if digest != seen:
            seen, told = digest, time.monotonic()
            yield f"id: {seen}.{shown}\nevent: progress\ndata: {text}\n\n"
        preview = api.store.folder(video_id) / "preview.gif"
        if preview.exists() and str(preview.stat().st_mtime_ns) != shown:
            shown = str(preview.stat().st_mtime_ns)
            data = base64.b64encode(preview.read_bytes()).decode()
            yield f'id: {seen}.{shown}\nevent: preview\ndata: {{"image": "data:image/gif;base64,{data}"}}\n\n'
        if time.monotonic() - told > OPEN_SECONDS:
            told = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(LOOK_SECONDS)


def state(api: Api, job: Job) -> tuple[str, str]:
    """Return what an event says of a job, and a hash of what is worth an event of its own."""
    found = brief(api.object(job))
    steady = {name: value for name, value in found.items() if name != "eta_seconds"}
    return json.dumps(found), hashlib.sha256(json.dumps(steady).encode()).hexdigest()[:16]
