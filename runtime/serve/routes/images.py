"""Paths that make pictures: videos of one frame."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from runtime.serve.api import Api, row
from runtime.serve.errors import ApiError, bad
from runtime.serve.jobs import new_id
from runtime.serve.openapi import describe
from runtime.serve.schema import Asked

IMAGE_FIELDS = {"response_format": "b64_json", "output_format": "png", "background": "auto", "quality": "auto"}


def add(app: FastAPI, api: Api) -> None:
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
