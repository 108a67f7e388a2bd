"""Load on a started server: arrivals at random moments that do not wait for answers, as those of many people.

An open loop shows what a closed one hides: while the server is slow, requests keep coming and queue.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.machine import describe, keep, results_file

PERCENTILES = (50, 95, 99)
POLL = 0.05  # seconds between two looks at a request: how fine its times are
ENDED = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Outcome:
    """One request: seconds from its moment of arrival; `error` where it made no video."""

    arrival: float
    queued: float | None = None  # until it was begun
    total: float | None = None  # until it was done
    error: str = ""


def add_command(commands: Any) -> None:
    """Add `serve` to the command line."""
    parser = commands.add_parser("serve", help="open-loop load on a started server")
    parser.set_defaults(run=run)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default http://127.0.0.1:8000)")
    parser.add_argument("--key", help="its API key (default: the environment's DIT_RUNTIME_API_KEY)")
    parser.add_argument("--rates", type=_rates, default=[0.2, 0.5, 1.0], help="arrivals per second (default 0.2,0.5,1)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals at each rate (default 30)")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds within which a video counts for goodput")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for the last ones (default 120)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals' moments (default 0)")
    parser.add_argument("--size", default="64x64", help="pixels (default 64x64)")
    parser.add_argument("--frames", type=int, default=5, help="per video (default 5)")
    parser.add_argument("--steps", type=int, default=5, help="per video (default 5)")
    parser.add_argument("--json", type=Path, help="file of results (default: benchmarks/results/<device>/"
                        "<date>-<commit>.json); the plot lies beside it")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Load the server at each rate, keep every request, print the table."""
    import torch

    from runtime.client import Client

    client = Client(args.url, key=args.key or os.environ.get("DIT_RUNTIME_API_KEY"))
    asked = {"size": args.size, "num_frames": args.frames, "num_inference_steps": args.steps}
    record: dict[str, Any] = {
        "benchmark": "serve", "machine": describe(torch.device("cpu")), "asked": asked, "deadline": args.deadline,
        "rates": [],
    }  # fmt: skip
    file = args.json or results_file(record["machine"])
    for rate in args.rates:
        moments = list(arrivals(rate, args.seconds, args.seed))
        print(f"{rate:g} per second: {len(moments)} requests", file=sys.stderr, flush=True)

        def make(number: int, rate: float = rate) -> Iterator[str]:
            return statuses(client, f"a red ball, rate {rate:g}, take {number}", asked, args.patience)

        outcomes = load(moments, make)
        record["rates"].append({"rate": rate, "seconds_of_arrivals": args.seconds, **summary(outcomes, args.deadline),
                                "requests": [asdict(each) for each in outcomes]})  # fmt: skip
        keep(record, file)
    print(table(record))
    curves = {
        f"{what} p{percent}": [(each["rate"], each[what][f"p{percent}"]) for each in record["rates"] if each[what]]
        for what in ("queueing", "total")
        for percent in PERCENTILES
    }
    picture = plot.lines(f"{args.url}: seconds over arrivals", "arrivals per second", curves)
    print(f"\nsamples: {file}\nplot: {plot.save(file.with_suffix('.svg'), picture)}", file=sys.stderr)


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Yield the moments of a Poisson process of so many arrivals per second, until `seconds`."""
    draw, moment = random.Random(seed), 0.0
    while (moment := moment + draw.expovariate(rate)) < seconds:
        yield moment


def statuses(client: Any, prompt: str, asked: dict[str, Any], patience: float) -> Iterator[str]:
    """Create a video and yield its status whenever asked for, until it has ended; RuntimeError after `patience`."""
    end = time.monotonic() + patience
    job = client.create(prompt, **asked)
    while True:
        yield job["status"]
        if job["status"] in ENDED:
            return
        if time.monotonic() > end:
            raise RuntimeError(f"no end within {patience:g} s")
        time.sleep(POLL)
        job = client.get(job["id"])


def load(moments: Sequence[float], make: Callable[[int], Iterator[str]]) -> list[Outcome]:
    """Begin a request at each moment, whatever became of those before, and return what became of all."""
    if not moments:
        return []
    began = time.monotonic()
    with ThreadPoolExecutor(len(moments)) as pool:  # none waits for another
        return list(pool.map(lambda item: follow(began, item[1], item[0], make), enumerate(moments)))


def follow(began: float, moment: float, number: int, make: Callable[[int], Iterator[str]]) -> Outcome:
    """Wait for a request's moment, make it, and time its way."""
    time.sleep(max(began + moment - time.monotonic(), 0))
    begun = None
    status = ""
    try:
        for status in make(number):
            if begun is None and status != "queued":
                begun = time.monotonic() - began - moment
    except Exception as error:  # of the server or the way to it: it is what is measured
        return Outcome(moment, error=(str(error).splitlines() or [""])[0] or type(error).__name__)
    if status != "completed":
        return Outcome(moment, begun, error=status)
    return Outcome(moment, begun, time.monotonic() - began - moment)


def summary(outcomes: Sequence[Outcome], deadline: float) -> dict[str, Any]:
    """Return percentiles of queueing and total, goodput (videos within the deadline per second), and failures."""
    done = [each for each in outcomes if each.total is not None]
    span = max((each.arrival + (each.total or 0.0) for each in outcomes), default=0.0)
    good = sum(each.total is not None and each.total <= deadline for each in outcomes)
    return {
        "queueing": percentiles([each.queued for each in done if each.queued is not None]),
        "total": percentiles([each.total for each in done if each.total is not None]),
        "goodput": good / span if span else 0.0,
        "failed": len(outcomes) - len(done),
    }


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99, between samples by interpolation; nothing for nothing."""
    if len(samples) < 2:
        return {f"p{percent}": samples[0] for percent in PERCENTILES} if samples else {}
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return {f"p{percent}": cuts[percent - 1] for percent in PERCENTILES}


def table(record: dict[str, Any]) -> str:
    """Return the rates as Markdown."""
    asked = record["asked"]
    title = f"{asked['size']}, {asked['num_frames']} frames, {asked['num_inference_steps']} steps"
    names = [f"{what} p{percent}" for what in ("queueing", "total") for percent in PERCENTILES]
    head = ["arrivals per second", "requests", *names, f"goodput within {record['deadline']:g} s", "failed"]
    lines = [f"**{title}**", "", _row(head), _row(["---:"] * len(head))]
    for each in record["rates"]:
        found = [
            f"{each[what][f'p{percent}']:.2f} s" if each[what] else "-"
            for what in ("queueing", "total")
            for percent in PERCENTILES
        ]
        lines.append(
            _row(
                [
                    f"{each['rate']:g}",
                    str(len(each["requests"])),
                    *found,
                    f"{each['goodput']:.2f}/s",
                    str(each["failed"]),
                ]
            )
        )
    return "\n".join([*lines, "", "Seconds count from a request's moment of arrival; arrivals wait for no answer."])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rates(given: str) -> list[float]:
    try:
        rates = [float(rate) for rate in given.split(",")]
    except ValueError:
        rates = [0.0]
    if min(rates) <= 0:
        raise argparse.ArgumentTypeError(f"{given!r}: legal are numbers above 0, joined by commas")
    return rates
