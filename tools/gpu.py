"""One command for a bare machine with an NVIDIA GPU: build csrc, run the GPU tests, measure, tune; `make gpu`.

Nothing is downloaded or installed: it runs with the Python that starts it, which needs torch, triton and pytest; what
else it finds (diffusers, av, ftfy) it uses. All parts together end within the budget; what was measured until then is
kept, as results.tar.gz in the folder OUT where that variable names one, and printed last. Exit status: 0 all well, 1
something failed or was cut off, 2 no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LINKED = ROOT / "build" / "gpu"
KEPT = ROOT / "build" / "results"  # where OUT is set: packed into it
OUT = Path(os.environ.get("OUT", ROOT / "out"))
# In the order in which they run: name -> share of the time that is left when it begins.
PARTS = {"tests": 0.5, "kernels": 1.0, "stages": 1.0, "tune": 0.3, "latency": 0.9, "demo": 1.0}
USUAL = ("tests", "kernels")
TEST_PROCESSES = 8  # compiling takes most of the time, the largest cases 10 GB of memory
CHECKERS = ("memcheck", "racecheck")
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
NEEDED = ("av", "ftfy", "transformers", "safetensors")  # by the runtime; its operations need none of them
QUESTION = 120.0  # seconds that a question to another process may take
LAST = 20.0  # seconds kept for printing the tables
# What is most wanted first: in each part a later group, or row, is what the time may end before.
STAGES = (  # parts of one model, share of the time that is left
    ("step-1.3b-480p,decode-480p,decode-720p,qualities-1.3b-480p", 0.56),
    ("step-14b-480p", 0.95),
    ("step-5b-704p", 1.0),
)
GRAPH, OTHERS = "cuda_graph", "eager,inductor"
SMALL, LARGE, NEW = "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-ti2v-5b"
LATENCY = (  # model, sizes, frames, engines, of diffusers
    (SMALL, "480p,720p,vertical", "81,1", GRAPH, "diffusers"),
    (LARGE, "480p", "81,1", GRAPH, "diffusers"),
    (NEW, "1280x704", "121,1", GRAPH, "diffusers"),
    (SMALL, "480p", "81", OTHERS, "compiled"),
    (LARGE, "720p,vertical", "81", GRAPH, "diffusers"),
    (SMALL, "1080p", "81,1", GRAPH, "diffusers"),
    (NEW, "480p,vertical,1080p", "121,1", GRAPH, "diffusers"),
    (NEW, "1280x704", "121", OTHERS, "compiled"),
    (LARGE, "480p", "81", OTHERS, "compiled"),
    (SMALL, "720p,1080p", "81", OTHERS, "compiled"),
    (LARGE, "1080p", "1,81", GRAPH, "diffusers"),
    (LARGE, "720p", "1,81", OTHERS, "compiled"),
)
TO_BEGIN = 45.0  # seconds that must be left for a row of these to begin
SHOWN = ("kernels", "published", "latency", "warm")  # benchmarks whose tables are printed at the end


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and return the exit status."""
    parser = argparse.ArgumentParser(prog="python tools/gpu.py", description=__doc__)
    parser.add_argument("--budget", type=float, default=530, help="seconds for all (default 530)")
    parser.add_argument(
        "--only", default=",".join(USUAL), help=f"some of {','.join(PARTS)} (default {','.join(USUAL)})"
    )
    parser.add_argument("--row", type=int, default=1, help=f"of latency, to begin with: 1 (default) to {len(LATENCY)}")
    args = parser.parse_args(argv)
    given = args.only.split(",")
    if unknown := [part for part in given if part not in PARTS]:
        parser.error(f"--only {', '.join(unknown)}: legal are {', '.join(PARTS)}, joined by commas")
    asked = [part for part in PARTS if part in given]
    began = time.time()
    end = began + args.budget - LAST
    if (gpu := output(sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())")) is None:
        print("no NVIDIA GPU that this Python's torch can use is here, so there is nothing to run", file=sys.stderr)
        return 2
    print(f"{gpu}; {args.budget:.0f} s for {', '.join(asked)}", flush=True)
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    notes = [build(end)]
    environment = reachable()
    steps = {"tests": tests, "kernels": speeds, "tune": tune, "stages": stages, "demo": demo,
             "latency": partial(latency, first=args.row - 1)}  # fmt: skip
    missing = [
        name for name in NEEDED if output(sys.executable, "-c", f"import {name}", environment=environment) is None
    ]
    if missing:
        print(f"{', '.join(missing)} cannot be imported, so what uses the runtime is left out or fails; see "
              "tools/wheels.py", flush=True)  # fmt: skip
    for part in asked:
        share = 1.0 if part == asked[-1] else PARTS[part]
        notes.append(steps[part](environment, time.time() + share * (end - time.time())))
        pack()
        print(f"{part}: {end - time.time():.0f} s are left", flush=True)
    tables(environment, began)
    for note in filter(None, notes):
        print(note, flush=True)
    return 1 if any(notes) else 0


def reachable() -> dict[str, str]:
    """Return an environment in which `runtime.kernels` is this repository's kernels, without installing anything."""
    given = [folder for folder in [os.environ.get("PYTHONPATH", "")] if folder]
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), *given]), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment = os.environ | own
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
    return environment | {"PYTHONPATH": os.pathsep.join([str(LINKED), str(ROOT), *given]), "PYTHONSAFEPATH": "1"}


def build(end: float) -> str:
    """Build csrc for this GPU into runtime/; what a machine lacks for it is printed, and the rest runs without.

    setup.py's function is called itself: its command wants a setuptools that reads this pyproject.toml.
    """
    question = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    target = ROOT / "runtime" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    call = (
        f"import setup, pathlib; setup.place(pathlib.Path({str(target)!r}), {output(sys.executable, '-c', question)!r})"
    )
    return failed("building csrc", [sys.executable, "-c", call], dict(os.environ), end)


def tests(environment: dict[str, str], end: float) -> str:
    """Run what is marked gpu, in the files whose imports this machine has, in several processes: compiling takes most.

    Neighbours stay in one process, so that the few tests that need most of the memory run one after the other. Beside
    them small cases run under compute-sanitizer.
    """
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--import-mode=append"]
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    with ThreadPoolExecutor(len(files)) as pool:
        collected = list(
            pool.map(lambda file: output(*pytest, "--collect-only", str(file), environment=environment), files)
        )
    names: list[str] = []
    absent: list[str] = []
    for file, found in zip(files, collected, strict=True):
        if found is None:
            absent.append(f"{file.name} does not import here, so its tests are left out")
        else:
            names += [line for line in found.splitlines() if "::" in line]
    if not names:
        return "; ".join([*absent, "no GPU test can run here"])
    size = -(-len(names) // TEST_PROCESSES)
    shares = [names[first : first + size] for first in range(0, len(names), size)]
    commands = {f"tests {i}": [*pytest, "-rfEs", "--tb=short", "--maxfail=20", *each] for i, each in enumerate(shares)}
    commands |= checkers()
    logs = {name: LINKED.with_name(f"gpu-{name.replace(' ', '-')}.log") for name in commands}
    LINKED.parent.mkdir(exist_ok=True)
    # Freed memory of a cache is legal to touch for the checker, so it must be given back.
    bare = environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with ThreadPoolExecutor(len(commands)) as pool:
        notes = list(pool.map(lambda name: failed(name, commands[name], bare if name in CHECKERS else environment, end,
                                                  logs[name]), commands))  # fmt: skip
    texts = {name: log.read_text(errors="replace") for name, log in logs.items()}
    if "OUT" in os.environ:
        (KEPT / "tests.log").write_text("\n".join(f"==== {name}\n{text}" for name, text in texts.items()))
    for name, text in texts.items():
        print(f"{name}:", "\n".join(text.splitlines()[-25:]), flush=True)
    return "; ".join([*absent, *sorted(set(filter(None, notes)))])


def checkers() -> dict[str, list[str]]:
    """Return the commands that run small cases under compute-sanitizer, none where it is missing."""
    program = next(filter(None, map(shutil.which, SANITIZERS)), None)
    if program is None:
        print("compute-sanitizer is not here; nothing runs under it", flush=True)
        return {}
    driver = [sys.executable, str(ROOT / "tools" / "smallest.py")]
    return {tool: [program, "--tool", tool, "--error-exitcode", "9", *driver] for tool in CHECKERS}


def speeds(environment: dict[str, str], end: float) -> str:
    """Measure the operations."""
    command = [*benchmark("kernels", "kernels"), "--budget", f"{max(end - time.time() - LAST, 0):.0f}"]
    return failed("benchmarks kernels", command, environment, end)


def tables(environment: dict[str, str], began: float) -> None:
    """Print what is in the files that were written since, whatever was cut off: each table, then the bars."""
    files = [file for file in [*RESULTS.glob("*/*.json"), *KEPT.glob("*.json")] if file.stat().st_mtime >= began]
    measured = [str(file) for file in sorted(files) if json.loads(file.read_text()).get("benchmark") in SHOWN]
    if measured:
        command = [sys.executable, "-m", "benchmarks", "bars", "--tables", *measured]
        failed("the tables", command, environment, time.time() + LAST)


def pack(folder: Path | None = None) -> None:
    """Put what a folder holds (None: the results so far) into OUT as one file: what fetches it may take but a few."""
    folder = folder or KEPT
    if "OUT" not in os.environ or not folder.exists():
        return
    OUT.mkdir(parents=True, exist_ok=True)
    packed = OUT / f"{folder.name}.tar.gz"
    with tarfile.open(packed.with_suffix(".partial"), "w:gz") as archive:
        archive.add(folder, folder.name)
    packed.with_suffix(".partial").replace(packed)


def tune(environment: dict[str, str], end: float) -> str:
    """Measure the choices of each operation at real shapes; what runs after it reads them."""
    budget = f"{max(end - time.time() - LAST, 0):.0f}"
    note = failed("tuning", [sys.executable, "-m", "tools.tune", "--jobs", "10", "--budget", budget], environment, end)
    if "OUT" in os.environ:
        for file in (ROOT / "kernels" / "tuned").glob("*.json"):
            shutil.copy(file, KEPT / f"tuned-{file.name}")
    return note


def stages(environment: dict[str, str], end: float) -> str:
    """Measure steps and decodes of true size beside diffusers, profiled; each group is a process of its own."""
    notes = []
    for number, (parts, share) in enumerate(STAGES):
        until = time.time() + share * (end - time.time())
        budget = f"{max(until - time.time() - 2 * LAST, 0):.0f}"
        command = [*benchmark("published", f"published-{number}"), "--only", parts, "--profile", "--budget", budget]
        notes.append(failed(f"benchmarks published {parts}", [*command, *against(environment)], environment, until))
        pack()
    return "; ".join(filter(None, notes))


def latency(environment: dict[str, str], end: float, first: int = 0) -> str:
    """Measure the built-in model's first request beside its tenth, then sizes of published models, row by row."""
    command = [*benchmark("warm", "warm"), "--device", "cuda", "--engine", GRAPH, "--repeats", "1"]
    notes = [failed("benchmarks warm", command, environment, end)]
    for number, (model, sizes, frames, engines, rivals) in enumerate(LATENCY[first:], first + 1):
        what = f"latency, row {number}, {model} {sizes}"
        if (left := end - time.time() - LAST) < TO_BEGIN:
            notes.append(f"{what}: no time was left; --row {number} begins there")
            break
        command = [
            *benchmark("latency", f"latency-{number}"), "--model", f"{model}@random", "--device", "cuda",
            "--sizes", sizes, "--frames", frames, "--engines", engines, "--repeats", "2", "--together",
            "--budget", f"{left:.0f}", *against(environment, rivals),
        ]  # fmt: skip
        notes.append(failed(what, command, environment, end))
        pack()
    return "; ".join(filter(None, notes))


def demo(environment: dict[str, str], end: float) -> str:
    """Train the built-in model in its GPU size; goes on with what an earlier run left in the folder."""
    folder = ROOT / "out" / "demo-model"
    train = [sys.executable, "-m", "tools.demo_model", "train", "--size", "gpu", "--out", str(folder)]
    note = failed("training the demo model", train, environment, end)
    pack(folder)
    return note


def benchmark(name: str, kept: str) -> list[str]:
    """Return the command of a benchmark; its results are packed into OUT where that is set."""
    command = [sys.executable, "-m", "benchmarks", name]
    return [*command, "--json", str(KEPT / f"{kept}.json")] if "OUT" in os.environ else command


def against(environment: dict[str, str], rivals: str = "diffusers") -> list[str]:
    """Return the option that measures diffusers as well, where it is installed."""
    found = output(sys.executable, "-c", "import diffusers, accelerate", environment=environment)
    return [] if found is None else ["--against", rivals]


def failed(what: str, command: list[str], environment: dict[str, str], end: float, log: Path | None = None) -> str:
    """Run a command until `end` and return what went wrong, "" for nothing; its children end with it."""
    if end - time.time() < 1:
        return f"{what}: no time was left"
    with log.open("w") if log else nullcontext() as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=file, stderr=file)
    try:
        status = process.wait(end - time.time())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"{what}: out of time"
    return f"{what}: exit status {status}" if status else ""


def output(*command: str, environment: dict[str, str] | None = None) -> str | None:
    """Return what a command prints, None where it fails or takes minutes."""
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=QUESTION)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
