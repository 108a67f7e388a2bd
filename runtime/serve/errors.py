"""Errors as the OpenAI clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import errno
import sqlite3
from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is no success; `retry_after` in seconds tells a client to come again, else it shall not."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers: whether and when to try again."""
        if self.retry_after is None:
            return {"x-should-retry": "false"} if self.status in (408, 409, 429) or self.status >= 500 else {}
        found = {"retry-after": str(max(1, round(self.retry_after)))}
        return found | ({"x-should-retry": "false"} if self.status == 429 else {})  # an hour's queue is no hiccup


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
FULL_STORE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def disk_full(error: BaseException) -> bool:
    """Tell whether an error says that the disk takes nothing more: it is full, over a quota, or read-only."""
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in FULL_STORE  # the upper bytes say more of the kind
    return isinstance(error, OSError) and error.errno in FULL


def no_space() -> ApiError:
    """Return the error of a disk that takes nothing more."""
    return ApiError(507, "the disk of the server is full", code="insufficient_storage")


def bad(message: str, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """Return the error of a request that says something illegal."""
    return ApiError(400, message, code=code, param=param)


def missing(what: str) -> ApiError:
    """Return the error of a thing that is not there, or not this key's."""
    return ApiError(404, f"there is no {what}", code="not_found")
