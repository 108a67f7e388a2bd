"""Which machine and which code: what stands over every table and in every file of results."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from runtime.kernels import tuning

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "diffusers", "transformers", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """Return name, cores, threads, versions and commit."""
    cuda = device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "device": device.type,
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "clocks": gpu_state() if cuda else cpu_state(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # processes that wanted a core before
    }


def gpu_state() -> dict[str, str] | None:
    """Return the GPU's driver, clocks, power limit and temperature now; None where the driver does not tell."""
    asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(asked, (value.strip() for value in done.stdout.strip().split(",")), strict=True))


def cpu_state() -> dict[str, str] | None:
    """Return the slowest and the fastest core's clock now, and the governor; None where the system does not tell."""
    found = {}
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        if clocks := sorted(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")):
            found["clock"] = f"{clocks[0]:.0f} to {clocks[-1]:.0f} MHz"
    with suppress(OSError):
        governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text()
        found["governor"] = governor.strip()
    return found or None


def told(machine: dict[str, Any]) -> str:
    """Return what stands above a table: the machine, versions, the commit, clocks where they are known."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    clocks = ", ".join(f"{name} {value}" for name, value in (machine.get("clocks") or {}).items())
    return ", ".join(filter(None, [machine["name"], packages, f"commit {machine['commit']}", clocks]))


def results_file(machine: dict[str, Any]) -> Path:
    """Return a name that is still free: benchmarks/results/<device>/<date>-<commit>.json; a GPU is named as its tuned
    file is, such as h200."""
    name = machine["name"]
    on_cpu = machine["device"] == "cpu"
    folder = RESULTS / (slug(f"cpu {name} {machine['logical_cores']} cores") if on_cpu else tuning.slug(name))
    stem = f"{machine['date'][:10]}-{machine['commit']}"
    file, count = folder / f"{stem}.json", 1
    while file.exists():
        count += 1
        file = folder / f"{stem}-{count}.json"
    return file


def opened(
    benchmark: str, asked: dict[str, Any], machine: dict[str, Any], resume: Path | None, file: Path | None
) -> tuple[dict[str, Any], Path]:
    """Return the record of a benchmark, as far as an earlier run came, and its file.

    ValueError where the file to go on from was measured with other settings, by other code, or on another machine.
    """
    if resume is None:
        return {"benchmark": benchmark, "machine": machine, "asked": asked, "rows": []}, file or results_file(machine)
    record = json.loads(resume.read_text(encoding="utf-8"))
    then = record.get("machine", {})
    same = {key: then.get(key) == machine[key] for key in ("name", "commit", "versions")}
    same["settings"] = record.get("asked") == asked
    if differing := [key for key, equal in same.items() if not equal]:
        raise ValueError(f"{resume} was measured with another {', '.join(differing)}; begin anew without --resume")
    return record, file or resume


def keep(record: dict[str, Any], file: Path) -> None:
    """Write results, whole or not at all; the listing of those in the repository follows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    if file.resolve().is_relative_to(RESULTS):
        (RESULTS / "README.md").write_text(listing(), encoding="utf-8")


def listing() -> str:
    """Return the table of the results in the repository, the newest first."""
    found = []
    for file in RESULTS.glob("*/*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if "benchmark" not in record:  # what `tools.demo_model` has written
            continue
        about = record["machine"]
        cells = [
            about.get("date", "")[:10],
            record["benchmark"],
            about.get("name", ""),
            about.get("commit", ""),
        ]
        name = file.relative_to(RESULTS).as_posix()
        found.append((about.get("date", ""), f"| {' | '.join(map(str, cells))} | [{name}]({name}) |"))
    lines = [line for _, line in sorted(found, reverse=True)]
    head = ["| date | benchmark | machine | commit | file |", "| --- | --- | --- | --- | --- |"]
    intro = (
        "Written by `python -m benchmarks`; `python -m benchmarks compare A.json B.json` says what changed between two."
    )
    return "\n".join(["# Results", "", intro, "", *head, *lines]) + "\n"


def slug(name: str) -> str:
    """Return a name as lower-case words joined by dashes, without trade marks."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", " ", name.lower())).strip("-")


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Return the short commit of what is measured, with "-changed" where the files differ from it.

    A copy without a repository is told it in the variable COMMIT.
    """
    paths = ["runtime", "kernels", "csrc", "benchmarks", ":!benchmarks/results"]
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return os.environ.get("COMMIT", "unknown")
    return f"{head}-changed" if _git("status", "--porcelain", "--", *paths) else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
