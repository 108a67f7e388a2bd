"""python -m runtime.serve: the HTTP process. It imports no torch, and starts the workers that do."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sqlite3
import sys
import threading
import time
from types import FrameType

import uvicorn

from runtime.serve.api import Api
from runtime.serve.app import make_app
from runtime.serve.connections import Connection, raise_limit
from runtime.serve.health import serve_health
from runtime.serve.jobs import Store
from runtime.serve.logs import start_logging
from runtime.serve.opening import open_store
from runtime.serve.settings import Settings, read_settings
from runtime.serve.supervisor import Supervisor
from runtime.serve.telemetry import start_telemetry
from runtime.serve.webhooks import Webhooks

log = logging.getLogger("runtime.serve")

TIDY_SECONDS = 2.0
WORKERS_SHARE = 0.8  # of the grace time; the rest is for those who are still downloading


class Server(uvicorn.Server):
    """Uvicorn, which answers until the workers have ended, refusing new jobs; told twice to end it does so at once."""

    def __init__(self, config: uvicorn.Config, api: Api, supervisor: Supervisor) -> None:
        super().__init__(config)
        self.api, self.supervisor = api, supervisor

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.api.draining:
            self.supervisor.abandon()
            os._exit(128 + sig)
        self.api.draining = True
        threading.Thread(target=self.drain, daemon=True).start()

    def drain(self) -> None:
        """Let the workers keep checkpoints and end, then the connections."""
        grace, began = self.api.settings.grace, time.monotonic()
        log.info("ending within %.0f s", grace)
        self.supervisor.stop()
        self.supervisor.wait(WORKERS_SHARE * grace)
        self.config.timeout_graceful_shutdown = max(1, int(grace - (time.monotonic() - began)))
        self.should_exit = True


def main() -> int:
    """Serve until told to end; return the exit code."""
    try:
        settings = read_settings()
        start_logging(settings.log)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        store, lock = open_store(settings)
        signer = settings.signer
        hooks = Webhooks(settings.data, settings.webhooks, settings.read_secret()) if settings.webhook_host else None
        store.reclaim()
        listener = listen(settings)
    except (ValueError, OSError, sqlite3.OperationalError) as error:  # the last: the disk is full
        told = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {told}", file=sys.stderr)
        return 2
    raise_limit()
    supervisor = Supervisor(settings, store)
    api = Api(settings, store, supervisor.wake)
    api.ready, api.answer = lambda: bool(supervisor.ready), supervisor.ask
    api.metrics.ready = lambda: len(supervisor.ready)
    api.telemetry = telemetry = start_telemetry()
    api.anchors = None if signer is None else signer.anchor
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        make_app(api), http=Connection, log_config=None, access_log=False, server_header=False, date_header=False,
        timeout_keep_alive=30,
    )  # fmt: skip
    server = Server(config, api, supervisor)
    if settings.health_port is not None:
        serve_health(settings.host, settings.health_port, api.well)
    supervisor.start()
    threading.Thread(target=tidy, args=(store, settings, supervisor.stopping), daemon=True).start()
    if hooks is not None:
        threading.Thread(target=hooks.run, args=(supervisor.stopping,), daemon=True).start()
    names = ", ".join(settings.served)
    print(f"serving {names} on http://{host}:{port} (data in {settings.data})", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        supervisor.stop()
        supervisor.wait(settings.grace)
        if telemetry is not None:
            telemetry.close()
        lock.close()
    return 0


def tidy(store: Store, settings: Settings, stopping: threading.Event) -> None:
    """Remove what deaths have left, what is deleted once nobody can bring it back, and what was kept for its time."""
    store.sweep()
    while not stopping.wait(TIDY_SECONDS):
        try:
            store.purge()
            store.checkpoint()
            if settings.keep:
                store.expire(settings.keep)
        except sqlite3.OperationalError as error:
            log.warning("the store cannot be written: %s", error)


def listen(settings: Settings) -> socket.socket:
    """Return the listening socket; OSError where the address is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}); take another --port"
        ) from error
    listener.listen(2048)
    return listener


if __name__ == "__main__":
    sys.exit(main())
