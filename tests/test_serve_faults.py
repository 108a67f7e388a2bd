"""Killed, ended, locked, full: what a server of its own promises then."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi")

import uvicorn
from uvicorn.server import ServerState

from runtime.serve import connections, forms
from runtime.serve.errors import ApiError
from runtime.serve.settings import read_settings
from tests.serving import LONG, TINY, Server, frames_of, raw


@pytest.mark.fault(27, 28, 31)
def test_killed_at_any_moment_the_frames_are_the_same(tmp_path: Path) -> None:
    """Both, the worker alone, and an end by SIGTERM, over one job; then the same job undisturbed."""
    server = Server(tmp_path / "data", "--grace", "20")
    film = LONG | {"num_inference_steps": 120}
    try:
        job = server.create(film)["id"]
        server.until(lambda: server.video(job)["step"] >= 8)
        server.kill("both")
        server.start()
        server.until(lambda: server.video(job)["step"] >= 20)
        server.kill("worker")
        server.until(lambda: server.video(job)["attempt"] == 3 and server.video(job)["step"] >= 30)
        assert server.stop() == 0
        server.start()
        found = server.done(job)
        again = server.done(server.create(film)["id"])
        assert (frames_of(server.content(job)) == frames_of(server.content(again["id"]))).all()
        assert found["attempt"] == 4 and again["attempt"] == 1
        made = found["receipt"]["stages"]["denoise/step"]["calls"]
        assert made < 120, "it went on from a checkpoint, not from the start"
    finally:
        assert server.stop() == 0


def test_keys_and_a_full_queue(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one:0123456789abcdef\ntwo:fedcba9876543210\n")
    server = Server(tmp_path / "data", "--api-key", str(keys), "--max-queue", "2")
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("0123456789abcdef", "fedcba9876543210"))
    try:
        for bad in ({}, {"Authorization": "Bearer 0123456789abcdeF"}, {"Authorization": "0123"}):
            answer = server.http.post("/v1/videos", json=TINY, headers=bad)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        jobs = [server.create(LONG, headers=one)["id"] for _ in range(2)]
        full = server.http.post("/v1/videos", json=TINY, headers=two)
        assert full.status_code == 429 and 1 <= int(full.headers["retry-after"]) <= 120
        assert server.http.get(f"/v1/videos/{jobs[0]}", headers=two).status_code == 404
        assert server.http.get("/v1/videos", headers=two).json()["data"] == []
        for job in jobs:
            server.http.delete(f"/v1/videos/{job}", headers=one)
        assert "0123456789abcdef" not in server.log()
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ('workers = "two"', "workers is 'two'; legal: a whole number from 1"),
        ("workers = 0", "workers is 0"),
        ("port = 99999", "to 65535"),
        ("grace = nan", "grace is nan"),
        ("keep = -1", "keep is -1"),
        ("max_queue = true", "max_queue is True"),
        ("host = 5", "host is 5; legal: text"),
        ("data = 5", "data is 5; legal: the name"),
        ("model = 7", "model is 7; legal: text"),
        ("model = [7]", "legal: text, or a list"),
        ('insecure = "no"', "insecure is 'no'; legal: true"),
        ('log = "loud"', "legal: text, json"),
        ("moderation = 3", "moderation is 3"),
        ("port = ", "is no TOML"),
        ("\xff\xfe", "is no TOML"),
    ],
)
def test_settings_that_mean_nothing(tmp_path: Path, told: str, sentence: str) -> None:
    (tmp_path / "serve.toml").write_bytes(told.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_settings(["--config", str(tmp_path / "serve.toml")])


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--insecure"):
        read_settings(["--host", "0.0.0.0"])
    assert read_settings(["--host", "0.0.0.0", "--insecure"]).insecure
    config = tmp_path / "serve.toml"
    config.write_text('port = 9\nmodel = ["demo", "other=demo"]\nmax-queue = 3\n')
    settings = read_settings(["--config", str(config), "--port", "10"])
    assert (settings.port, settings.model, settings.max_queue) == (10, ("demo", "other=demo"), 3)
    config.write_text("prot = 9\n")
    with pytest.raises(ValueError, match="prot"):
        read_settings(["--config", str(config)])
    for content in ("", "short:abc\n"):
        config.write_text(content)
        with pytest.raises(ValueError, match="key"):
            read_settings(["--api-key", str(config)])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("faults") / "data")
    yield started
    assert started.stop() == 0


def connect(server: Server, content: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    client.sendall(content)
    return client


@pytest.mark.fault(22)
def test_a_client_that_goes_away_while_it_creates(server: Server) -> None:
    """Half a body leaves nothing; a whole one whose answer nobody reads is a job that can be found."""
    folders = set((server.data / "jobs").iterdir())
    part = b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="x.png"\r\n\r\n' + b"x" * 10_000
    form = "multipart/form-data; boundary=b"
    client = connect(server, raw("POST", "/v1/videos", part, "content-length: 1000000", kind=form))
    server.until(lambda: set((server.data / "jobs").iterdir()) > folders)
    client.close()
    server.until(lambda: set((server.data / "jobs").iterdir()) == folders)
    body = json.dumps(TINY | {"seed": 77}).encode()
    connect(server, raw("POST", "/v1/videos", body)).close()
    found = server.until(lambda: server.http.get("/v1/videos").json()["data"])
    assert [each["seed"] for each in found] == [77]
    server.done(found[0]["id"])


@pytest.mark.fault(20)
def test_a_body_that_stops_half_way_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a deadline between two chunks; 500 of them are a drill."""
    monkeypatch.setattr(forms, "IDLE_SECONDS", 0.05)

    class Half:
        async def stream(self) -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(3600)

    async def read(request: Any) -> None:
        async for _ in forms.limited(request, 100):
            pass

    with pytest.raises(ApiError, match="nothing of the body came") as caught:
        asyncio.run(read(Half()))
    assert caught.value.status == 408


@pytest.mark.fault(20)
def test_a_connection_that_asks_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a deadline for the first request, on the event loop that servers run on."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(app, http=connections.Connection, lifespan="off", log_config=None)

    async def visit() -> tuple[bytes, bytes]:
        loop, served = asyncio.get_running_loop(), ServerState()
        listener = await loop.create_server(
            lambda: connections.Connection(config=config, server_state=served, app_state={}), "127.0.0.1"
        )
        address = listener.sockets[0].getsockname()
        silent, _ = await asyncio.open_connection(*address)
        asking, writer = await asyncio.open_connection(*address)
        writer.write(raw("GET", "/"))
        ended = await silent.read()
        writer.write(raw("GET", "/"))  # whoever has asked once is kept
        answers = await asking.readuntil(b"\r\n\r\n") + await asking.readuntil(b"\r\n\r\n")
        listener.close()
        return ended, answers

    config.load()
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        ended, answers = runner.run(asyncio.wait_for(visit(), 20))
    assert ended == b"" and answers.count(b"200 OK") == 2


@pytest.mark.fault(23)
def test_downloads_that_are_broken_off_leave_nothing_open(server: Server) -> None:
    """200 of them are a drill."""
    job = server.done(server.create()["id"])["id"]
    process = psutil.Process(server.process.pid)

    def break_off(count: int) -> None:
        for _ in range(count):
            client = connect(server, raw("GET", f"/v1/videos/{job}/content"))
            client.recv(10)
            client.close()

    break_off(3)
    server.until(lambda: not [each for each in process.open_files() if "output-" in each.path])
    before = process.num_fds()
    break_off(30)
    server.until(lambda: process.num_fds() <= before, 20)


@pytest.mark.fault(26)
def test_a_deleted_job_gives_its_memory_back(server: Server) -> None:
    """A film of many more pixels than what came before it; memory is as before within 64 MiB."""
    server.done(server.create()["id"])
    (worker,) = server.workers()
    before = psutil.Process(worker).memory_info().rss
    job = server.create(LONG | {"size": "320x192"})["id"]
    server.until(lambda: server.video(job)["step"] > 0)
    assert server.http.delete(f"/v1/videos/{job}").status_code == 200
    server.until(lambda: not (server.data / "jobs" / job).exists())
    server.until(lambda: psutil.Process(worker).memory_info().rss < before + 2**26, 20)
    assert server.workers() == [worker]
