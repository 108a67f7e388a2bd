"""Why a bar of an operation is missed: by how much, what the machine code shows, and what the GPU's counters say.

The counters are Nsight Compute's, of a short process of its own that runs exactly the missed versions on their cases
(`python -m benchmarks.misses FILE`, FILE the JSON of [operation, case, version] each). Where they cannot be read, why
stands in their place; the machine code is always read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import pairs
from benchmarks.compile_report import compiled as compiled_row
from benchmarks.compile_report import cuobjdump, launched, readable
from benchmarks.machine import ROOT
from benchmarks.machine_code import disassembled
from benchmarks.operation_bars import BARS, Bar, Measured, duration, measured_of, missed_by
from runtime.kernels import cuda
from runtime.kernels.cases import Case, cases
from runtime.kernels.verdicts import made, run
from tools.profile.readers import UNITS, number, rows_of_ncu

NCU = ("ncu", "/usr/local/cuda/bin/ncu")
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
LEAST = 20.0  # seconds, below which a profiler is not begun
MARKER = "spin_kernel"  # of torch.cuda._sleep: stands between two versions
# What csrc's kernels are called, by operation.
CUDA_KERNELS = {"modulate": "ModulateToken", "gate_residual": "GateResidualToken", "norm_silu": "NormSiluPixel",
                "gate_residual_modulate": "GateResidualToken", "qk_norm_rope": "QkNormRopeRow"}  # fmt: skip
# What is told of a launch -> the counter's name; of several that match, the largest.
COUNTERS = {
    "us": r"gpu__time_duration\.sum",
    "memory %": r"(gpu__)?dram_?_throughput\.avg\.pct_of_peak_sustained_elapsed",
    "L2 %": r"lts__throughput\.avg\.pct_of_peak_sustained_elapsed",
    "tensor %": r"sm__(inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_active",
    "issue %": r"sm__inst_issued\.avg\.pct_of_peak_sustained_active",
    "occupancy %": r"sm__warps_active\.avg\.pct_of_peak_sustained_active",
    "registers": r"launch__registers_per_thread",
    "waves": r"launch__waves_per_multiprocessor",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?!.*not_issued)(\w+)_per_issue_active\.ratio")
STALLS = 3


def missed(record: dict[str, Any]) -> list[tuple[Bar, Measured]]:
    """Return the bars of operations that a record of `kernels` misses."""
    return [
        (bar, each)
        for bar, each in ((bar, measured_of(bar, record)) for bar in BARS)
        if each is not None and each.ours is not None and bar.met(each.ours, each.work, each.others) is False
    ]


def explain(record: dict[str, Any], end: float) -> list[dict[str, Any]]:
    """Return what each missed bar of a record shows on this GPU; profiled until `end`, by time.monotonic()."""
    bars = missed(record)
    asked = [*dict.fromkeys((*bar.place[1:], each.version) for bar, each in bars)]
    counted = counters(asked, end) if asked else {}
    told = []
    for bar, each in bars:
        most = bar.most(each.work, each.others)
        assert each.ours is not None and most is not None
        version = (*bar.place[1:], each.version)
        shown = {"bar": f"{bar.name} {bar}", "version": each.version, "seconds": each.ours, "most": most,
                 "missed": missed_by(each.ours, most), "code": codes(*version)}  # fmt: skip
        told.append(shown | ({"not counted": counted} if isinstance(counted, str) else {"counters": counted[version]}))
    return told


def case_of(operation: str, name: str) -> Case:
    """Return a real case by its name."""
    known = pairs.pair_cases() if operation == pairs.PAIR else cases(operation, real=True)
    return next(case for case in known if case.name == name)


def call_of(operation: str, name: str, version: str, device: str) -> Callable[[], Any]:
    """Return the call of one version on one case."""
    arguments = made(case_of(operation, name), torch.bfloat16, device)
    if operation == pairs.PAIR:
        return partial(pairs.run, version, arguments)
    return partial(run, operation, None if version == "picked" else version, arguments)


def codes(operation: str, name: str, version: str) -> list[str]:
    """Return what the machine code of a version shows, a line per kernel; of a library's kernels nothing."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}"
    try:
        if version == "cuda":
            kernels = disassembled(Path(str(cuda.load().__file__)), arch, cuobjdump())
            mine = [name for name in kernels if CUDA_KERNELS[operation] in name and "bfloat16" in name]
            return [f"{readable(name)}: {kernels[name]}" for name in mine]
        if version == "picked" and operation != pairs.PAIR:
            return ["a library's kernels, which are not ours to read"]
        ours = "triton" if version == "picked" else version
        units = launched(case_of(operation, name), arch, call_of(operation, name, ours, "meta"))
        rows = [compiled_row(unit, arch) for unit in units]
        return [
            row.error
            or f"{row.kernel}: {row.registers} registers, {row.spills} B spilled, {row.shared} B shared, "
            f"occupancy {row.occupancy:.0%}; {row.code}"
            for row in rows
        ]
    except Exception as error:  # of a compiler or a tool; what else is known is told all the same
        return [f"not read: {error}"]


Version = tuple[str, ...]
Counted = dict[str, Any]


def counters(versions: Sequence[Version], end: float) -> dict[Version, list[Counted]] | str:
    """Return each version's launches by Nsight Compute, or why there are none."""
    program = next(filter(None, map(shutil.which, NCU)), None)
    if program is None:
        return "ncu is not here"
    seconds = end - time.monotonic()
    if seconds < LEAST:
        return "no time was left"
    with tempfile.TemporaryDirectory() as scratch:
        file, log = Path(scratch) / "versions.json", Path(scratch) / "counters.csv"
        file.write_text(json.dumps([seconds - LEAST / 2, *versions]))
        command = [
            program, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw",
            "--log-file", str(log), *(part for name in SECTIONS for part in ("--section", name)),
            sys.executable, "-m", "benchmarks.misses", str(file),
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds,
                                  check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            return "ncu ran out of time"
        except OSError as error:
            return f"ncu does not start: {error}"
        text = log.read_text(errors="replace") if log.exists() else ""
    try:
        return read(text, versions)
    except ValueError as error:
        problems = [line for line in (text + done.stdout + done.stderr).splitlines() if "==ERROR==" in line]
        return "; ".join([*problems[:2], str(error)])


def read(text: str, versions: Sequence[Version]) -> dict[Version, list[Counted]]:
    """Read page raw of Nsight Compute: the launches between two markers are a version's; ValueError where none are."""
    told: dict[Version, list[Counted]] = {version: [] for version in versions}
    order = iter(versions)
    current: Version | None = None
    units, rows = rows_of_ncu(text)
    for row in rows:
        if MARKER in row["Kernel Name"]:
            current = next(order, None)
        elif current is not None:
            told[current].append(launch_of(row, units))
    if not any(told.values()):
        raise ValueError("Nsight Compute counted none of the kernels asked for")
    return told


def launch_of(row: dict[str, str], units: dict[str, str]) -> Counted:
    """Return what is told of one launch: the counters that this version of the profiler has, and why warps wait."""
    shown: Counted = {"kernel": row["Kernel Name"]}
    for name, pattern in COUNTERS.items():
        values = [number(row[key]) * UNITS.get(units[key], 1.0) for key in row if re.fullmatch(pattern, key)]
        if values:
            shown[name] = max(values) * (1e6 if name == "us" else 1.0)
    waits = {match[1]: number(row[key]) for key in row if (match := STALL.fullmatch(key))}
    longest = sorted(waits, key=waits.__getitem__, reverse=True)[:STALLS]
    return shown | {"waits": {name: waits[name] for name in longest}}


def table(told: Sequence[dict[str, Any]]) -> str:
    """Return what `explain` found as a Markdown list."""
    lines = []
    for each in told:
        lines.append(f"- {each['bar']}: {each['missed']} by {each['version']} ({duration(each['seconds'])})")
        lines += [f"  - machine code: {code}" for code in each["code"]]
        for launch in each.get("counters", ()):
            waits = ", ".join(f"{name} {cycles:.1f}" for name, cycles in launch["waits"].items())
            shown = ", ".join(f"{name} {launch[name]:.4g}" for name in COUNTERS if name in launch)
            lines.append(f"  - {launch['kernel'][:60]}: {shown}; cycles waited per instruction: {waits or 'not told'}")
        if "not counted" in each:
            lines.append(f"  - counters: {each['not counted']}")
    return "\n".join(lines)


def main(file: str) -> None:
    """Run each version once between cudaProfilerStart and Stop, a marker before it, until the time given is over."""
    seconds, *versions = json.loads(Path(file).read_text())
    end = time.monotonic() + seconds
    for version in versions:
        if time.monotonic() > end:
            break
        call: Callable[[], Any] | None = None
        with suppress(Exception):  # one that fails leaves its marker alone
            operation, name, which = version
            call = call_of(operation, name, which, "cuda")
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        if call is not None:
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del call
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1])
