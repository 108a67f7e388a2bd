"""Workers that hang, die, or run out of memory, and ends by signal: what a server promises then."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi")

from runtime.serve.watchdog import SETTING_UP, TIMES, Pulse
from tests.serving import LONG, TINY, Server, raw

SLOW = TINY | {"num_inference_steps": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "serve.toml").write_text("hang = 2\n")
    started = Server(folder / "data", "--config", str(folder / "serve.toml"), faulty=True)
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def wanted(server: Server) -> bytes:
    """The file of a job that nothing happens to."""
    return server.content(server.done(server.create(SLOW)["id"])["id"])


def make(server: Server, prompt: str, status: str = "completed") -> dict[str, Any]:
    return server.done(server.create(SLOW | {"prompt": prompt})["id"], status)


@pytest.mark.fault(28, 35)
@pytest.mark.parametrize("kind", ["hang", "die", "lost"])
def test_a_worker_that_fails_once_is_made_good(server: Server, kind: str) -> None:
    """The job goes on in another process."""
    before = server.workers()
    found = make(server, f"{kind} once")
    assert found["attempt"] == 2 and not set(before) & set(server.workers())


@pytest.mark.fault(28, 35)
@pytest.mark.parametrize(("kind", "code", "most"), [("hang", "worker_hung", 2), ("die", "worker_lost", 3)])
def test_a_job_that_kills_its_workers_is_given_up(server: Server, kind: str, code: str, most: int) -> None:
    found = make(server, kind, "failed")
    assert found["error"]["code"] == code and found["attempt"] == most
    assert make(server, "a red ball")["attempt"] == 1, "others go on"


@pytest.mark.fault(35)
def test_a_hung_worker_says_where_it_stands(server: Server) -> None:
    length = len(server.log())
    make(server, "hang once")
    told = server.log()[length:]
    assert "is killed" in told and "faulty.py" in told and "in fail" in told


@pytest.mark.fault(35)
def test_out_of_memory_is_tried_once_more_with_less(server: Server) -> None:
    """The second try streams its weights, and gives the same frames as one that had the memory."""
    before = server.workers()
    found = make(server, "memory once")
    assert found["attempt"] == 1 and server.workers() == before
    assert found["receipt"]["offload"] and "goes on with weights" in server.log()


@pytest.mark.fault(35)
def test_out_of_memory_for_good_fails_the_job_and_restarts_the_worker(server: Server) -> None:
    before = server.workers()
    found = make(server, "memory", "failed")
    assert found["error"]["code"] == "out_of_memory" and found["attempt"] == 1
    assert make(server, "a red ball")["status"] == "completed" and server.workers() != before


@pytest.mark.fault(35)
def test_a_frozen_worker_does_not_freeze_the_server(server: Server) -> None:
    """Stopped whole, it cannot even write where it stands; the server answers, is not ready, and has another soon."""
    job = server.create(LONG)["id"]
    server.until(lambda: server.video(job)["step"] > 2)
    (frozen,) = server.workers()
    os.kill(frozen, signal.SIGSTOP)
    server.until(lambda: server.http.get("/health/ready").status_code == 503)
    assert server.http.get("/health/live").status_code == 200
    server.until(lambda: server.http.get("/health/ready").status_code == 200)
    assert server.workers() != [frozen]
    server.http.delete(f"/v1/videos/{job}")


def test_the_pulse() -> None:
    """Silence counts only while it works, before the first step more of it is allowed, and slow steps allow more."""
    pulse, now = Pulse(60.0), 0.0
    pulse.hear("ready", now)
    assert not pulse.hung(now + 1e6)
    pulse.hear("job", now)
    assert not pulse.hung(now + TIMES * 60) and pulse.hung(now + TIMES * 60 + 1)
    for _ in range(5):
        now += 2.0
        pulse.hear("step", now)
    assert not pulse.hung(now + 60) and pulse.hung(now + 61)
    for _ in range(20):
        now += 30.0
        pulse.hear("step", now)
    assert not pulse.hung(now + 300) and pulse.hung(now + 301)
    pulse.hear("idle", now)
    assert not pulse.hung(now + 1e6)


def test_the_first_step_is_waited_for_as_it_is_foreseen() -> None:
    """At least some time for libraries and weights; many times what is foreseen; and each job has its own."""
    for foreseen, limit in ((0.5, SETTING_UP * 60), (3600.0, TIMES * 3600)):
        pulse = Pulse(60.0)
        pulse.hear("job", 0.0)
        pulse.hear(f"first {foreseen:.3f}", 1.0)
        assert not pulse.hung(1.0 + limit) and pulse.hung(2.0 + limit)
        pulse.hear("step", 10.0)
        assert pulse.limit() == 90.0, "the pause before it counts"
        pulse.hear("idle", 11.0)
        pulse.hear("job", 12.0)
        assert pulse.limit() == TIMES * 60, "nothing is foreseen of the next one yet"


@pytest.mark.fault(31)
def test_told_to_end_it_refuses_new_jobs_until_it_has_ended(tmp_path: Path) -> None:
    """Health and status still answer, the running job is given back, and no job is marked cancelled."""
    server = Server(tmp_path / "data")
    job = server.create(LONG)["id"]
    waiting = server.create(LONG)["id"]
    server.until(lambda: server.video(job)["step"] > 2)
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)  # it takes its time to end
    server.process.terminate()
    server.until(lambda: server.http.get("/health/ready").status_code == 503)
    answer = server.http.post("/v1/videos", json=TINY)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down", answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert server.video(job)["status"] == "in_progress"
    os.kill(worker, signal.SIGCONT)
    assert server.process.wait(40) == 0
    server.start()
    try:
        assert server.video(waiting)["status"] in ("queued", "in_progress")
        found = server.until(lambda: (seen := server.video(job))["attempt"] == 2 and seen)
        assert found["status"] == "in_progress" and found["step"] > 2
        for each in (job, waiting):
            server.http.delete(f"/v1/videos/{each}")
    finally:
        assert server.stop() == 0


@pytest.mark.fault(31)
def test_a_slow_reader_does_not_keep_it_from_ending_and_a_second_signal_ends_it_now(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", "--grace", "3")
    job = server.done(server.create()["id"])["id"]
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.sendall(raw("GET", f"/v1/videos/{job}/content") + b"POST /v1/videos HTTP/1.1\r\n")
        assert server.stop(seconds=30) == 0, "it waits no longer than its grace time"
    server.start()
    server.create(LONG)
    (worker,) = server.workers()
    killed = psutil.Process(worker)
    os.kill(worker, signal.SIGSTOP)
    server.process.terminate()
    server.until(lambda: server.http.get("/health/ready").status_code == 503)
    threading.Timer(0.05, server.process.terminate).start()
    assert server.process.wait(2) == 128 + signal.SIGTERM
    psutil.wait_procs([killed], timeout=20)
    assert not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE
    server.start()
    assert server.stop() == 0
