"""The gate that every request passes, and the answers to what fails."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from runtime.serve.errors import ApiError, bad, disk_full, no_space
from runtime.serve.jobs import new_id
from runtime.serve.settings import owner_of

log = logging.getLogger("runtime.serve")

OPEN_PATHS = ("/health/live", "/health/ready", "/openapi.json")


class Gate:
    """Every request passes: it gets an id, its key is checked, and what fails unforeseen is told as JSON."""

    def __init__(self, app: Any, keys: dict[str, str], requests: Counter[str]) -> None:
        self.app, self.keys, self.requests = app, keys, requests

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number, began, status = new_id("req"), time.monotonic(), 0

        async def answering(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            owner = self.owner(scope)
            if owner is None and scope["path"] not in OPEN_PATHS:
                error = ApiError(401, "the API key is missing or not known", code="invalid_api_key")
                await JSONResponse(error.body(), 401)(scope, receive, answering)
                return
            scope.setdefault("state", {})["owner"] = owner
            await self.app(scope, receive, answering)
        except ClientDisconnect:
            status = 499
        except Exception as fault:
            log.exception("%s failed", number)
            if status == 0:
                error = (
                    no_space()
                    if disk_full(fault)
                    else ApiError(
                        500, f"a fault of the server; its log says more under {number}", code="internal_error"
                    )
                )
                await JSONResponse(error.body(), error.status, error.headers())(scope, receive, answering)
        finally:
            self.requests[str(status)] += 1
            seconds = time.monotonic() - began
            log.info("%s %s %d %.1f ms %s", scope["method"], scope["path"][:200], status, seconds * 1e3, number)

    def owner(self, scope: Any) -> str | None:
        """Return the name of the key that a request carries; "local" where the server has no keys."""
        if not self.keys:
            return "local"
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        return owner_of(self.keys, given.removeprefix("Bearer ").strip())


async def answer(_: Request, error: Exception) -> Response:
    """Answer with an ApiError."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def answer_http(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}", code="not_found")
    return JSONResponse(found.body(), error.status_code, {**found.headers(), **(error.headers or {})})


async def answer_invalid(_: Request, error: Exception) -> Response:
    """Answer parameters in the address that are illegal."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return await answer(_, bad(f"{first['loc'][-1]}: {first['msg']}", str(first["loc"][-1])))
