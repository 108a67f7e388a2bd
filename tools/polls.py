"""How fast a server answers while its worker is busy: python tools/polls.py

Status polls per second over connections that stay open, and the latency of creates that come at a steady pace. The
client runs in this process, beside server and worker on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil

from tests.serving import LONG, TINY, Server, raw

FILM = LONG | {"num_inference_steps": 1000}
WAITING = 300  # jobs that are queued behind the film


class Line:
    """One connection that stays open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, request: bytes) -> int:
        """Return the status of an answer, read to its end."""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        await self.reader.readexactly(length)
        return int(head.split()[1])


async def connect(server: Server) -> Line:
    """Open a connection."""
    host, port = server.url.removeprefix("http://").split(":")
    return Line(*await asyncio.open_connection(host, int(port)))


async def polls(lines: list[Line], request: bytes, seconds: float) -> tuple[float, int]:
    """Return (answers per second, answers) to one request over several connections."""
    until, answered = time.perf_counter() + seconds, 0

    async def go(line: Line) -> None:
        nonlocal answered
        while time.perf_counter() < until:
            if await line.ask(request) != 200:
                raise RuntimeError("a poll failed")
            answered += 1

    began = time.perf_counter()
    await asyncio.gather(*map(go, lines))
    return answered / (time.perf_counter() - began), answered


async def creates(lines: list[Line], count: int, pace: float) -> list[float]:
    """Return the seconds of creates that begin at a steady pace, answered or not."""
    free: asyncio.Queue[Line] = asyncio.Queue()
    for line in lines:
        free.put_nowait(line)

    async def one(due: float) -> float:
        await asyncio.sleep(due - time.perf_counter())
        line = await free.get()
        if await line.ask(raw("POST", "/v1/videos", json.dumps(TINY).encode())) != 200:
            raise RuntimeError("a create failed")
        free.put_nowait(line)
        return time.perf_counter() - due

    began = time.perf_counter()
    return list(await asyncio.gather(*(one(began + index / pace) for index in range(count))))


async def measure(server: Server, options: argparse.Namespace, jobs: dict[str, str]) -> None:
    """Measure and print."""
    lines = [await connect(server) for _ in range(options.connections)]
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    process = psutil.Process(server.process.pid)
    for _ in range(options.rounds):
        for name, job in jobs.items():
            before = sum(process.cpu_times()[:2])
            rate, answered = await polls(lines, raw("GET", f"/v1/videos/{job}"), options.seconds)
            samples[name].append((rate, (sum(process.cpu_times()[:2]) - before) / answered * 1e3))
    print("| status polls | a second: median | least | most | CPU ms of the server each |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, each in samples.items():
        rates, costs = zip(*each, strict=True)
        print(
            f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f} | "
            f"{statistics.median(costs):.2f} |"
        )
    found = sorted(await creates(lines, options.creates, options.pace))
    p99 = found[min(len(found) - 1, round(0.99 * len(found)))]
    print(
        f"\ncreates at {options.pace:g}/s beside a busy worker, ms: median {statistics.median(found) * 1e3:.1f}, "
        f"p99 {p99 * 1e3:.1f}, most {found[-1] * 1e3:.1f} over {len(found)}"
    )


def main() -> int:
    """Start a server, give it a film to make and others that wait, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=16, help="(default: 16)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each sample (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each kind, in turns (default: 5)")
    parser.add_argument("--creates", type=int, default=300, help="(default: 300)")
    parser.add_argument("--pace", type=float, default=20.0, help="creates a second (default: 20)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data", "--grace", "5")
        try:
            jobs = {"completed": server.done(server.create()["id"])["id"], "running": server.create(FILM)["id"]}
            waiting = [server.create(TINY)["id"] for _ in range(WAITING)]
            server.until(lambda: server.video(jobs["running"])["step"] > 0)
            asyncio.run(measure(server, options, jobs | {f"{WAITING}th in the queue": waiting[-1]}))
        finally:
            code = server.stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
