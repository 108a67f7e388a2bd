"""Load on a started server, by clients that cost little: polls, creates at a steady pace, thousands of creates at once.

What they cost, and what the server does, are CPU seconds of each process: they mean something on a busy machine too.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import selectors
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import psutil

from runtime.serve.connections import raise_limit
from tests.serving import TINY, Server, raw

CREATE = raw("POST", "/v1/videos", json.dumps(TINY).encode())
HEALTH = raw("GET", "/health/live", b"", "connection: close")
LOOK_SECONDS = 0.05  # between two looks at health
PATIENCE = 60.0  # for an answer


@dataclass(frozen=True)
class Polls:
    """What polls came to: answers a second, and CPU milliseconds of each for the server and for the client."""

    rate: float
    server_ms: float
    client_ms: float


@dataclass(frozen=True)
class Flood:
    """What creates at once came to."""

    statuses: dict[str, int]
    seconds: float
    health: list[float]  # seconds of each answer of the health port meanwhile
    cpu: float  # seconds of the server
    memory: tuple[int, int]  # bytes before, and the most


def address(server: Server) -> tuple[str, int]:
    """Return host and port of a server."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def cpu_of(server: Server) -> float:
    """Return the CPU seconds of the HTTP process."""
    return sum(psutil.Process(server.process.pid).cpu_times()[:2])


def poll(server: Server, video_id: str, connections: int, seconds: float) -> Polls:
    """Ask for a video's status over connections that stay open, each as soon as it has its answer."""
    request = raw("GET", f"/v1/videos/{video_id}")
    selector, begun = selectors.DefaultSelector(), dict[int, bytes]()
    lines = [socket.create_connection(address(server)) for _ in range(connections)]
    for line in lines:
        selector.register(line, selectors.EVENT_READ)
        line.sendall(request)
    answered, before, own = 0, cpu_of(server), time.process_time()
    began = time.perf_counter()
    while (now := time.perf_counter()) < began + seconds:
        for key, _ in selector.select(PATIENCE):
            line = key.fileobj
            assert isinstance(line, socket.socket)
            answer = begun.pop(key.fd, b"") + line.recv(2**16)
            if not whole(answer):
                begun[key.fd] = answer
                continue
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"a poll failed: {answer[:200]!r}")
            answered += 1
            line.sendall(request)
    own, server_cpu = time.process_time() - own, cpu_of(server) - before
    for line in lines:
        line.close()
    return Polls(answered / (now - began), server_cpu / answered * 1e3, own / answered * 1e3)


def whole(answer: bytes) -> bool:
    """Tell whether an answer is there to its end."""
    head, end, body = answer.partition(b"\r\n\r\n")
    return bool(end) and len(body) >= int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])


def create_at_pace(server: Server, count: int, pace: float, connections: int) -> list[float]:
    """Return the seconds of creates from their moments, which come at a steady pace, answered or not."""
    return asyncio.run(_create_at_pace(address(server), count, pace, connections))


async def _create_at_pace(place: tuple[str, int], count: int, pace: float, connections: int) -> list[float]:
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(await asyncio.open_connection(*place))

    async def one(due: float) -> float:
        await asyncio.sleep(due - time.perf_counter())
        line = await free.get()
        reader, writer = line
        writer.write(CREATE)
        answer = b""
        while not whole(answer):
            answer += await reader.read(2**16)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"a create failed: {answer[:400]!r}")
        free.put_nowait(line)
        return time.perf_counter() - due

    began = time.perf_counter()
    return list(await asyncio.gather(*(one(began + index / pace) for index in range(count))))


def flood(server: Server, count: int, health_port: int) -> Flood:
    """Send all creates at once, each on a connection of its own and from another process; ask for health meanwhile."""
    process, ended, health = psutil.Process(server.process.pid), threading.Event(), list[float]()
    before = most = process.memory_info().rss
    cpu = cpu_of(server)

    def look() -> None:
        nonlocal most
        while not ended.wait(LOOK_SECONDS):
            health.append(ask_health(health_port))
            most = max(most, process.memory_info().rss)

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(raise_limit).result()
        looking = threading.Thread(target=look)
        looking.start()
        try:
            statuses, seconds = pool.submit(create_at_once, *address(server), count).result()
        finally:
            ended.set()
            looking.join()
    return Flood(statuses, seconds, health, cpu_of(server) - cpu, (before, most))


def ask_health(port: int) -> float:
    """Return the seconds until health answered; infinity where it did not."""
    began = time.perf_counter()
    try:
        with closing(socket.create_connection(("127.0.0.1", port), PATIENCE)) as line:
            line.settimeout(PATIENCE)
            line.sendall(HEALTH)
            answer = line.recv(2**10)
    except OSError:
        answer = b""
    return time.perf_counter() - began if b" 200 " in answer.partition(b"\r\n")[0] else float("inf")


def create_at_once(host: str, port: int, count: int) -> tuple[dict[str, int], float]:
    """Return (how often each status or kind of error, seconds of all) of creates that begin together."""

    async def all_at_once() -> Counter[str]:
        return Counter(await asyncio.gather(*(status_of(host, port) for _ in range(count))))

    began = time.perf_counter()
    return dict(asyncio.run(all_at_once())), time.perf_counter() - began


async def status_of(host: str, port: int) -> str:
    """Return the status that a create is answered with; the kind of error where it is not."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(CREATE)
        line = await reader.readline()
        writer.close()
        return line.split()[1].decode()
    except (OSError, IndexError) as error:
        return type(error).__name__


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])
