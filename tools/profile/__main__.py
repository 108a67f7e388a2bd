"""python -m tools.profile nsys|ncu|torch -- generate "...": runs a command of `python -m runtime` under a profiler.

    nsys    Nsight Systems: ranges, kernels, gaps and what waits for the host, over some steps
    ncu     Nsight Compute: each kernel's percent of the roofline from the GPU's counters, over some steps
    torch   PyTorch's own profiler: the same report, also where there is no GPU; a Chrome trace

The profiler records from the first to the last of --steps alone (cudaProfilerStart and Stop), and leaves the GPU's
clocks as they are. Exit status: 0, 2 where it cannot work, else the command's own.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.profile import readers
from tools.profile.capture import record, steps_of
from tools.profile.report import kernel_report, timeline_report

METRICS = (readers.DURATION, readers.COMPUTE, readers.MEMORY)
PROGRAMS = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}


def main(argv: Sequence[str] | None = None) -> int:
    """Record, export, print the summary; return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    command = given[given.index("--") + 1 :] if "--" in given else []
    parser = argparse.ArgumentParser(
        prog="python -m tools.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profiler", choices=["nsys", "ncu", "torch"])
    parser.add_argument("--steps", default="2-3", help="denoising steps to record, such as 2-3 (default), 5, all")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/profile"), help="without suffix (out/profile)")
    parser.add_argument("--launches", type=int, default=200, help="ncu: kernels to look at, at most (default 200)")
    args = parser.parse_args(given[: given.index("--")] if "--" in given else given)
    try:
        if not command:
            raise ValueError('what to profile is missing; give it behind --, such as: -- generate "a red ball"')
        steps_of(args.steps)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        run = {"nsys": nsys, "ncu": ncu, "torch": by_torch}[args.profiler]
        return run(args, command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def nsys(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Record with Nsight Systems and print the timeline."""
    program = find("nsys")
    report, exported = (args.output.with_name(f"{args.output.name}{suffix}") for suffix in (".nsys-rep", ".sqlite"))
    status = subprocess.run(
        [
            program, "profile", "--trace=cuda,nvtx,osrt", "--cuda-graph-trace=node", "--sample=none",
            "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true",
            f"--output={report}", *recorded("nsys", args.steps, command),
        ],
        check=False,
    ).returncode  # fmt: skip
    if status or not report.exists():
        return status or nothing_recorded(args.steps)
    export = [program, "export", "--type=sqlite", "--force-overwrite=true", f"--output={exported}", str(report)]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    print(timeline_report(readers.read_nsys(exported)))
    print(f"\nopen it: nsys-ui {report}; rows: NVTX domain {readers.DOMAIN}, CUDA HW")
    return 0


def ncu(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Record with Nsight Compute and print the kernels."""
    program, report = find("ncu"), args.output.with_name(f"{args.output.name}.ncu-rep")
    done = subprocess.run(
        [
            program, "--profile-from-start", "off", "--clock-control", "none", "--nvtx", "--metrics", ",".join(METRICS),
            "--launch-count", str(args.launches), "--force-overwrite", "--export", str(report),
            *recorded("ncu", args.steps, command),
        ],
        check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout, end="")
    if "ERR_NVGPUCTRPERM" in done.stdout:
        raise PermissionError(
            "the driver lets administrators alone read the GPU's counters; run this as root, or have the module option "
            "NVreg_RestrictProfilingToAdminUsers=0 set; `nsys` and `torch` need no counters"
        )
    if done.returncode or not report.exists():
        return done.returncode or nothing_recorded(args.steps)
    table = [program, "--import", str(report), "--csv", "--page", "raw"]
    found = subprocess.run(table, check=True, capture_output=True, text=True).stdout
    print(kernel_report(readers.read_ncu(found)))
    print(f"\nopen it: ncu-ui {report}")
    return 0


def by_torch(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Record with PyTorch's profiler, here, and print the timeline."""
    trace = args.output.with_name(f"{args.output.name}.trace.json")
    trace.unlink(missing_ok=True)
    status = record("torch", args.steps, command, trace)
    if status or not trace.exists():
        return status or nothing_recorded(args.steps)
    print(timeline_report(readers.read_chrome(trace)))
    print(f"\nopen it: {trace} in https://ui.perfetto.dev or chrome://tracing")
    return 0


def find(name: str) -> str:
    """Return a profiler's program; ValueError where it, or a GPU, is missing."""
    found = shutil.which(name)
    if found is None:
        raise ValueError(
            f"{name} is not installed, or not in PATH; install {PROGRAMS[name]} (it comes with the CUDA toolkit), or "
            "take the profiler torch"
        )
    if shutil.which("nvidia-smi") is None:
        raise ValueError(f"this machine has no NVIDIA driver, and {name} looks at GPUs; take the profiler torch")
    return found


def recorded(profiler: str, steps: str, command: Sequence[str]) -> list[str]:
    """Return the command line of the process that the profiler watches."""
    return [sys.executable, "-m", "tools.profile.capture", profiler, steps, *command]


def nothing_recorded(steps: str) -> int:
    """Say that the steps did not happen, and return the exit status."""
    print(f"error: nothing was recorded: the command made no step {steps}; take others by --steps", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
