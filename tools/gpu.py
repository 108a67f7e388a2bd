"""One command for a bare machine with an NVIDIA GPU: build csrc, run the GPU tests, measure; `make gpu`.

Nothing is downloaded or installed: it runs with the Python that starts it, which needs torch, triton and pytest. All
parts together end within the budget; what was measured until then is kept and printed last. Exit status: 0 all well,
1 something failed or was cut off, 2 no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LINKED = ROOT / "build" / "gpu"
DEMO = Path(os.environ.get("OUT", ROOT / "out")) / "demo-model"
PARTS = ("tests", "kernels")
LONG = ("latency", "demo")  # run only where asked for
TEST_PROCESSES = 6
TEST_SHARE = 0.5  # of the time that is left when they begin, at most
LAST = 20.0  # seconds kept for printing the table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and return the exit status."""
    parser = argparse.ArgumentParser(prog="python tools/gpu.py", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all (default 540)")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default: these), {','.join(LONG)}"
    )
    args = parser.parse_args(argv)
    parts = args.only.split(",")
    if unknown := [part for part in parts if part not in PARTS + LONG]:
        parser.error(f"--only {', '.join(unknown)}: legal are {', '.join(PARTS + LONG)}, joined by commas")
    began = time.time()
    end = began + args.budget
    if (gpu := output(sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())")) is None:
        print("no NVIDIA GPU that this Python's torch can use is here, so there is nothing to run", file=sys.stderr)
        return 2
    print(f"{gpu}; {args.budget:.0f} s for {', '.join(parts)}", flush=True)
    notes = [build(end)]
    environment = reachable()
    if "tests" in parts:
        notes.append(tests(environment, time.time() + TEST_SHARE * (end - time.time())))
    if "kernels" in parts:
        notes.append(speeds(environment, began, end))
    if "latency" in parts:
        left = end - time.time() - LAST
        command = [
            sys.executable, "-m", "benchmarks", "latency", "--model", "wan2.1-t2v-1.3b@random", "--device", "cuda",
            "--sizes", "480p,vertical,1024x1024,720p,1080p", "--frames", "1,17,81", "--engines", "eager,cuda_graph",
            "--steps", "4", "--budget", f"{max(left - LAST, 0):.0f}", *against(),
        ]  # fmt: skip
        notes.append(failed("benchmarks latency", command, environment, end))
    if "demo" in parts:  # goes on with what an earlier run left in the folder
        train = [sys.executable, "-m", "tools.demo_model", "train", "--size", "gpu", "--out", str(DEMO)]
        notes.append(failed("training the demo model", train, environment, end))
    for note in filter(None, notes):
        print(note, file=sys.stderr)
    return 1 if any(notes) else 0


def reachable() -> dict[str, str]:
    """Return an environment in which `runtime.kernels` is this repository's kernels, without installing anything."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    question = "from runtime.kernels import __file__; print(__file__)"
    found = output(sys.executable, "-c", question, environment=environment)
    if found and Path(found).resolve() == ROOT / "kernels" / "__init__.py":
        return environment
    shutil.rmtree(LINKED, ignore_errors=True)
    (LINKED / "runtime").mkdir(parents=True)
    for entry in [*(ROOT / "runtime").iterdir(), ROOT / "kernels"]:
        (LINKED / "runtime" / entry.name).symlink_to(entry)
    # Safe path: else Python puts this folder first, whose runtime/ has no kernels in it.
    return environment | {"PYTHONPATH": os.pathsep.join([str(LINKED), str(ROOT)]), "PYTHONSAFEPATH": "1"}


def build(end: float) -> str:
    """Build csrc for this GPU into runtime/; what a machine lacks for it is printed, and the rest runs without."""
    question = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    arch = output(sys.executable, "-c", question)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--arch", str(arch)]
    return failed("building csrc", command, dict(os.environ), end)


def tests(environment: dict[str, str], end: float) -> str:
    """Run what is marked gpu, in the files whose imports this machine has, in several processes: compiling takes most.

    Neighbours stay in one process, so that the few tests that need most of the memory run one after the other.
    """
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--import-mode=append"]
    names: list[str] = []
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        if "mark.gpu" not in file.read_text():
            continue
        if (found := output(*pytest, "--collect-only", str(file), environment=environment)) is None:
            print(f"{file.name} is left out: it does not import here, or marks nothing", flush=True)
        else:
            names += [line for line in found.splitlines() if "::" in line]
    if not names:
        return "no GPU test can run here"
    size = -(-len(names) // TEST_PROCESSES)
    shares = [names[first : first + size] for first in range(0, len(names), size)]
    logs = [LINKED.with_name(f"gpu-tests-{number}.log") for number in range(len(shares))]
    logs[0].parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(len(shares)) as pool:
        commands = [[*pytest, "-rf", "--tb=short", "--maxfail=20", *share] for share in shares]
        notes = list(pool.map(lambda item: failed("the GPU tests", item[0], environment, end, item[1]),
                              zip(commands, logs, strict=True)))  # fmt: skip
    for log in logs:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), flush=True)
    return "; ".join(sorted(set(filter(None, notes))))


def speeds(environment: dict[str, str], began: float, end: float) -> str:
    """Measure the operations; where the time ends it, print what is in the file by then."""
    left = end - time.time() - LAST
    command = [sys.executable, "-m", "benchmarks", "kernels", "--budget", f"{max(left - LAST, 0):.0f}"]
    note = failed("benchmarks kernels", command, environment, end - LAST)
    if "out of time" in note:
        newest = max(RESULTS.glob("*/*.json"), key=lambda file: file.stat().st_mtime, default=None)
        if newest is not None and newest.stat().st_mtime >= began:
            show = [sys.executable, "-m", "benchmarks", "kernels", "--show", str(newest)]
            failed("the table", show, environment, time.time() + LAST)
    return note


def against() -> list[str]:
    """Return the option that measures diffusers as well, where it is installed."""
    found = output(sys.executable, "-c", "import diffusers, accelerate")
    return [] if found is None else ["--against", "diffusers"]


def failed(what: str, command: list[str], environment: dict[str, str], end: float, log: Path | None = None) -> str:
    """Run a command until `end` and return what went wrong, "" for nothing; its children end with it."""
    with log.open("w") if log else nullcontext() as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=file, stderr=file)
    try:
        status = process.wait(max(end - time.time(), 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"{what}: out of time"
    return f"{what}: exit status {status}" if status else ""


def output(*command: str, environment: dict[str, str] | None = None) -> str | None:
    """Return what a command prints, None where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
