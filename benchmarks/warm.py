"""Warm start: the first request after `warmup` beside the tenth, each time in a new process.

The tenth is the median of the fifth to the tenth, since one request alone is as noisy as the machine; on a CPU seconds
of the process count as well, which what else runs there does not disturb.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, keep, results_file
from benchmarks.measure import fresh_process

REQUESTS = 10
STEADY = 5  # of the last ones, whose median stands for the tenth
BAR = 1.1


def add_command(commands: Any) -> None:
    """Add `warm` to the command line."""
    parser = commands.add_parser("warm", help="the first request beside the tenth, with and without a warm start")
    parser.set_defaults(run=run)
    parser.add_argument("--model", default="demo", help="demo (default), a folder or a published name")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    parser.add_argument("--engine", default="eager", help="eager (default), cuda_graph, inductor")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default 5)")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: as many as PyTorch takes)")
    parser.add_argument("--json", type=Path, help="file of results (default: benchmarks/results/<device>/"
                        "<date>-<commit>.json)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, write the samples as JSON and print the table; return 1 where a warm start misses the bar."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    machine, kinds = describe(torch.device(args.device)), ("warm", "cold")
    samples: dict[str, list[dict[str, list[float]]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        os.environ["DIT_RUNTIME_CACHE"] = scratch
        for _ in range(args.repeats):
            for kind in kinds:  # in turns, so that what disturbs meets both
                how = args.model, args.device, args.engine, kind == "warm", torch.get_num_threads()
                samples[kind].append(fresh_process(requests, *how))
    found = {name: {kind: [each[name] for each in samples[kind]] for kind in kinds} for name in ("seconds", "cpu")}
    file = args.json or results_file(machine)
    keep({"benchmark": "warm", "machine": machine, "model": args.model, "engine": args.engine, **found}, file)
    print(table(found))
    return int(first_to_tenth(found["seconds"]["warm"]) > BAR)


def first_to_tenth(runs: list[list[float]]) -> float:
    """Return the first request's seconds by those of the tenth: the median of several processes."""
    return statistics.median(run[0] / statistics.median(run[-STEADY:]) for run in runs)


def table(found: dict[str, dict[str, list[list[float]]]]) -> str:
    """Return a row per kind of start, in Markdown."""
    lines = [
        f"| start | first request | tenth | first / tenth (bar {BAR}) | lowest to highest | in CPU seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, runs in found["seconds"].items():
        first = statistics.median(run[0] for run in runs)
        last = statistics.median(statistics.median(run[-STEADY:]) for run in runs)
        ratios = [first_to_tenth([run]) for run in runs]
        lines.append(
            f"| {kind} | {first * 1e3:.0f} ms | {last * 1e3:.0f} ms | {first_to_tenth(runs):.2f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} | {first_to_tenth(found['cpu'][kind]):.2f} |"
        )
    return "\n".join(lines)


def requests(name: str, device: str, engine: str, warm: bool, threads: int) -> dict[str, list[float]]:
    """Return the seconds, and CPU seconds, of ten requests of the model's default, each with prompts of its own."""
    import runtime

    torch.set_num_threads(threads)
    model = runtime.load(name, device=device, engine=engine)
    if warm:
        runtime.warmup(model)
    found: dict[str, list[float]] = {"seconds": [], "cpu": []}
    for take in range(REQUESTS):
        request = runtime.Request(prompt=f"a red ball, take {take}", negative_prompt=f"blurred, take {take}", seed=take)
        began, computed = time.perf_counter(), time.process_time()
        for _ in runtime.generate(model, request):
            pass
        found["seconds"].append(time.perf_counter() - began)
        found["cpu"].append(time.process_time() - computed)
    return found
