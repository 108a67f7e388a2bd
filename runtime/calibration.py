"""A short measurement of this machine, made once: how long each kind of operation takes, and what a process adds.

Kept as JSON per machine, threads, version of PyTorch and dtype in the cache folder. A first request is told by a brief
one, made in a second; whoever plans has the whole one made. What requests then take is held against it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from runtime.engines.store import cache_root
from runtime.machine import Measured, Rate, usable_memory
from runtime.measuring import measure_rates, read_rate
from runtime.model import DEMO, vae_dtype
from runtime.models import open_checkpoint
from runtime.models.costs import Shape
from runtime.offload import give_back_memory

FORMAT = 4
MISSED, IN_A_ROW = 1.5, 3  # so many requests that all took so many times what was foreseen, or so much less
SETTLED = 600.0  # seconds after which a calibration that misses is made anew

Effort = Literal["none", "brief", "whole", "anew"]  # what to measure where that has not been done; anew: in any case

PROCESS = """
import dataclasses, json, sys, torch, runtime
torch.set_num_threads(int(sys.argv[3]))
model = runtime.load("demo", device=sys.argv[1], dtype=sys.argv[2])
request = runtime.Request(prompt="a", width=32, height=32, num_frames=5, steps=2, seed=0)
runs = []
for take in range(4):
    asked = dataclasses.replace(request, prompt=f"take {take}", negative_prompt=f"not {take}")
    video = runtime.generate(model, asked, predict=False)
    for frame in video:
        pass
    runs.append(video.receipt.stages)
peaks = {name: runs[0][name].peak_bytes or 0 for name in ("text", "denoise", "decode")}
peaks |= {"step": peaks["denoise"], "encode": peaks["decode"]}
least = {name: min(stages[name].seconds for stages in runs[1:]) for name in ("text", "denoise", "decode")}
least["step"] = least["denoise"] / request.steps
print(json.dumps({"bytes": peaks, "seconds": least}))
"""

# What a brief measurement takes for granted, as found on a processor of 2025: seconds of Python around an operation,
# and bytes of a process with PyTorch.
GLUE = dict.fromkeys(("text", "step", "denoise", "decode", "encode"), 1e-4)
RESIDENT = dict.fromkeys(GLUE, 375 * 10**6)


@dataclass(frozen=True)
class Calibration:
    """What was measured: rates of operations, and bytes of the process itself per stage of a request."""

    rates: dict[str, Rate]
    resident: dict[str, int]
    glue: dict[str, float]  # seconds around each operation, per stage
    read: float  # bytes/s of weights from the system's file cache
    brief: bool = False  # the smaller operations once, and the rest taken for granted


def local(device: torch.device, dtype: torch.dtype, effort: Effort = "whole") -> Measured | None:
    """Return this machine's device as calibrated for models of a dtype; None where it is not, and nothing is measured.

    A brief calibration gives way to a whole one when that is asked for.
    """
    wide = vae_dtype(device, dtype)
    found = {kind: calibration(device, kind, effort) for kind in dict.fromkeys((wide, dtype))}
    own, vae = found[dtype], found[wide]
    if own is None or vae is None:
        return None
    return Measured(
        name=machine_name(device) + ", measured briefly" * own.brief,
        memory=usable_memory(device),
        rates=own.rates,
        vae_rates=vae.rates,
        residents=own.resident,
        glue=own.glue,
        read=own.read,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
        brief=own.brief or vae.brief,
    )


_known: dict[Path, Calibration] = {}


def calibration(device: torch.device, dtype: torch.dtype, effort: Effort = "whole") -> Calibration | None:
    """Return the calibration of a device for a dtype: from this process, from the cache, or measured now."""
    file = place(device, dtype)
    found = _known.get(file)
    if found is None or found.brief:
        found = _read(file) or found
    wanting = found is None or (found.brief and effort == "whole")
    if effort == "anew" or (wanting and effort != "none"):
        found = measured(device, dtype, brief=effort == "brief")
        _write(file, found, device, dtype)
    if found is not None:
        _known[file] = found
    return found


def measured(device: torch.device, dtype: torch.dtype, *, brief: bool) -> Calibration:
    """Measure a device; briefly: in a second, and what needs processes of their own is taken for granted."""
    rates = measure_rates(device, dtype, brief=brief)
    give_back_memory()  # of the operands, before a request's peak is measured
    if brief:
        return Calibration(rates, {} if device.type == "cuda" else RESIDENT, GLUE, read_rate(device, 1), brief=True)
    wide = vae_dtype(device, dtype)
    vae = None if wide == dtype else calibration(device, wide)
    resident, glue = built_in(device, dtype, rates, rates if vae is None else vae.rates)
    return Calibration(rates, resident, glue, read_rate(device))


def compare(device: torch.device, dtype: torch.dtype, ratio: float) -> bool:
    """Hold what a request took, in terms of what was foreseen, against the calibration; tell whether that is dropped.

    Where the last few requests all missed by much on one side, it was made while the machine was busy, or the machine
    is another by now: the next process that asks measures it anew.
    """
    files = {place(device, kind) for kind in (dtype, vae_dtype(device, dtype))}
    log = place(device, dtype).with_suffix(".ratios")
    with suppress(OSError):  # of a cache that others clean, or that is full: then nothing is learned from this request
        made = max(file.stat().st_mtime for file in files)
        ratios = [*_ratios(log, since=made), ratio][-IN_A_ROW:]
        missed = min(ratios) > MISSED or max(ratios) < 1 / MISSED
        if len(ratios) < IN_A_ROW or not missed or time.time() - made < SETTLED:
            log.write_text(" ".join(f"{each:.3f}" for each in ratios), encoding="utf-8")
            return False
        for file in (log, *files):
            file.unlink(missing_ok=True)
        return True
    return False


def _ratios(log: Path, since: float) -> list[float]:
    """Return what is kept of the last requests; nothing of before a time, or that cannot be read."""
    try:
        return [float(word) for word in log.read_text(encoding="utf-8").split()] if log.stat().st_mtime >= since else []
    except (FileNotFoundError, ValueError):
        return []


def place(device: torch.device, dtype: torch.dtype) -> Path:
    """Return the file of a calibration."""
    return cache_root() / "machine" / f"{key(device, dtype)}.json"


def key(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of a calibration: machine, threads, version of PyTorch, dtype."""
    parts = [machine_name(device), f"{threads(device)} threads", torch.__version__, str(dtype).removeprefix("torch.")]
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-")


def machine_name(device: torch.device) -> str:
    """Return the processor's model name, or its architecture where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def threads(device: torch.device) -> int:
    """Threads that compute: PyTorch's, as far as there are cores that this process may use."""
    if device.type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), cores)


def built_in(
    device: torch.device, dtype: torch.dtype, rates: dict[str, Rate], vae_rates: dict[str, Rate]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return what a run of the built-in model in a process of its own adds to the operations, per stage.

    Bytes of the process beside the model's (on a GPU none: PyTorch's allocator counts), and seconds around each
    operation: at the smallest size these are what is not explained by the operations themselves.
    """
    checkpoint = open_checkpoint(DEMO)
    costs, size = checkpoint.costs(), dtype.itemsize
    vae_size = vae_dtype(device, dtype).itemsize
    model = costs.transformer.bytes(size) + costs.vae.bytes(vae_size)
    kind = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", PROCESS, str(device), kind, str(torch.get_num_threads())]
        env = {**os.environ, "DIT_RUNTIME_CACHE": cache}
        found = _last_json(command, env)
    resident = {stage: max(peak - model - costs.text_encoder.bytes(size), 0) for stage, peak in found["bytes"].items()}
    latents, tokens = (2, 4, 4), 6  # of the request below
    works = {
        "text": [costs.text(tokens, size)] * 2,
        "step": [costs.forward(Shape(latents=latents, text=tokens, rows=2, itemsize=size))],
        "decode": [costs.decode(latents, None, vae_size)],
    }
    bare = Measured("", 0, rates, vae_rates)
    glue = {}
    for stage, parts in works.items():
        calls = sum(each.count for work in parts for each in work.operations)
        known = sum(bare.seconds(work, stage) for work in parts)
        glue[stage] = max(found["seconds"][stage] - known, 0.0) / calls
    glue |= {"denoise": glue["step"], "encode": glue["decode"]}
    return ({} if device.type == "cuda" else resident), glue


def _last_json(command: list[str], env: dict[str, str]) -> Any:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the built-in model did not run in a process of its own: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _read(file: Path) -> Calibration | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            return None
        rates = {
            kind: Rate(tuple(rate["weights"]), tuple(map(tuple, rate["curve"])), tuple(map(tuple, rate["samples"])))
            for kind, rate in found["rates"].items()
        }
        return Calibration(rates, found["resident"], found["glue"], found["read"], found.get("brief", False))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{file} is damaged ({error}); this machine is measured again", stacklevel=2)
        return None


def _write(file: Path, found: Calibration, device: torch.device, dtype: torch.dtype) -> None:
    """Publish a calibration atomically; a cache that cannot be written costs the next measurement."""
    record: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine_name(device),
        "threads": threads(device),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "rates": {kind: asdict(rate) for kind, rate in found.rates.items()},
        "resident": found.resident,
        "glue": found.glue,
        "read": found.read,
        "brief": found.brief,
    }
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        warnings.warn(f"{file} cannot be written ({error}); the machine is measured each time", stacklevel=2)
