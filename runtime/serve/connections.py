"""Connections: as many as the system lets us have, and none kept that never says what it wants."""

from __future__ import annotations

import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 30.0  # until the first request of a connection is there


class Connection(HttpToolsProtocol):
    """A connection that is closed where its first request does not come."""

    def connection_made(self, transport: Any) -> None:
        """Start to wait."""
        super().connection_made(transport)
        self.deadline = self.loop.call_later(HEADER_SECONDS, self.give_up)

    def on_headers_complete(self) -> None:
        """The request is there."""
        self.deadline.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        self.deadline.cancel()
        super().connection_lost(exc)

    def give_up(self) -> None:
        """Close it."""
        assert self.transport is not None
        self.transport.close()


def raise_limit() -> None:
    """Let this process have as many files and connections open as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
