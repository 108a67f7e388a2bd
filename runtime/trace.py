"""Spans: one name for a stage in the receipt, in Nsight (NVTX) and in metrics."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Stage:
    """What one stage took, summed over its calls."""

    seconds: float = 0.0
    calls: int = 0
    peak_bytes: int | None = None  # highest resident memory of the process during it; on a GPU, allocated device memory


Stages = dict[str, Stage]
_recorder: ContextVar[Stages | None] = ContextVar("recorder", default=None)
_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


@contextmanager
def recording(stages: Stages, notes: list[str] | None = None) -> Iterator[None]:
    """Let the spans inside add to `stages`, and what is noted to `notes`."""
    token, kept = _recorder.set(stages), _notes.set(notes)
    try:
        yield
    finally:
        _recorder.reset(token)
        _notes.reset(kept)


def note(sentence: str) -> None:
    """Say once, in the receipt's notes or else as a warning, what the user should know, such as a fallback."""
    notes = _notes.get()
    if notes is None:
        warnings.warn(sentence, stacklevel=2)
    elif sentence not in notes:
        notes.append(sentence)


@contextmanager
def span(name: str, *, memory: bool = False) -> Iterator[None]:
    """Time what is inside under `name`; with `memory`, also its peak. Spans with `memory` do not nest."""
    cuda = torch.cuda.is_initialized()
    if cuda:
        torch.cuda.nvtx.range_push(name)
    if memory:
        _reset_peak(cuda)
    began = time.perf_counter()
    try:
        yield
        if cuda and memory:
            torch.cuda.synchronize()
    finally:
        seconds = time.perf_counter() - began
        if cuda:
            torch.cuda.nvtx.range_pop()
        if (stages := _recorder.get()) is not None:
            stage = stages.setdefault(name, Stage())
            stage.seconds += seconds
            stage.calls += 1
            if memory and (peak := _peak(cuda)) is not None:
                stage.peak_bytes = max(stage.peak_bytes or 0, peak)


def _reset_peak(cuda: bool) -> None:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux lets a process lower its own high-water mark; elsewhere the mark is since the process began.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(cuda: bool) -> int | None:
    if cuda:
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    if os.name == "posix":
        import resource
        import sys

        high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return high if sys.platform == "darwin" else high * 1024
    return None
