"""Paths of characters: what videos can be asked to show again."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from runtime.serve.api import Api
from runtime.serve.characters import Character
from runtime.serve.database import sync
from runtime.serve.errors import bad, missing
from runtime.serve.fields import text
from runtime.serve.jobs import new_id
from runtime.serve.openapi import DESCRIPTIONS, describe

MAX_NAME = 200  # characters of text


def add(app: FastAPI, api: Api) -> None:
    """Add the characters."""

    def found(request: Request, character_id: str) -> Character:
        character = api.characters.get(character_id, request.state.owner)
        if character is None:
            raise missing(f"character {character_id[:80]!r}")
        return character

    @app.post("/v1/videos/characters", openapi_extra=describe("character"))
    async def create(request: Request) -> Response:
        api.accepting()
        character_id, kept = new_id("char"), False
        folder = api.characters.folder(character_id)

        def own() -> Path:
            folder.mkdir(exist_ok=True)
            return folder

        def keep(fields: dict[str, Any]) -> Character:
            if unknown := sorted(fields.keys() - {"name", "video"}):
                raise bad(f"{unknown[0][:80]} is not known; legal: name, video", unknown[0][:80], "unknown_field")
            for name in ("name", "video"):
                if not fields.get(name):
                    raise bad(f"{name} is missing; legal: a name, and the video (or picture) that shows it", name)
            name = text(fields, "name").strip()
            if not 0 < len(name) <= MAX_NAME:
                raise bad(f"name has {len(name)} characters; legal: 1 to {MAX_NAME}", "name")
            clip, _ = api.clip(request, fields["video"], "video", own)
            sync(folder)
            return api.characters.add(character_id, request.state.owner, name, clip)

        try:
            character = await asyncio.to_thread(keep, await api.body(request, own))
            kept = True
        finally:
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)
        return JSONResponse(character_object(character))

    @app.get("/v1/videos/characters", openapi_extra=DESCRIPTIONS)
    async def characters(request: Request) -> Response:
        data = [character_object(each) for each in api.characters.all(request.state.owner)]
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    @app.get("/v1/videos/characters/{character_id}", openapi_extra=DESCRIPTIONS)
    async def retrieve(request: Request, character_id: str) -> Response:
        return JSONResponse(character_object(found(request, character_id)))

    @app.delete("/v1/videos/characters/{character_id}", openapi_extra=DESCRIPTIONS)
    async def delete(request: Request, character_id: str) -> Response:
        await asyncio.to_thread(api.characters.remove, found(request, character_id))
        return JSONResponse({"id": character_id, "object": "character.deleted", "deleted": True})


def character_object(character: Character) -> dict[str, Any]:
    """Return a character as the API tells it."""
    return {
        "id": character.id, "object": "character", "created_at": int(character.created_at), "name": character.name,
    }  # fmt: skip
