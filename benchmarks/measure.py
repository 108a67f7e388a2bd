"""Measuring: alternating samples, whether two results are equal, and the memory that a call adds."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

FRAME_LIMIT = 1.0  # of 255: a sum in another order may fall on the other side of a rounding
TENSOR_LIMIT = 1e-3  # of the largest number
PSNR_LIMIT = 50.0  # dB; what a rounded decode must keep


class Refused(Exception):
    """The sides' results differ, so their speeds say nothing."""


def alternate(calls: Sequence[Callable[[int], object]], takes: Sequence[int]) -> list[list[float]]:
    """Return the seconds of each call for every take, the calls one after the other within each take."""
    seconds: list[list[float]] = [[] for _ in calls]
    for take in takes:
        for samples, call in zip(seconds, calls, strict=True):
            gc.collect()  # so that none pays for what the other left
            _wait()
            began = time.perf_counter()
            call(take)
            _wait()
            samples.append(time.perf_counter() - began)
    return seconds


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median over pairs of theirs / ours: what both met in a pair, such as a busy machine, cancels."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def check_equal(what: str, ours: Any, theirs: Any) -> float:
    """Return how far two results are apart: uint8 frames in steps of 255, tensors relative to theirs' largest number.

    Both may be lists, the worst entry counts. Raises Refused where that is more than rounding.
    """
    if isinstance(ours, list):
        return max(check_equal(what, a, b) for a, b in zip(ours, theirs, strict=True))
    if tuple(ours.shape) != tuple(theirs.shape):
        raise Refused(f"the {what} has shape {list(ours.shape)} here and {list(theirs.shape)} there")
    if isinstance(ours, np.ndarray):
        found, limit, unit = float(np.abs(ours.astype(int) - theirs.astype(int)).max()), FRAME_LIMIT, " of 255"
    else:
        a, b = ours.cpu().double(), theirs.cpu().double()
        found, limit, unit = float((a - b).abs().max() / b.abs().max()), TENSOR_LIMIT, ""
    if not found <= limit:  # also refuses NaN
        raise Refused(f"the {what} differs by up to {found:g}{unit}; equal means {limit:g} at most")
    return found


def check_psnr(found: float) -> float:
    """Return a PSNR in dB; Refused where it is below the bar."""
    if not found >= PSNR_LIMIT:  # also refuses NaN
        raise Refused(f"the rounded result keeps {found:.1f} dB; the bar is {PSNR_LIMIT:g} dB")
    return found


class FreshProcess:
    """A new process, whose heap nothing else has grown, that runs functions of modules until it is told to end."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.pool.submit(function, *arguments).result()

    def end(self) -> None:
        """End it when what it does is done."""
        self.pool.shutdown()


def fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns in a new process."""
    process = FreshProcess()
    try:
        return process(function, *arguments)
    finally:
        process.end()


def peak_growth(call: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Return the bytes resident before a call and the most that it added; on a GPU, of allocated device memory.

    None where the system tells neither (other than Linux, without a GPU).
    """
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        try:
            with suppress(OSError, AttributeError):  # another C library: what loading freed may stay resident
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
        except OSError:
            return None
    # The runtime's own spans lower the high-water mark that is read here at the end, so they must not.
    with mock.patch("runtime.trace._reset_peak"):
        call()
    peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    return {"before": before, "growth": max(peak - before, 0)}


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
