"""Paths that tell of videos, give their files out, end them, and bring back what was deleted by mistake."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse, Response
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.routing import Route

from runtime.serve.api import SHAPE, Api
from runtime.serve.database import ACTIVE, TERMINAL, Job
from runtime.serve.errors import ApiError, bad, missing
from runtime.serve.formats import FORMATS, Part, converted
from runtime.serve.openapi import DESCRIPTIONS
from runtime.serve.results import Result
from runtime.serve.shown import brief

VARIANTS = ("video", "thumbnail", "spritesheet", "preview")
UNDO_SECONDS = 600.0  # that a deleted video can be kept for at most


class VideoId(StringConvertor):
    """The id of a video in an address."""

    regex = SHAPE.pattern


register_url_convertor("video_id", VideoId())


def add(app: FastAPI, api: Api) -> None:
    """Add what tells of videos, gives their files out, and ends them."""

    def told(job: Job) -> JSONResponse:
        found = api.object(job)
        wait = min(max((found.get("eta_seconds") or 1.0) * 100, 250), 5000)
        return JSONResponse(found, headers={"openai-poll-after-ms": str(round(wait))})

    @app.get("/v1/videos", openapi_extra=DESCRIPTIONS)
    async def videos(
        request: Request,
        after: str | None = None,
        limit: int = Query(20, ge=1, le=100),
        order: str = Query("desc", pattern="^(asc|desc)$"),
        status: str | None = None,
        search: str = Query("", max_length=200),
    ) -> Response:
        seq = None if after is None else api.job(request, after).seq
        statuses = (*ACTIVE, *TERMINAL) if status is None else tuple(status.split(","))
        if unknown := set(statuses) - {*ACTIVE, *TERMINAL}:
            legal = ", ".join((*ACTIVE, *TERMINAL))
            raise bad(f"status is {min(unknown)[:40]!r}; legal: some of {legal}, with commas between", "status")
        jobs = api.store.page(
            request.state.owner, after=seq, limit=limit + 1, descending=order == "desc", statuses=statuses,
            search=search,
        )  # fmt: skip
        data = [brief(api.object(job)) for job in jobs[:limit]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return JSONResponse({"object": "list", "data": data, **ends, "has_more": len(jobs) > limit})

    @app.get("/v1/videos/{video_id}", openapi_extra=DESCRIPTIONS)
    async def retrieve(request: Request, video_id: str) -> Response:
        return told(api.job(request, video_id))

    async def poll(request: Request) -> Response:
        return told(api.job(request, request.path_params["video_id"]))

    # Before all other paths, and without FastAPI's look at parameters: what is asked most takes two thirds of the time.
    app.router.routes.insert(0, Route("/v1/videos/{video_id:video_id}", poll, methods=["GET"]))

    @app.delete("/v1/videos/{video_id}", openapi_extra=DESCRIPTIONS)
    async def delete(
        request: Request, video_id: str, undo: float = Query(0.0, ge=0, le=UNDO_SECONDS, allow_inf_nan=False)
    ) -> Response:
        api.job(request, video_id)
        await asyncio.to_thread(api.store.cancel, video_id, delete=True, undo=undo)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    @app.post("/v1/videos/{video_id}/restore", openapi_extra=DESCRIPTIONS)
    async def restore(request: Request, video_id: str) -> Response:
        found = None
        if SHAPE.fullmatch(video_id):
            found = await asyncio.to_thread(api.store.restore, video_id, request.state.owner)
        if found is None:
            raise missing(f"deleted video {video_id[:80]!r} that can be restored")
        return told(found)

    @app.post("/v1/videos/{video_id}/cancel", openapi_extra=DESCRIPTIONS)
    async def cancel(request: Request, video_id: str) -> Response:
        job = api.job(request, video_id)
        if job.status not in TERMINAL:
            await asyncio.to_thread(api.store.cancel, video_id)
        return told(api.job(request, video_id))

    @app.api_route("/v1/videos/{video_id}/content", methods=["GET", "HEAD"], openapi_extra=DESCRIPTIONS)
    async def content(
        request: Request,
        video_id: str,
        variant: str = "video",
        kind: str | None = Query(None, alias="format"),
        first: int | None = Query(None, alias="from"),
        end: int | None = Query(None, alias="to"),
        download: bool = False,
    ) -> Response:
        job = api.job(request, video_id)
        if variant not in VARIANTS:
            raise bad(f"variant is {variant[:40]!r}; legal: {', '.join(VARIANTS)}", "variant")
        path = api.preview(job) if variant == "preview" else api.output(job, variant)
        part = part_of(job, variant, first, end)
        if kind is not None or part is not None:
            path = await in_format(path, variant, kind or FORMATS[0], part)
        headers = {"cache-control": "private"}
        return Result(
            path, headers=headers, filename=f"{job.id}{path.suffix}",
            content_disposition_type="attachment" if download else "inline",
        )  # fmt: skip

    converting = asyncio.Lock()  # one at a time: each takes as many cores as there are

    async def in_format(path: Path, variant: str, kind: str, part: Part | None) -> Path:
        if variant != "video" or kind not in FORMATS:
            raise bad(f"format is {kind[:40]!r}; legal for a video: {', '.join(FORMATS)}", "format")
        async with converting:
            try:
                return await asyncio.to_thread(converted, path, kind, part, api.settings.signer_files)
            except ValueError as error:
                raise bad(str(error), "format") from error
            except OSError as error:
                raise ApiError(507, error.strerror or str(error), code="insufficient_storage") from error


def part_of(job: Job, variant: str, first: int | None, end: int | None) -> Part | None:
    """Return the part of a video that `from` and `to` name, None for the whole; ApiError for none of it."""
    if first is None and end is None:
        return None
    frames = job.shown["num_frames"]
    start, stop = first or 0, frames if end is None else end
    if variant != "video" or not 0 <= start < stop <= frames:
        raise bad(f"from is {start} and to is {stop}; legal: onward, within the {frames} frames of a video", "from")
    return None if (start, stop) == (0, frames) else (start, stop)
