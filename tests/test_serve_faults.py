"""Killed, ended, locked, full: what a server of its own promises then."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from runtime.serve.settings import read_settings
from tests.serving import LONG, TINY, Server, frames_of


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
