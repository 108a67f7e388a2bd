"""Paths that tell what would be: what a request takes, and how a prompt is written out."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from runtime.serve.api import Api
from runtime.serve.errors import bad
from runtime.serve.fields import text
from runtime.serve.forecast import pace
from runtime.serve.given import anything
from runtime.serve.jobs import new_id
from runtime.serve.openapi import describe
from runtime.serve.schema import MODEL_FIELDS, Asked, choose_model
from runtime.serve.shown import shown


def add(app: FastAPI, api: Api) -> None:
    """Add what tells what would be."""

    @app.post("/v1/plan", openapi_extra=describe("plan"))
    async def plan(request: Request) -> Response:
        api.loaded()
        folder = api.store.folder(new_id("plan"))

        def own() -> Path:
            folder.mkdir(exist_ok=True)
            return folder

        try:
            fields = await api.body(request, own)

            def parsed() -> Asked:
                clips, _ = anything(api, request)(fields, own)
                return api.parsed(request, fields, own, clips)

            asked = await asyncio.to_thread(parsed)
            found = await api.ask("plan", asked.model, record=asked.record, folder=str(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        outlooks = api.outlooks().values()
        return JSONResponse(
            {
                "object": "plan", "model": asked.model, **{k: v for k, v in shown(asked).items() if k != "seed"},
                "predicted": found,
                "queue_position": sum(each.wait != 0.0 for each in outlooks),
                "eta_seconds": eta(found, [each.done for each in outlooks], asked.model),
            }
        )  # fmt: skip

    def eta(found: dict[str, Any], ends: list[float | None], model: str) -> float | None:
        """Return the seconds until a request would be done that came last; None where that is not known."""
        known = sorted(end for end in ends if end is not None)
        if not found["fits"] or len(known) < len(ends):
            return None
        seconds = found["seconds"]["total"]
        before = known[-api.settings.workers] if len(known) >= api.settings.workers else 0.0
        return round(before + seconds * pace(api.store.paces(), model, seconds), 2)

    @app.post("/v1/prompts/expand", openapi_extra=describe("expand"))
    async def expand(request: Request) -> Response:
        api.loaded()
        fields = await api.body(request, no_files)
        if unknown := sorted(fields.keys() - MODEL_FIELDS):
            raise bad(f"{unknown[0][:80]} is not known; legal: {', '.join(sorted(MODEL_FIELDS))}", unknown[0][:80])
        if not str(fields.get("prompt", "")).strip():
            raise bad("prompt is missing; say what the video shows", "prompt")
        prompt, model = text(fields, "prompt"), choose_model(fields, api.models())
        await api.moderate(request.state.owner, [prompt])
        expansion = dataclasses.asdict(api.settings.expansion)
        found = await api.ask("expand", model, prompt=prompt, expansion=expansion)
        return JSONResponse({"object": "prompt.expansion", "model": model, "prompt": prompt, **found})


def no_files() -> Path:
    """Refuse a file: there is nothing to be done with one."""
    raise bad("a file is given; legal: text alone")
