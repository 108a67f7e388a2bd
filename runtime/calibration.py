"""A short measurement of this machine, made once: how long each kind of operation takes at a few sizes.

Kept as JSON per machine, threads, version of PyTorch and dtype in the cache folder. The operations' own public
functions are measured, so what they cost around their arithmetic counts too.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from runtime.engines.store import cache_root
from runtime.kernels.attention import attention as attend
from runtime.kernels.causal_conv3d import causal_conv3d
from runtime.kernels.gate_residual import gate_residual
from runtime.kernels.modulate import modulate
from runtime.kernels.norm_silu import norm_silu
from runtime.kernels.qk_norm_rope import qk_norm_rope
from runtime.machine import Measured, Rate, host_memory
from runtime.model import DEMO
from runtime.models import open_checkpoint
from runtime.models.costs import Operation, Shape, attention, convolution, linear, sweep
from runtime.weights import pieces, publish

FORMAT = 2
ROUNDS = 5
CURVES = ("modulate", "gate_residual", "qk_norm_rope", "norm_silu", "pass")  # kinds that only move bytes
AUTOENCODER = ("convolution", "narrow", "upsample", "norm_silu")  # kinds that it alone has

BRIEF = 2e-3  # seconds below which a case is called twice in its turn
PROCESS = """
import dataclasses, json, sys, torch, runtime
torch.set_num_threads(int(sys.argv[3]))
model = runtime.load("demo", device=sys.argv[1], dtype=sys.argv[2])
request = runtime.Request(prompt="a", width=32, height=32, num_frames=5, steps=2, seed=0)
runs = []
for take in range(4):
    video = runtime.generate(model, dataclasses.replace(request, prompt=f"take {take}", negative_prompt=f"not {take}"))
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
# and bytes of a process with PyTorch, with the libraries that cut and encode text beside it or not.
GLUE = dict.fromkeys(("text", "step", "denoise", "decode", "encode"), 1e-4)
RESIDENT = {**dict.fromkeys(GLUE, 490 * 10**6), **{f"known {stage}": 375 * 10**6 for stage in GLUE}}

Case = tuple[Operation, Callable[[], object]]


@dataclass(frozen=True)
class Calibration:
    """What was measured: rates of operations, and bytes of the process itself per stage of a request."""

    rates: dict[str, Rate]
    resident: dict[str, int]
    glue: dict[str, float]  # seconds around each operation, per stage
    read: float  # bytes/s of weights from the system's file cache
    brief: bool = False  # each operation once, and the rest taken for granted


def local(device: torch.device, dtype: torch.dtype, *, measure: bool = True) -> Measured | None:
    """Return this machine's device as calibrated for models of a dtype; the autoencoder computes in float32.

    Without `measure`, None where that has not been measured before.
    """
    own, wide = calibration(device, dtype, measure), calibration(device, torch.float32, measure)
    if own is None or wide is None:
        return None
    rates = own.rates | {kind: wide.rates[kind] for kind in AUTOENCODER}
    memory, capability = host_memory(), (0, 0)
    if device.type == "cuda":
        memory, capability = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_capability(device)
    name = f"{machine_name(device)}{', measured briefly' if own.brief else ''}"
    return Measured(name, memory, rates, own.resident, own.glue, own.read, capability)


_known: dict[Path, Calibration] = {}


def measure_briefly(device: torch.device, dtype: torch.dtype) -> bool:
    """Measure a CPU in a second or two, where it has not been measured before, for this process until it is measured
    whole; return whether that is still to be done."""
    for kind in {dtype, torch.float32}:
        if calibration(device, kind, measure=False) is None:
            rates = fit(time_cases(device, kind, rounds=1))
            _known[place(device, kind)] = Calibration(rates, RESIDENT, GLUE, read_rate(device, rounds=1), brief=True)
    return any(_known[place(device, kind)].brief for kind in (dtype, torch.float32))


def place(device: torch.device, dtype: torch.dtype) -> Path:
    """Return the file of a calibration."""
    return cache_root() / "machine" / f"{key(device, dtype)}.json"


def calibration(device: torch.device, dtype: torch.dtype, measure: bool) -> Calibration | None:
    """Return the calibration of a device for a dtype: from this process, from the cache, or measured now."""
    file = place(device, dtype)
    if file not in _known or (measure and _known[file].brief):
        found = _read(file)
        if found is None:
            if not measure:
                return None
            rates = fit(time_cases(device, dtype))
            resident, glue = built_in(device, dtype, rates)
            found = Calibration(rates, resident, glue, read_rate(device))
            _write(file, found, device, dtype)
        _known[file] = found
    return _known[file]


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


@torch.inference_mode()
def time_cases(device: torch.device, dtype: torch.dtype, rounds: int = ROUNDS) -> list[tuple[Operation, float]]:
    """Return the median seconds of each case; the cases take turns, so that what disturbs meets all of them."""
    made = list(cases(device, dtype))
    samples: list[list[float]] = [[] for _ in made]
    for turn in range(rounds + 1):  # the first is not counted
        for (_, call), times in zip(made, samples, strict=True):
            if turn and times[-1] < BRIEF:
                call()  # operands in the cache, as after the operation before
            seconds = timed(call, device)
            times.append(seconds)
    return [(operation, statistics.median(times[1:])) for (operation, _), times in zip(made, samples, strict=True)]


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call until its results are there."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def read_rate(device: torch.device, rounds: int = ROUNDS) -> float:
    """Return bytes/s at which weights come: of a file that the system has in memory; over the link, on a GPU."""
    if device.type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        return host.nbytes / min(timed(partial(host.to, device), device) for _ in range(rounds))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        publish(file, {str(i): torch.zeros(2**22) for i in range(4)}, {})
        place = torch.empty(2**22)

        def read() -> None:
            for _, _, _, piece in pieces((file,)):
                place[: len(piece)].copy_(piece)

        return file.stat().st_size / statistics.median(timed(read, device) for _ in range(rounds))


def built_in(
    device: torch.device, dtype: torch.dtype, rates: dict[str, Rate]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return what a run of the built-in model in a process of its own adds to the operations, per stage.

    Bytes of the process beside the model's (on a GPU none: PyTorch's allocator counts), and seconds around each
    operation: at the smallest size these are what is not explained by the operations themselves.
    """
    checkpoint = open_checkpoint(DEMO)
    costs, size = checkpoint.costs(), dtype.itemsize
    model = costs.transformer.bytes(size) + costs.vae.bytes(4)
    kind = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", PROCESS, str(device), kind, str(torch.get_num_threads())]
        env = {**os.environ, "DIT_RUNTIME_CACHE": cache}
        first, second = (_last_json(command, env) for _ in range(2))  # the second finds the text in the cache
    resident = {stage: max(peak - model - costs.text_encoder.bytes(size), 0) for stage, peak in first["bytes"].items()}
    resident |= {f"known {stage}": max(peak - model, 0) for stage, peak in second["bytes"].items()}
    latents, tokens = (2, 4, 4), 6  # of the request below
    works = {
        "text": [costs.text(tokens, size)] * 2,
        "step": [costs.forward(Shape(latents=latents, text=tokens, rows=2, itemsize=size))],
        "decode": [costs.decode(latents, None, 4)],
    }
    bare = Measured("", 0, rates)
    glue = {}
    for stage, parts in works.items():
        calls = sum(each.count for work in parts for each in work.operations)
        known = sum(bare.seconds(work, stage) for work in parts)
        glue[stage] = max(first["seconds"][stage] - known, 0.0) / calls
    glue |= {"denoise": glue["step"], "encode": glue["decode"]}
    return ({} if device.type == "cuda" else resident), glue


def _last_json(command: list[str], env: dict[str, str]) -> Any:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the built-in model did not run in a process of its own: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fit(samples: list[tuple[Operation, float]]) -> dict[str, Rate]:
    """Return the rate of each kind that explains its samples best, relative to their size."""
    found = {}
    for kind, group in itertools.groupby(sorted(samples, key=lambda s: (s[0].kind, s[0].bytes)), lambda s: s[0].kind):
        chosen = list(group)
        if kind in CURVES:
            found[kind] = Rate(curve=tuple((operation.bytes, seconds) for operation, seconds in chosen))
        else:
            found[kind] = Rate(weights=_weights(chosen))
    return found


def _weights(samples: list[tuple[Operation, float]]) -> tuple[float, float, float, float]:
    """Return the non-negative weights of (call, FLOPs, bytes, scores) with the least relative squares."""
    seconds = np.array([each for _, each in samples])
    features = np.array([[1.0, op.flops, op.bytes, op.scores] for op, _ in samples]) / seconds[:, None]
    best, least = np.zeros(4), math.inf
    for size in range(1, 5):
        for chosen in itertools.combinations(range(4), size):
            part = features[:, chosen]
            scale = np.abs(part).max(axis=0)
            if not scale.all():
                continue
            solved = np.linalg.lstsq(part / scale, np.ones(len(seconds)), rcond=None)[0] / scale
            error = float(np.square(part @ solved - 1).sum())
            if (solved >= 0).all() and error < least:
                best, least = np.zeros(4), error
                best[list(chosen)] = solved
    call, flops, moved, scores = best.tolist()
    return call, flops, moved, scores


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield operations with calls of them, from a few microseconds to some ten milliseconds; longer ones on a GPU."""
    size, more = dtype.itemsize, 1 if device.type == "cpu" else 16

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(kind)

    for rows, inputs, outputs in (
        (1, 256, 1536), (64, 256, 256), (320, 256, 768), (320, 768, 256), (64, 768, 2304), (1280, 768, 768),
        (640, 768, 2048), (640, 2048, 768), (320, 1536, 1536), (2560, 256, 256), (5120, 64, 256), (5120, 32, 96),
    ):  # fmt: skip
        rows *= more
        args = draw(1, rows, inputs), draw(outputs, inputs), draw(outputs)
        yield linear(rows, inputs, outputs, size), partial(F.linear, *args)
    for length, keys, heads, width in (
        (80, 80, 4, 64), (320, 16, 4, 64), (320, 320, 4, 64), (1280, 64, 4, 64), (640, 640, 12, 64),
        (1280, 1280, 4, 64), (640, 640, 4, 128), (64, 64, 1, 64), (256, 256, 1, 128), (1024, 1024, 1, 128),
    ):  # fmt: skip
        length, keys = length * more, keys * more
        q, k, v = draw(1, length, heads, width), draw(1, keys, heads, width), draw(1, keys, heads, width)
        yield attention(length, keys, heads, width, size), partial(attend, q, k, v)
    yield from _sweeps(draw, size, more)
    for inputs, outputs, frames, side in (
        (16, 16, 4, 64), (16, 16, 4, 128), (32, 32, 2, 32), (32, 32, 4, 128), (64, 64, 1, 8), (64, 64, 2, 32),
        (64, 64, 4, 32), (128, 128, 1, 16), (128, 128, 2, 16), (128, 64, 2, 32), (96, 96, 1, 64),
        (16, 3, 4, 64), (32, 3, 4, 128), (64, 12, 4, 32), (3, 16, 4, 64), (3, 32, 4, 128),
    ):  # fmt: skip
        yield _convolution(draw, (inputs, outputs), frames * more, side, size)
    for inputs, outputs, frames, side in ((64, 32, 1, 8), (64, 32, 2, 16), (32, 16, 4, 32), (128, 64, 4, 16),
                                          (64, 32, 4, 64)):  # fmt: skip
        frames *= more
        x = draw(frames, inputs, side, side).contiguous(memory_format=torch.channels_last)
        weight = draw(4, inputs, 4, outputs).permute(1, 3, 0, 2)
        call = partial(F.conv_transpose2d, x, weight, stride=2, padding=1)
        yield convolution("upsample", frames * side * side, 16, inputs, outputs, size), call


def _sweeps(draw: Callable[..., torch.Tensor], size: int, more: int) -> Iterator[Case]:
    for rows, width in ((16, 256), (160, 256), (640, 256), (640, 768), (2560, 768), (8192, 768), (16384, 768)):
        rows *= more
        x, y, vector = draw(1, rows, width), draw(1, rows, width), draw(1, 1, width, kind=torch.float32)
        yield sweep("modulate", 2 * rows * width, size), partial(modulate, x, vector, vector)
        yield sweep("gate_residual", 3 * rows * width, size), partial(gate_residual, x, y, vector)
        yield sweep("pass", 2 * rows * width, size), partial(torch.mul, x, 0.5)
        if rows <= 8192 * more:
            qkv, rope = draw(1, rows, 3 * width), draw(rows, 32, 2, kind=torch.float32)
            gain = draw(width, kind=torch.float32)
            call = partial(qk_norm_rope, qkv, gain, gain, rope, heads=width // 64, eps=1e-6)
            yield sweep("qk_norm_rope", 4 * rows * width, size), call
    for channels, frames, side in ((64, 1, 8), (64, 2, 16), (32, 4, 32), (16, 4, 64), (32, 4, 64), (32, 4, 128),
                                   (32, 4, 256)):  # fmt: skip
        x = draw(1, channels, frames * more, side, side).contiguous(memory_format=torch.channels_last_3d)
        gamma = draw(channels)
        yield sweep("norm_silu", 2 * x.numel(), size), partial(norm_silu, x, gamma)


def _convolution(draw: Callable[..., torch.Tensor], widths: tuple[int, int], frames: int, side: int, size: int) -> Case:
    """A causal convolution of 3 x 3 x 3 taps in the layout that the autoencoder has."""
    inputs, outputs = widths
    x = draw(1, inputs, frames, side, side).contiguous(memory_format=torch.channels_last_3d)
    before = draw(1, inputs, 2, side, side).contiguous(memory_format=torch.channels_last_3d)
    weight = draw(3, outputs, 3, 3, inputs).permute(1, 4, 0, 2, 3)
    operation = convolution("convolution", frames * side * side, 27, inputs, outputs, size)
    return operation, partial(causal_conv3d, x, weight, None, before)


def _read(file: Path) -> Calibration | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            return None
        rates = {
            kind: Rate(tuple(rate["weights"]), tuple((a, b) for a, b in rate["curve"]))
            for kind, rate in found["rates"].items()
        }
        return Calibration(rates, found["resident"], found["glue"], found["read"])
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
        "rates": {kind: {"weights": rate.weights, "curve": rate.curve} for kind, rate in found.rates.items()},
        "resident": found.resident,
        "glue": found.glue,
        "read": found.read,
    }
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        warnings.warn(f"{file} cannot be written ({error}); the machine is measured each time", stacklevel=2)
