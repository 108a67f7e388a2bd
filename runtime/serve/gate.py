"""The gate that every request passes, and the answers to what fails."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from runtime.serve.errors import ApiError, bad, disk_full, no_space
from runtime.serve.jobs import new_id
from runtime.serve.keys import Key, key_of
from runtime.serve.logs import request_id
from runtime.serve.metrics import Metrics
from runtime.serve.settings import loopback

log = logging.getLogger("runtime.serve")

# What a browser may do with an answer: nothing; the page says for itself what it loads.
HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]  # fmt: skip
OPEN_PATHS = ("/", "/health/live", "/health/ready", "/openapi.json")
OPEN_FOLDER = "/page/"


class Gate:
    """Every request passes: it gets an id, its key is checked, and what fails unforeseen is told as JSON."""

    def __init__(self, app: Any, keys: dict[str, Key], metrics: Metrics, host: str = "127.0.0.1") -> None:
        self.app, self.keys, self.metrics, self.host = app, keys, metrics, host

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number, began, status = new_id("req"), time.monotonic(), 0
        request_id.set(number)

        async def answering(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*safe(message.get("headers", ())), (b"x-request-id", number.encode())]
            await send(message)

        try:
            owner = self.owner(scope)
            if owner is None and scope["path"] not in OPEN_PATHS and not scope["path"].startswith(OPEN_FOLDER):
                error = ApiError(401, "the API key is missing or not known", code="invalid_api_key")
                await JSONResponse(error.body(), 401)(scope, receive, answering)
                return
            strange = None if self.keys else stranger(dict(scope["headers"]), self.host)
            if strange is not None:
                await JSONResponse(strange.body(), strange.status)(scope, receive, answering)
                return
            scope.setdefault("state", {})["owner"] = owner
            await self.app(scope, receive, answering)
        except ClientDisconnect:
            status = 499
        except Exception as fault:
            log.exception("a request failed")
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
            seconds = time.monotonic() - began
            self.metrics.count(scope["method"], status, seconds)
            log.info("%s %s %d %.1f ms", scope["method"], scope["path"][:200], status, seconds * 1e3)

    def owner(self, scope: Any) -> str | None:
        """Return the name of the key that a request carries; "local" where the server has no keys."""
        if not self.keys:
            return "local"
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        key = key_of(self.keys, given.removeprefix("Bearer ").strip())
        return None if key is None else key.name


def safe(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return an answer's headers with those that bind browsers; what a path says itself stays."""
    found = list(headers)
    there = {name.lower() for name, _ in found}
    return found + [each for each in HEADERS if each[0] not in there]


def stranger(headers: dict[bytes, bytes], bound: str) -> ApiError | None:
    """Return the error of a request that another site's page makes to a server without keys; None where none does.

    A page may post a form to any address, and a name of its own may stand for this machine.
    """
    host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
    if origin and origin.partition("://")[2] != host:
        return ApiError(403, "another site's page asks, and this server has no keys", code="cross_origin")
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if loopback(bound) and name and name != bound and not loopback(name.strip("[]")):
        return ApiError(403, f"{name[:80]!r} is no name of this server", code="unknown_host")
    return None


async def answer(_: Request, error: Exception) -> Response:
    """Answer with an ApiError."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def answer_http(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    found = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}", code=code)
    return JSONResponse(found.body(), error.status_code, {**found.headers(), **(error.headers or {})})


async def answer_invalid(_: Request, error: Exception) -> Response:
    """Answer parameters in the address that are illegal."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return await answer(_, bad(f"{first['loc'][-1]}: {first['msg']}", str(first["loc"][-1])))
