"""Warm start: the first request after `warmup` beside the tenth, each time in a new process."""

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


def add_command(commands: Any) -> None:
    """Add `warm` to the command line."""
    parser = commands.add_parser("warm", help="the first request beside the tenth, with and without a warm start")
    parser.set_defaults(run=run)
    parser.add_argument("--model", default="demo", help="demo (default), a folder or a published name")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    parser.add_argument("--engine", default="eager", help="eager (default), cuda_graph, inductor")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default 5)")
    parser.add_argument("--json", type=Path, help="file of results (default: benchmarks/results/<device>/"
                        "<date>-<commit>.json)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Measure, write the samples as JSON and print the table."""
    machine = describe(torch.device(args.device))
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        os.environ["DIT_RUNTIME_CACHE"] = scratch
        kinds: dict[str, list[list[float]]] = {"warm": [], "cold": []}
        for _ in range(args.repeats):
            for kind, samples in kinds.items():
                samples.append(fresh_process(requests, args.model, args.device, args.engine, kind == "warm"))
    file = args.json or results_file(machine)
    keep({"benchmark": "warm", "machine": machine, "model": args.model, "engine": args.engine, "seconds": kinds}, file)
    print("| start | first request | tenth | first / tenth |\n| --- | ---: | ---: | ---: |")
    for kind, samples in kinds.items():
        first, last = (statistics.median(run[i] for run in samples) for i in (0, -1))
        ratio = statistics.median(run[0] / run[-1] for run in samples)
        print(f"| {kind} | {first * 1e3:.0f} ms | {last * 1e3:.0f} ms | {ratio:.2f} |")


def requests(name: str, device: str, engine: str, warm: bool) -> list[float]:
    """Return the seconds of ten requests of the model's default, each with prompts of its own."""
    import runtime

    model = runtime.load(name, device=device, engine=engine)
    if warm:
        runtime.warmup(model)
    seconds = []
    for take in range(REQUESTS):
        request = runtime.Request(prompt=f"a red ball, take {take}", negative_prompt=f"blurred, take {take}", seed=take)
        began = time.perf_counter()
        for _ in runtime.generate(model, request):
            pass
        seconds.append(time.perf_counter() - began)
    return seconds
