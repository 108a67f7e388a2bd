"""How long each kind of operation takes here: calls of a few sizes, timed in turns, and the rates that explain them.

The operations' own public functions are called, so what they cost around their arithmetic counts too.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from runtime.kernels.attention import attention as attend
from runtime.kernels.causal_conv3d import causal_conv3d
from runtime.kernels.gate_residual import gate_residual
from runtime.kernels.modulate import modulate
from runtime.kernels.norm_silu import norm_silu
from runtime.kernels.qk_norm_rope import qk_norm_rope
from runtime.machine import Rate
from runtime.models.costs import Operation, attention, convolution, linear, sweep
from runtime.weights import pieces, publish

ROUNDS = 5
CURVES = ("modulate", "gate_residual", "qk_norm_rope", "norm_silu", "pass")  # kinds that only move bytes
SHORT = 2e-3  # seconds below which a case is called twice in its turn
BRIEF_BYTES, BRIEF_FLOPS = 2**25, 10**9  # of the largest case that a brief measurement takes: some milliseconds
DRAWN = 2**16  # different numbers among the operands, which need not all be drawn

Case = tuple[Operation, Callable[[], object]]
Draw = Callable[..., torch.Tensor]


@torch.inference_mode()
def measure_rates(device: torch.device, dtype: torch.dtype, *, brief: bool) -> dict[str, Rate]:
    """Return the rate of each kind of operation; briefly: each of the smaller cases once."""
    made = [each for each in cases(device, dtype) if not brief or small(each[0])]
    return fit(time_cases([(operation, make()) for operation, make in made], device, 1 if brief else ROUNDS))


def small(operation: Operation) -> bool:
    """Tell whether an operation takes a few milliseconds at most."""
    return operation.bytes <= BRIEF_BYTES and operation.flops <= BRIEF_FLOPS


def time_cases(made: list[Case], device: torch.device, rounds: int) -> list[tuple[Operation, float]]:
    """Return the least seconds of each case per call, since what disturbs only adds; the cases take turns."""
    samples: list[list[float]] = [[] for _ in made]
    for turn in range(rounds + 1):  # the first is not counted
        for (_, call), times in zip(made, samples, strict=True):
            if turn and times[-1] < SHORT:
                call()  # operands in the cache, as after the operation before
            times.append(timed(call, device))
    return [(op, min(times[1:]) / op.count) for (op, _), times in zip(made, samples, strict=True)]


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


def fit(samples: list[tuple[Operation, float]]) -> dict[str, Rate]:
    """Return the rate of each kind that explains its samples best, relative to their size."""
    found = {}
    for kind, group in itertools.groupby(sorted(samples, key=lambda s: (s[0].kind, s[0].bytes)), lambda s: s[0].kind):
        chosen = list(group)
        if kind in CURVES:
            found[kind] = Rate(curve=tuple((operation.bytes, seconds) for operation, seconds in chosen))
        else:
            bare = Rate(weights=_weights(chosen))
            ratios = tuple((op.flops + op.idle, op.bytes, seconds / sum(bare.parts(op))) for op, seconds in chosen)
            found[kind] = replace(bare, samples=ratios)
    return found


def _weights(samples: list[tuple[Operation, float]]) -> tuple[float, float, float, float]:
    """Return the non-negative weights of (call, FLOPs, bytes, scores) with the least relative squares."""
    seconds = np.array([each for _, each in samples])
    features = np.array([[1.0, op.flops + op.idle, op.bytes, op.scores] for op, _ in samples]) / seconds[:, None]
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


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Operation, Callable[[], Callable[[], object]]]]:
    """Yield operations with what makes a call of them, from a few microseconds to some ten milliseconds; longer ones on
    a GPU."""
    size, more = dtype.itemsize, 1 if device.type == "cpu" else 16
    numbers = torch.randn(DRAWN, device=device)

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        count = math.prod(shape)
        return numbers.to(kind).repeat(-(-count // DRAWN))[:count].view(shape)

    for rows, inputs, outputs in (
        (1, 256, 1536), (64, 256, 256), (320, 256, 768), (320, 768, 256), (64, 768, 2304), (1280, 768, 768),
        (640, 768, 2048), (640, 2048, 768), (320, 1536, 1536), (2560, 256, 256), (5120, 64, 256), (5120, 32, 96),
    ):  # fmt: skip
        yield linear(rows * more, inputs, outputs, size), partial(_linear, draw, rows * more, inputs, outputs)
    for length, keys, heads, width in (
        (80, 80, 4, 64), (320, 16, 4, 64), (320, 320, 4, 64), (1280, 64, 4, 64), (640, 640, 12, 64),
        (1280, 1280, 4, 64), (640, 640, 4, 128), (64, 64, 1, 64), (256, 256, 1, 128), (1024, 1024, 1, 128),
    ):  # fmt: skip
        operation = attention(length * more, keys * more, heads, width, size)
        yield operation, partial(_attention, draw, length * more, keys * more, (heads, width))
    for rows, width in ((16, 256), (160, 256), (640, 256), (640, 768), (2560, 768), (8192, 768), (16384, 768)):
        for kind, moved, call in (
            ("modulate", 2, _modulate), ("gate_residual", 3, _gate_residual), ("pass", 2, _pass),
            ("qk_norm_rope", 4, _qk_norm_rope),
        ):  # fmt: skip
            if kind != "qk_norm_rope" or rows <= 8192:
                yield sweep(kind, moved * rows * more * width, size), partial(call, draw, rows * more, width)
    for channels, frames, side in ((64, 1, 8), (64, 2, 16), (32, 4, 32), (16, 4, 64), (32, 4, 64), (32, 4, 128),
                                   (32, 4, 256)):  # fmt: skip
        operation = sweep("norm_silu", 2 * channels * frames * more * side**2, size, count=2)
        yield operation, partial(_norm_silu, draw, channels, frames * more, side)
    for inputs, outputs, frames, side in (
        (16, 16, 4, 64), (16, 16, 4, 128), (32, 32, 2, 32), (32, 32, 4, 128), (64, 64, 1, 8), (64, 64, 2, 32),
        (64, 64, 4, 32), (128, 128, 1, 16), (128, 128, 2, 16), (128, 64, 2, 32), (96, 96, 1, 64),
        (32, 32, 4, 256), (16, 3, 4, 64), (32, 3, 4, 128), (64, 12, 4, 32), (3, 16, 4, 64), (3, 32, 4, 128),
        (12, 32, 4, 64),
    ):  # fmt: skip
        operation = convolution("convolution", frames * more * side * side, 27, inputs, outputs, size).times(2)
        yield operation, partial(_convolution, draw, (inputs, outputs), frames * more, side)
    for inputs, outputs, frames, side in ((64, 32, 1, 8), (64, 32, 2, 16), (32, 16, 4, 32), (128, 64, 4, 16),
                                          (64, 32, 4, 64)):  # fmt: skip
        operation = convolution("upsample", frames * more * side * side, 16, inputs, outputs, size)
        yield operation, partial(_upsample, draw, (inputs, outputs), frames * more, side)


def _linear(draw: Draw, rows: int, inputs: int, outputs: int) -> Callable[[], object]:
    return partial(F.linear, draw(1, rows, inputs), draw(outputs, inputs), draw(outputs))


def _attention(draw: Draw, length: int, keys: int, heads: tuple[int, int]) -> Callable[[], object]:
    return partial(attend, draw(1, length, *heads), draw(1, keys, *heads), draw(1, keys, *heads))


def _modulate(draw: Draw, rows: int, width: int) -> Callable[[], object]:
    vector = draw(1, 1, width, kind=torch.float32)
    return partial(modulate, draw(1, rows, width), vector, vector)


def _gate_residual(draw: Draw, rows: int, width: int) -> Callable[[], object]:
    vector = draw(1, 1, width, kind=torch.float32)
    return partial(gate_residual, draw(1, rows, width), draw(1, rows, width), vector)


def _pass(draw: Draw, rows: int, width: int) -> Callable[[], object]:
    return partial(torch.mul, draw(1, rows, width), 0.5)


def _qk_norm_rope(draw: Draw, rows: int, width: int) -> Callable[[], object]:
    qkv, rope = draw(1, rows, 3 * width), draw(rows, 32, 2, kind=torch.float32)
    gain = draw(width, kind=torch.float32)
    return partial(qk_norm_rope, qkv, gain, gain, rope, heads=width // 64, eps=1e-6)


def _norm_silu(draw: Draw, channels: int, frames: int, side: int) -> Callable[[], object]:
    """Two norms, the second in place, as in a residual block."""
    x = draw(1, channels, frames, side, side).contiguous(memory_format=torch.channels_last_3d)
    gamma = draw(channels)
    return lambda: norm_silu(norm_silu(x, gamma), gamma, inplace=True)


def _convolution(draw: Draw, widths: tuple[int, int], frames: int, side: int) -> Callable[[], object]:
    """Two causal convolutions of 3 x 3 x 3 taps in the layout that the autoencoder has, the second added to the
    result of the first, as in a residual block."""
    inputs, outputs = widths
    x = draw(1, inputs, frames, side, side).contiguous(memory_format=torch.channels_last_3d)
    before = draw(1, inputs, 2, side, side).contiguous(memory_format=torch.channels_last_3d)
    weight = draw(3, outputs, 3, 3, inputs).permute(1, 4, 0, 2, 3)
    return lambda: causal_conv3d(x, weight, None, before, residual=causal_conv3d(x, weight, None, before), inplace=True)


def _upsample(draw: Draw, widths: tuple[int, int], frames: int, side: int) -> Callable[[], object]:
    inputs, outputs = widths
    x = draw(frames, inputs, side, side).contiguous(memory_format=torch.channels_last)
    weight = draw(4, inputs, 4, outputs).permute(1, 3, 0, 2)
    return partial(F.conv_transpose2d, x, weight, stride=2, padding=1)
