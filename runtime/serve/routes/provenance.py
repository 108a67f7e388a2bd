"""The path that tells where a file comes from."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from runtime.serve.api import Api
from runtime.serve.errors import bad
from runtime.serve.examining import examine
from runtime.serve.fields import structured
from runtime.serve.forms import Upload, read_body
from runtime.serve.jobs import new_id
from runtime.serve.openapi import describe


def add(app: FastAPI, api: Api) -> None:
    """Add what tells of content credentials."""

    @app.post("/v1/provenance", openapi_extra=describe("provenance"))
    async def provenance(request: Request) -> Response:
        folder = api.store.folder(new_id("upload"))

        def own() -> Path:
            folder.mkdir(exist_ok=True)
            return folder

        def look(path: Path) -> dict[str, Any]:
            anchors = own() / "anchors.pem"
            anchors.write_bytes(api.anchors or b"")
            return examine(path, anchors)

        try:
            fields = await read_body(request, own, api.settings.max_upload)
            path = named_file(fields, lambda video: api.output(api.job(request, video), "video"))
            found = await asyncio.to_thread(look, path)
        except ValueError as error:
            raise bad(f"video: {error}", "video", "invalid_upload") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return JSONResponse({"object": "provenance", **found})


def named_file(fields: dict[str, Any], find: Any) -> Path:
    """Return the file that a body names: uploaded, or of a video by its id; ApiError for anything else."""
    if fields.keys() - {"video"}:
        raise bad(f"{min(fields.keys() - {'video'})[:80]} is not known; legal: video", code="unknown_field")
    given = fields.get("video")
    value = structured(given, "video") if isinstance(given, str) and given.startswith("{") else given
    if isinstance(value, Upload):
        return value.path
    if isinstance(value, dict) and isinstance(value.get("id"), str):
        return find(value["id"])
    raise bad("video is missing; legal: a file of the form, or the id of a video", "video")
