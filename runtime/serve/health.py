"""Health on a port and in a thread of its own: it answers at once, however many requests the others have to answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def serve_health(host: str, port: int, ready: Callable[[], bool]) -> ThreadingHTTPServer:
    """Answer /health/live and /health/ready from now on; OSError where the address is taken."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # seconds for a request to come

        def do_GET(self) -> None:
            """Answer 200, 503 where nothing is ready, 404 for any other path."""
            if self.path == "/health/live":
                self.tell(200, "live")
            elif self.path == "/health/ready":
                self.tell(*((200, "ready") if ready() else (503, "not ready")))
            else:
                self.tell(404, "there are only /health/live and /health/ready here")

        def tell(self, status: int, word: str) -> None:
            """Write an answer."""
            body = json.dumps({"status": word}).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: probes come every second."""

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
