"""A job's file as an answer: whole or in ranges, and not at all to whom has it already."""

from __future__ import annotations

import asyncio
import os

from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from runtime.serve.errors import ApiError


class Result(FileResponse):
    """A file that says 304 to whom names its ETag, and a range that cannot be had as all other errors are told."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        self.stat_result = await asyncio.to_thread(os.stat, self.path)
        self.set_stat_headers(self.stat_result)
        asked, refused = Headers(scope=scope), 0
        known = [each.strip().removeprefix("W/") for each in asked.get("if-none-match", "").split(",")]
        if self.headers["etag"] in known or known == ["*"]:
            kept = {name: self.headers[name] for name in ("etag", "cache-control") if name in self.headers}
            await Response(status_code=304, headers=kept)(scope, receive, send)
            return

        async def unless_refused(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = message["status"]
            if not refused:
                await send(message)

        await super().__call__(scope, receive, unless_refused)
        if refused:
            size = self.stat_result.st_size
            told = f"range is {asked['range'][:80]!r}; legal: bytes=FIRST-LAST within the {size} bytes of the file"
            error = ApiError(refused, told, code="invalid_range")
            headers = {"content-range": f"bytes */{size}"} if refused == 416 else {}
            await JSONResponse(error.body(), refused, headers)(scope, receive, send)
