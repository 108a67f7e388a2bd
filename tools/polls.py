"""How fast a server answers, and how true its forecasts are: python tools/polls.py

Status polls over connections that stay open, with the worker idle and busy; creates at a steady pace beside a busy
worker; thousands of creates at once, with health asked meanwhile; and jobs whose end was foretold. Client, server and
worker share the machine. One table is printed, and kept with every sample in benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.pop(0)  # tools/, whose profile.py would hide Python's own
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.machine import describe, keep, results_file
from tests.serving import LONG, TINY, Server
from tools.load import create_at_pace, flood, free_port, poll

FILM = LONG | {"num_inference_steps": 1000}
WAITING = 300  # jobs that are queued behind the film
KINDS = (TINY, TINY | {"size": "96x64", "num_frames": 9, "num_inference_steps": 12}, LONG | {"num_inference_steps": 20})
WITHIN = 0.25  # of the truth

Rows = list[tuple[str, str, str]]  # what was measured, figure, more about it


def polls(server: Server, options: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Ask for a completed job while the worker is idle; then for one that runs, waits, or is completed."""
    completed = server.done(server.create()["id"])["id"]
    idle = {"completed, worker idle": completed}
    samples = {name: [] for name in idle}
    for _ in range(options.rounds):
        samples["completed, worker idle"].append(poll(server, completed, options.connections, options.seconds))
    running = server.create(FILM)["id"]
    waiting = [server.create(TINY)["id"] for _ in range(WAITING)]
    server.until(lambda: server.video(running)["step"] > 0)
    jobs = {"completed": completed, "running": running, f"{WAITING}th in the queue": waiting[-1]}
    samples |= {name: [] for name in jobs}
    for _ in range(options.rounds):
        for name, job in jobs.items():
            samples[name].append(poll(server, job, options.connections, options.seconds))
    rows = []
    for name, each in samples.items():
        rates = [sample.rate for sample in each]
        costs = (statistics.median(sample.server_ms for sample in each), statistics.median(s.client_ms for s in each))
        told = f"{min(rates):.0f} to {max(rates):.0f}; CPU ms each: server {costs[0]:.2f}, client {costs[1]:.2f}"
        rows.append((f"status polls ({name})", f"{statistics.median(rates):.0f}/s", told))
    return rows, {"polls": {name: [asdict(sample) for sample in each] for name, each in samples.items()}}


def creates(server: Server, options: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Create at a steady pace while the worker makes a film."""
    found = create_at_pace(server, options.creates, options.pace, options.connections)
    cuts = statistics.quantiles(found, n=100, method="inclusive")
    told = f"median {cuts[49] * 1e3:.1f}, most {max(found) * 1e3:.1f}, over {len(found)} at {options.pace:g}/s"
    return [("creates beside a busy worker, p99", f"{cuts[98] * 1e3:.1f} ms", told)], {"creates": found}


def creates_at_once(folder: Path, options: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Send thousands of creates at once to a server of 100 places, and look at its health port."""
    port = free_port()
    server = Server(folder, "--max-queue", "100", "--health-port", str(port))
    try:
        server.create(FILM)
        found = flood(server, options.flood, port)
    finally:
        server.kill("both")
    told = (
        f"{len(found.health)} looks in {found.seconds:.1f} s; answers {found.statuses}; CPU ms of the server each "
        f"{found.cpu / options.flood * 1e3:.2f}; memory {found.memory[0] / 2**20:.0f} to at most "
        f"{found.memory[1] / 2**20:.0f} MiB"
    )
    return [(f"health under {options.flood} creates at once", f"at most {max(found.health):.2f} s", told)], {
        "flood": asdict(found)
    }


def forecasts(folder: Path, options: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Queue jobs of three sizes, read when each will be done, and see when it is; one of each was made before."""
    server = Server(folder)
    found = []
    try:
        for kind in KINDS * 2:
            server.done(server.create(kind | {"seed": len(found)})["id"])
        jobs = [server.create(KINDS[index % 3] | {"seed": index})["id"] for index in range(options.jobs)]
        server.until(lambda: all(server.video(job).get("eta_seconds", 0) is not None for job in jobs))
        told = {}
        for job in jobs:
            video = server.video(job)
            if video["status"] in ("queued", "in_progress"):
                told[job] = (time.monotonic(), video["eta_seconds"])
        for job, (asked, eta) in told.items():
            server.done(job)
            found.append({"predicted": eta, "taken": time.monotonic() - asked})
    finally:
        server.stop()
    errors = [each["predicted"] / each["taken"] - 1 for each in found]
    good = sum(abs(error) <= WITHIN for error in errors)
    told = f"errors {min(errors):+.0%} to {max(errors):+.0%}, median {statistics.median(errors):+.0%}"
    more = ", ".join(f"{each['predicted']:.1f}/{each['taken']:.1f}" for each in found)
    row = (f"forecasts within {WITHIN:.0%} of the truth", f"{good} of {len(errors)}", f"{told}; s told/taken: {more}")
    return [row], {"forecasts": found}


def main() -> int:
    """Measure all, print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=16, help="(default: 16)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each sample of polls (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each kind, in turns (default: 3)")
    parser.add_argument("--creates", type=int, default=400, help="(default: 400)")
    parser.add_argument("--pace", type=float, default=20.0, help="creates a second (default: 20)")
    parser.add_argument("--flood", type=int, default=10_000, help="creates at once (default: 10,000)")
    parser.add_argument("--jobs", type=int, default=18, help="whose ends are foretold (default: 18)")
    parser.add_argument("--json", type=Path, help="file (default: benchmarks/results/<device>/<date>-<commit>.json)")
    options = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "polls", "machine": describe(torch.device("cpu"))}
    rows: Rows = []
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name) / "polls", "--max-queue", "1000", "--grace", "5")
        try:
            for measure in (polls, creates):
                more, samples = measure(server, options)
                rows, record = rows + more, record | samples
        finally:
            server.kill("both")
        for folder, part in (("flood", creates_at_once), ("forecasts", forecasts)):
            more, samples = part(Path(name) / folder, options)
            rows, record = rows + more, record | samples
    table = ["| what | found | more |", "| --- | ---: | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    print("\n".join(table))
    file = options.json or results_file(record["machine"])
    keep(record | {"table": table}, file)
    print(f"\nsamples: {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
