"""The page at `/`: files of `runtime/serve/page/`, as they are, under a policy that lets nothing else run or load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent.parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",  # asked for again each time, and answered 304 where it is the same
}


class Files(StaticFiles):
    """The folder's files, each with the page's headers."""

    def file_response(self, *given: Any, **named: Any) -> Response:
        response = super().file_response(*given, **named)
        response.headers.update(HEADERS)
        return response


def add(app: FastAPI) -> None:
    """Add the page. It needs no key: it holds nothing, and asks for one."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    app.mount("/page", Files(directory=FOLDER))
