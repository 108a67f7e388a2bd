"""The operations, one by one, at published models' shapes: correct first, then timed beside their limits and rivals.

On a GPU: every version is judged, then timed in turns with the reference, torch.compile of the reference, and the best
library kernels; the L2 cache is emptied before each run. Without one: `--roofline` and `--compile-report`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import compile_report, misses, pairs
from benchmarks.baselines import BARS, Baseline, baselines
from benchmarks.machine import describe, keep, results_file
from benchmarks.measure import Refused
from runtime.kernels.backend import recorded, triton
from runtime.kernels.cases import CASES, Case, cases
from runtime.kernels.tolerance import Verdict
from runtime.kernels.verdicts import (
    EIGHT_BITS,
    SIMULATED,
    Standard,
    implementations,
    made,
    module_of,
    reference_call,
    run,
    tensors,
)

# What one H200 reaches: a large copy, a large bfloat16 product, and twice that for 8 bits (assumed).
BANDWIDTH, HALF_RATE, FP8_RATE = 4.3e12, 790e12, 1580e12
FLUSH = 2**30  # bytes: many times any L2, and long enough to write that the next call is launched meanwhile
RUNS = (7, 200)  # fewest and most samples of a version
WHY = 60.0  # seconds kept for telling why bars are missed; at most twice that is taken
SECONDS = 1.0  # for the samples of one case, all versions together
FIRST = ("wan-14b 480p", "wan-vae 480p 96 ")  # the bars' cases, measured first
TIMED = (*CASES, pairs.PAIR)
REFERENCE, COMPILED, PICKED = "reference", "torch.compile", "picked"


@dataclass(frozen=True)
class Limit:
    """The least time that a case can take on the chip."""

    seconds: float
    by_memory: bool
    work: float  # bytes or FLOPs, whichever sets the limit

    def rate(self, seconds: float) -> str:
        """Return the rate that a time means."""
        return f"{self.work / seconds / 1e12:.{2 if self.by_memory else 0}f} {'TB/s' if self.by_memory else 'TFLOP/s'}"


def limit(case: Case) -> Limit:
    """Return a case's limit from the bytes and FLOPs that it declares."""
    memory = case.bytes / BANDWIDTH
    compute = case.flops / (FP8_RATE if case.operation in EIGHT_BITS else HALF_RATE)
    return Limit(max(memory, compute), memory >= compute, case.bytes if memory >= compute else case.flops)


def add_command(commands: Any) -> None:
    """Add `kernels` to the command line."""
    parser = commands.add_parser("kernels", help="each operation at published shapes; also compiled ahead of time")
    parser.set_defaults(run=main)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--roofline", action="store_true", help="bytes, FLOPs and least time per case; needs no GPU")
    mode.add_argument("--show", type=Path, metavar="FILE", help="print the table of a file of speeds")
    mode.add_argument("--compile-report", action="store_true", help="registers, spills, shared memory and occupancy of "
                      "every kernel; needs no GPU; exit status 1 where one spills or does not fit")  # fmt: skip
    parser.add_argument("--only", type=_operations, default=TIMED, help=f"some of {','.join(TIMED)}")
    parser.add_argument("--case", default="", help="only cases whose name contains this, such as 'wan-14b 480p'; csrc, "
                        "which has no cases, is then left out of the compile report")  # fmt: skip
    parser.add_argument("--arch", nargs="+", choices=list(compile_report.CHIPS), default=list(compile_report.CHIPS),
                        help="architectures of the compile report (default: all)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes of the compile report (default 1)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further case begins")
    parser.add_argument("--json", type=Path, help="file of results (speeds: default "
                        "benchmarks/results/<gpu>/<date>-<commit>.json; others: none)")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Run one of the modes and return the exit status, 1 where a kernel spills; Refused where one is wrong."""
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return 0
    chosen = [case for case in in_order(args.only) if args.case in case.name]
    if not chosen:
        raise ValueError(f"no case is named like {args.case!r}; names are such as {FIRST[0]!r}")
    if args.roofline:
        print(roofline_table(chosen))
        save({"roofline": [roofline(case) for case in chosen]}, args.json)
    elif args.compile_report:
        single = [name for name in args.only if name in CASES]  # a pair launches what they do
        chosen = [case for case in chosen if case.operation in single]
        files = () if args.case else {module_of(name).__name__.rpartition(".")[2] for name in single}
        rows = []
        print(compile_report.HEADER)
        for row in compile_report.report(chosen, args.arch, args.jobs, files):
            print(compile_report.line(row), flush=True)
            rows.append(row)
        save({"compile_report": compile_report.as_json(rows)}, args.json)
        faults = [f"{row.kernel} ({row.case}, {row.arch}): {text}" for row in rows for text in row.faults]
        print("\n".join(faults), file=sys.stderr)
        return 1 if faults else 0
    else:
        speeds(chosen, args.budget, args.json)
    return 0


def in_order(operations: Sequence[str]) -> list[Case]:
    """Return the real cases, the first of each operation before the second of any, so that a cut leaves most."""
    found = []
    real = {name: cases(name, real=True) for name in operations if name != pairs.PAIR}
    if pairs.PAIR in operations:
        real[pairs.PAIR] = pairs.pair_cases()
    for each in real.values():
        ranked = sorted(each, key=lambda case: not case.name.startswith(FIRST))
        found += [(place, case) for place, case in enumerate(ranked)]
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def roofline(case: Case) -> dict[str, Any]:
    """Return a case's limit for a file."""
    least = limit(case)
    return {"operation": case.operation, "case": case.name, "bytes": case.bytes, "flops": case.flops,
            "least_us": least.seconds * 1e6, "bound": "memory" if least.by_memory else "compute"}  # fmt: skip


def roofline_table(chosen: Sequence[Case]) -> str:
    """Return the limits as Markdown."""
    lines = ["| operation | case | MB | GFLOP | least | bound by |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for found in map(roofline, chosen):
        lines.append(
            f"| {found['operation']} | {found['case']} | {found['bytes'] / 1e6:.0f} | {found['flops'] / 1e9:.0f} | "
            f"{found['least_us']:.0f} us | {found['bound']} |"
        )
    return "\n".join(lines)


def speeds(chosen: Sequence[Case], budget: float, file: Path | None) -> None:
    """Judge and time the cases on this GPU, writing the results after each; Refused where an output is wrong."""
    if not torch.cuda.is_available():
        raise ValueError("no NVIDIA GPU is here, so nothing can be timed; --roofline and --compile-report need none")
    if os.environ.get("TRITON_INTERPRET"):
        raise ValueError("TRITON_INTERPRET is set, so Triton would interpret its kernels; unset it")
    end = time.monotonic() + budget
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
    machine = describe(torch.device("cuda"))
    if triton is not None:
        machine["versions"]["triton"] = triton.__version__
    file = file or results_file(machine)
    record: dict[str, Any] = {"benchmark": "kernels", "machine": machine, "kernels": [], "left_out": [], "misses": []}
    for case in chosen:
        if time.monotonic() > end - WHY:
            record["left_out"].append(f"{case.operation} {case.name}")
            continue
        print(f"{case.operation} {case.name}", flush=True)
        record["kernels"].append(measure(case, torch.device("cuda")))
        save(record, file)
    save(record, file)
    record["misses"] = misses.explain(record, min(end, time.monotonic() + 2 * WHY))
    save(record, file)
    print(f"\n{table(record)}\n\n{file}")
    if wrong := [f"{found['operation']} {found['case']}" for found in record["kernels"] if found["wrong"]]:
        raise Refused(f"wrong or failing: {', '.join(wrong)}")


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Judge every version of a case; time them only if all of ours are correct."""
    operation = case.operation
    if operation == pairs.PAIR:
        return roofline(case) | pairs.measure(case, device, timed)
    found: dict[str, Any] = roofline(case) | {"verdicts": {}, "wrong": [], "seconds": {}, "skipped": {}, "parts": []}
    try:
        standard = Standard(case, torch.bfloat16, device)
        calls = ours(case, device, standard, found)
        if not found["wrong"]:
            with torch.no_grad():
                calls |= theirs(case, device, standard, found)
                arguments = made(case, torch.bfloat16, device)
                del standard
                if operation not in SIMULATED:
                    calls = {REFERENCE: partial(run, operation, "ref", arguments), **calls}
                found["seconds"] = timed(calls)
    except torch.OutOfMemoryError as error:
        found["skipped"]["all"] = first_line(error)
    finally:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return found


def ours(case: Case, device: torch.device, standard: Standard, found: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Judge our implementations, and what the operation would pick if that is another; return the calls."""
    operation = case.operation
    calls: dict[str, Callable[[], Any]] = {}
    arguments = made(case, torch.bfloat16, device)
    with recorded() as launches:
        run(operation, None, arguments)
    for name in [*implementations(operation), *(() if launches else (PICKED,))]:
        forced = None if name == PICKED else name
        try:
            outputs = run(operation, forced, made(case, torch.bfloat16, device))
        except ValueError as error:  # csrc is not built, or does not take this case
            found["skipped"][name] = first_line(error)
            continue
        except Exception as error:  # Triton's and CUDA's failures, of many kinds
            found["verdicts"][name], found["wrong"] = first_line(error), [*found["wrong"], name]
            continue
        verdicts = standard.judge(outputs)
        found["verdicts"][name] = [*map(str, verdicts)]
        if not correct(verdicts):
            found["wrong"].append(name)
        calls[name] = partial(run, operation, forced, arguments)
    return calls


def theirs(case: Case, device: torch.device, standard: Standard, found: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return torch.compile of the reference and the libraries' versions that this machine runs and that are correct."""
    arguments = made(case, torch.bfloat16, device)
    rivals = baselines(case.operation, arguments)
    if case.operation not in SIMULATED:
        reference, values = reference_call(case.operation, arguments)
        compiled = torch.compile(reference, dynamic=False)
        rivals = [Baseline(COMPILED, lambda: compiled(*values)), *rivals]
    calls: dict[str, Callable[[], Any]] = {}
    for rival in rivals:
        try:
            outputs = tensors(rival.call())
        except Exception as error:  # a kernel that takes no such call, a compiler that fails
            found["skipped"][rival.name] = first_line(error)
            continue
        if not rival.whole:
            found["parts"].append(rival.name)
        elif not correct(standard.judge(outputs)):
            found["skipped"][rival.name] = "not correct"
            continue
        calls[rival.name] = rival.call
    return calls


def correct(verdicts: Iterable[Verdict]) -> bool:
    """Tell whether all outputs are."""
    return all(verdict.correct for verdict in verdicts)


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Return seconds of each call on the GPU, taken in turns, the L2 cache emptied before each.

    Emptying it also keeps the GPU busy while the next call is launched, so that launching is not in the samples.
    """
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    began = time.perf_counter()
    for _ in range(2):
        for call in calls.values():
            call()
    torch.cuda.synchronize()
    once = (time.perf_counter() - began) / 2
    runs = max(RUNS[0], min(RUNS[1], int(SECONDS / max(once, 1e-6))))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown: a row per version, the fastest of ours with its ratios and its bar."""
    machine = record["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"**{machine['name']}, {packages}, commit {machine['commit']}**", "",
        "| operation | case | version | time | rate | of the limit | vs torch.compile | vs best library | bar |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for found in record["kernels"]:
        lines += rows(found)
    if record["left_out"]:
        lines += ["", f"Left out when the time was up: {', '.join(record['left_out'])}."]
    lines += [
        "",
        f"Median, L2 emptied before each run, versions in turns. The limit is {BANDWIDTH / 1e12:g} TB/s or "
        f'{HALF_RATE / 1e12:g} TFLOP/s ({FP8_RATE / 1e12:g} in 8 bits); "vs" is their time / ours, of our fastest.',
    ]
    if record.get("misses"):
        lines += ["", "Missed bars, and what their profiles show:", "", misses.table(record["misses"])]
    return "\n".join(lines)


def rows(found: dict[str, Any]) -> list[str]:
    """Return the lines of one case; no speed where one of our versions is wrong."""
    name = f"| {found['operation']} | {found['case']}"
    if found["wrong"] or not found["seconds"]:
        why = "; ".join(f"{key}: {found['verdicts'][key]}" for key in found["wrong"]) or found["skipped"].get("all", "")
        return [f"{name} | no speeds: {why} | | | | | | |"]
    medians = {version: statistics.median(samples) for version, samples in found["seconds"].items()}
    mine = {version: medians[version] for version in ("triton", "cuda", PICKED) if version in medians}
    rivals = {
        version: seconds
        for version, seconds in medians.items()
        if version not in {*mine, *found["parts"], REFERENCE, COMPILED}
    }
    best = min(mine, key=mine.__getitem__)
    least = Limit(found["least_us"] / 1e6, found["bound"] == "memory",
                  found["bytes"] if found["bound"] == "memory" else found["flops"])  # fmt: skip
    lines = []
    for version, seconds in medians.items():
        cells = [version, f"{seconds * 1e6:.0f} us", least.rate(seconds), f"{least.seconds / seconds:.0%}", "", "", ""]
        if version == best:
            cells[4] = f"{medians[COMPILED] / seconds:.2f}" if COMPILED in medians else "-"
            cells[5] = f"{min(rivals.values()) / seconds:.2f}" if rivals else "-"
            cells[6] = verdict_of_bar(found["operation"], seconds, least.work, medians)
        lines.append(f"{name} | {' | '.join(cells)} |")
    return lines + [f"{name} | {version} | | | | | | left out: {why} |" for version, why in found["skipped"].items()]


def verdict_of_bar(operation: str, seconds: float, work: float, medians: dict[str, float]) -> str:
    """Return the bar of an operation, and whether it is met."""
    bar = BARS.get(operation)
    if bar is None:
        return ""
    met = bar.met(seconds, work, medians)
    return f"{bar}: {'not measured' if met is None else 'met' if met else 'missed'}"


def save(record: dict[str, Any], file: Path | None) -> None:
    """Write a record as JSON, whole or not at all."""
    if file is None:
        return
    keep(record, file)


def first_line(error: BaseException) -> str:
    """Return an error in one line."""
    with suppress(IndexError):
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return type(error).__name__


def _operations(given: str) -> tuple[str, ...]:
    names = tuple(given.split(","))
    if unknown := [name for name in names if name not in TIMED]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: legal are {', '.join(TIMED)}, joined by commas")
    return names
