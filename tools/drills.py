"""The drills of tools/drill.py: what takes too long, or too many connections, for a test."""

from __future__ import annotations

import random
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

from runtime.serve.database import ACTIVE
from runtime.serve.jobs import Store
from tests.serving import LONG, Server, frames_of, raw
from tools.load import flood, free_port

JOB = {"prompt": "a red ball", "num_frames": 9, "num_inference_steps": 12}
SEEDS = 3
MOST_SECONDS = 1.5  # from a start to the next kill
STEP_EVERY = 3  # kills
HEALTH_SECONDS = 1.5


@dataclass(frozen=True)
class Sizes:
    """How large the drills are."""

    kills: int = 50
    creates: int = 10_000
    halves: int = 500
    downloads: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Drill:
    """One drill: the faults that it proves, and what runs it: sizes -> (what was found, whether it is as promised)."""

    name: str
    rows: tuple[int, ...]
    run: Callable[[Sizes], tuple[str, bool]]


def kills(sizes: Sizes) -> tuple[str, bool]:
    """Kill worker, server or both at random moments of jobs that keep coming; then compare all their frames."""
    moments = random.Random(sizes.seed)
    with tempfile.TemporaryDirectory() as folder:
        wanted = undisturbed(Path(folder) / "calm")
        server = Server(Path(folder) / "drill")
        jobs, states = [], Counter[str]()
        for index in range(sizes.kills):
            if index % 2 == 0:
                jobs.append(server.create(JOB | {"seed": index % SEEDS})["id"])
            if index % STEP_EVERY == 0:
                further(server, jobs)
            time.sleep(moments.uniform(0.0, MOST_SECONDS))
            which = moments.choice(("worker", "server", "both"))
            states[phase(server, jobs)] += 1
            server.kill(which)
            if which != "worker":
                server.start()
        found = [server.done(job) for job in jobs]
        different = sum(
            not np.array_equal(frames_of(server.content(job)), wanted[video["seed"]])
            for job, video in zip(jobs, found, strict=True)
        )
        listed = Counter(each["id"] for each in server.http.get("/v1/videos", params={"limit": 100}).json()["data"])
        results = [len(list((server.files / "jobs" / job).glob("output-*.mp4"))) for job in jobs]
        code = server.stop()
    lost, doubled = len(set(jobs) - set(listed)), sum(count != 1 for count in results)
    moment = ", ".join(f"{name} {count}" for name, count in sorted(states.items()))
    told = (
        f"{sizes.kills} kills ({moment}), {len(jobs)} jobs: {lost} lost, {doubled} without exactly one result, "
        f"{different} with other frames, at most {max(video['attempt'] for video in found)} attempts, exit code {code}"
    )
    return told, not (lost or doubled or different or code)


def first(server: Server, jobs: list[str]) -> dict[str, Any]:
    """Return the job that is being made, or comes next; the last one where all are done."""
    unfinished = (video for job in jobs if (video := server.video(job))["status"] in ACTIVE)
    return next(unfinished, None) or server.video(jobs[-1])


def further(server: Server, jobs: list[str]) -> None:
    """Wait for one more step: a job that kills its workers before each is given up."""
    before = first(server, jobs)

    def has_gone_on() -> bool:
        now = first(server, jobs)
        return now["status"] not in ACTIVE or (now["id"], now["step"]) != (before["id"], before["step"])

    server.until(has_gone_on)


def phase(server: Server, jobs: list[str]) -> str:
    """Return what is happening to the job that comes first."""
    try:
        video = first(server, jobs)
    except httpx2.HTTPError:
        return "unknown"
    if video["status"] != "in_progress":
        return str(video["status"])
    return "text" if video["step"] == 0 else "steps" if video["progress"] < 90 else "frames"


def undisturbed(data: Path) -> dict[int, Any]:
    """Return the frames of each seed's job on a server that is left alone."""
    server = Server(data)
    made = {seed: server.create(JOB | {"seed": seed})["id"] for seed in range(SEEDS)}
    frames = {}
    for seed, job in made.items():
        server.done(job)
        frames[seed] = frames_of(server.content(job))
    server.stop()
    return frames


def creates(sizes: Sizes) -> tuple[str, bool]:
    """Send all creates at once, each on a connection of its own, while a job runs and health is asked."""
    most = 100
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        server = Server(Path(folder) / "data", "--max-queue", str(most), "--health-port", str(port))
        try:
            server.create(LONG)
            found = flood(server, sizes.creates, port)
            kept = sum(Store(server.data).counts().values())
        finally:
            server.kill("both")
    taken, refused = found.statuses.get("200", 0), found.statuses.get("429", 0)
    unforeseen = {name: count for name, count in found.statuses.items() if name not in ("200", "429")}
    before, peak = found.memory
    told = (
        f"{sizes.creates} creates in {found.seconds:.1f} s: {taken} taken, {refused} refused, others "
        f"{unforeseen or 'none'}; health at most {max(found.health):.2f} s over {len(found.health)} samples; memory "
        f"{before / 2**20:.0f} to at most {peak / 2**20:.0f} MiB"
    )
    good = not unforeseen and taken == kept - 1 >= most - 1  # more where jobs were done meanwhile
    return told, good and max(found.health) < HEALTH_SECONDS and peak - before < 2**29


def halves(sizes: Sizes) -> tuple[str, bool]:
    """Open connections whose bodies stop half way; all must be ended, and others served meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data")
        host, port = server.url.removeprefix("http://").split(":")
        half = raw("POST", "/v1/videos", b"{", "content-length: 100")
        opened = []
        try:
            for _ in range(sizes.halves):
                opened.append(socket.create_connection((host, int(port))))
                opened[-1].sendall(half)
            began = time.monotonic()
            made = server.done(server.create()["id"])["status"]
            took = time.monotonic() - began
            began, ended = time.monotonic(), Counter[str]()
            for each in opened:
                each.settimeout(max(0.1, 60 - (time.monotonic() - began)))
                with suppress(OSError):
                    ended[(each.recv(100).split() or [b"", b"closed"])[1].decode()] += 1
                each.close()
            seconds = time.monotonic() - began
            left = len(list((server.data / "jobs").iterdir()))
        finally:
            server.stop()
    told = (
        f"{sizes.halves} halves: a job meanwhile is {made} after {took:.1f} s; ended within {seconds:.0f} s: "
        f"{dict(ended)}; folders left {left - 1}"
    )
    return told, made == "completed" and ended["408"] == sizes.halves and left == 1


def downloads(sizes: Sizes) -> tuple[str, bool]:
    """Begin downloads and break them off; descriptors and memory must be as before."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data")
        try:
            job = server.done(server.create()["id"])["id"]
            (path,) = (server.data / "jobs" / job).glob("output-*.mp4")
            with path.open("ab") as handle:
                handle.write(b"\0" * 2**24)  # more than a socket takes at once
            process = psutil.Process(server.process.pid)
            break_off(server, job, 20)
            time.sleep(1)
            before, memory = process.num_fds(), process.memory_info().rss
            break_off(server, job, sizes.downloads)
            server.until(lambda: process.num_fds() <= before, 30)
            after, grown = process.num_fds(), process.memory_info().rss - memory
        finally:
            code = server.stop()
    told = (
        f"{sizes.downloads} broken off: descriptors {before} to {after}, memory {grown / 2**20:+.1f} MiB, exit {code}"
    )
    return told, after <= before and grown < 16 * 2**20 and code == 0


def break_off(server: Server, job: str, count: int) -> None:
    """Read the first bytes of a video and go away, so often."""
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(count):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(raw("GET", f"/v1/videos/{job}/content"))
            client.recv(1000)


DRILLS = (
    Drill("kills", (27, 28, 30), kills),
    Drill("creates", (19,), creates),
    Drill("halves", (20,), halves),
    Drill("downloads", (23,), downloads),
)
