"""How true the planner is here: predicted beside measured seconds and peak memory of different requests."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_model
from benchmarks.machine import describe, installed, keep, results_file
from benchmarks.measure import fresh_process
from runtime.calibration import calibration
from runtime.model import DEMO

STAGES = ("text", "step", "denoise", "decode")
SECONDS_BAR, MEMORY_BAR = 0.25, 0.15


@dataclass(frozen=True)
class Case:
    """One request: a model, a dtype, and what is asked for."""

    model: str
    width: int
    height: int
    num_frames: int
    steps: int
    dtype: str = "float32"
    guidance: float = 4.0


CASES = (
    Case("demo", 64, 64, 17, 25),
    Case("demo", 64, 64, 1, 50),
    Case("demo", 96, 64, 33, 10),
    Case("demo", 128, 128, 17, 8),
    Case("demo", 192, 192, 9, 6),
    Case("demo", 256, 256, 17, 3),
    Case("demo", 64, 64, 17, 25, "bfloat16"),
    Case("demo", 128, 128, 17, 8, guidance=1.0),
    Case("tiny", 128, 64, 17, 12),
    Case("tiny", 256, 128, 9, 6),
    Case("random", 128, 128, 9, 6),
    Case("random", 192, 128, 17, 3),
    Case("random", 256, 256, 5, 3),
    Case("random", 128, 128, 9, 6, "bfloat16"),
)


def add_command(commands: Any) -> None:
    """Add `planner` to the command line."""
    parser = commands.add_parser("planner", help="predicted beside measured seconds and memory")
    parser.set_defaults(run=run)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each request (default 5)")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: as many as PyTorch takes)")
    parser.add_argument("--json", type=Path, help="file of results (default: benchmarks/results/<device>/"
                        "<date>-<commit>.json)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Calibrate afresh, predict and measure every case, write the samples and print the table; 1 beyond the bars."""
    if installed("diffusers") is None:
        raise ValueError("the random models are written by diffusers, which is not installed")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        os.environ["DIT_RUNTIME_CACHE"] = str(Path(scratch) / "cache")
        folders = {"demo": DEMO, "tiny": Path(scratch) / "tiny", "random": Path(scratch) / "random"}
        random_model.write(folders["random"])
        random_model.write(folders["tiny"], "tiny")
        for dtype in (torch.float32, torch.bfloat16):
            print(f"calibrating {dtype}", file=sys.stderr, flush=True)
            calibration(torch.device("cpu"), dtype)
        found = []
        for case in CASES:
            print(case, file=sys.stderr, flush=True)
            found.append(fresh_process(measure, case, folders[case.model], args.repeats, torch.get_num_threads()))
    machine = describe(torch.device("cpu"))
    record = {"benchmark": "planner", "machine": machine, "repeats": args.repeats, "cases": found}
    file = args.json or results_file(machine)
    keep(record, file)
    print(f"samples: {file}", file=sys.stderr)
    print(table(found))
    return int(any(case["total"] > SECONDS_BAR or case["memory"] > MEMORY_BAR for case in found))


def measure(case: Case, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Return predicted and measured numbers of one request: memory of the first run, median seconds of the others."""
    import runtime

    torch.set_num_threads(threads)
    model = runtime.load(folder, device="cpu", dtype=case.dtype)
    samples: dict[str, list[float]] = {stage: [] for stage in STAGES}
    peaks: dict[str, int] = {}
    for take in range(repeats + 1):
        number = (repeats + 1) * CASES.index(case) + take  # no prompt twice: a known one is not encoded
        request = runtime.Request(
            prompt=f"a red ball rolls left over green grass, take {number}", negative_prompt=f"blurred, take {number}",
            width=case.width, height=case.height, num_frames=case.num_frames, steps=case.steps,
            guidance=case.guidance, seed=take,
        )  # fmt: skip
        video = runtime.generate(model, request)
        for _ in video:
            pass
        stages = video.receipt.stages
        if take == 0:
            peaks = {stage: stages[stage].peak_bytes or 0 for stage in ("text", "denoise", "decode")}
            continue
        for stage in ("text", "denoise", "decode"):
            samples[stage].append(stages[stage].seconds)
        samples["step"].append(stages["denoise/step"].seconds / case.steps)
    predicted = video.receipt.predicted
    assert predicted is not None
    seconds = {stage: statistics.median(times) for stage, times in samples.items()}
    seconds["total"] = statistics.median(
        map(sum, zip(*(samples[s] for s in ("text", "denoise", "decode")), strict=True))
    )
    highest, foreseen = max(peaks.values()), max(predicted["peak_bytes"][stage] for stage in peaks)
    return {
        "case": vars(case),
        "predicted": {"seconds": predicted["seconds"], "peak_bytes": predicted["peak_bytes"]},
        "measured": {"seconds": seconds, "peak_bytes": peaks, "samples": samples},
        "total": abs(predicted["seconds"]["total"] / seconds["total"] - 1),
        "memory": abs(foreseen / highest - 1),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Return predicted / measured of every stage as a Markdown table."""
    lines = [
        "| request | step | denoise | decode | text | all seconds | measured | peak memory | measured |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in found:
        case, predicted, measured = each["case"], each["predicted"], each["measured"]
        name = f"{case['model']} {case['width']}x{case['height']}x{case['num_frames']}, {case['steps']} steps"
        name += "" if case["dtype"] == "float32" else f", {case['dtype']}"
        name += "" if case["guidance"] > 1 else ", unguided"
        ratios = [
            f"{predicted['seconds'][stage] / measured['seconds'][stage]:.2f}"
            for stage in ("step", "denoise", "decode", "text", "total")
        ]
        peak = max(measured["peak_bytes"].values())
        memory = max(predicted["peak_bytes"][stage] for stage in measured["peak_bytes"]) / peak
        cells = [name, *ratios, f"{measured['seconds']['total']:.2f} s", f"{memory:.2f}", f"{peak / 2**20:.0f} MiB"]
        lines.append(f"| {' | '.join(cells)} |")
    worst = max(each["total"] for each in found), max(each["memory"] for each in found)
    lines.append("")
    lines.append(
        f"Ratios are predicted / measured; furthest off: seconds of a request {worst[0]:.0%} (bar {SECONDS_BAR:.0%}), "
        f"its peak memory {worst[1]:.0%} (bar {MEMORY_BAR:.0%})."
    )
    return "\n".join(lines)
