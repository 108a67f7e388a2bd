"""Spans: one name for a stage in the receipt, in profilers (NVTX, PyTorch's) and in metrics.

NVTX ranges are in the domain `dit-runtime`, coloured by stage, with the step's, block's or chunk's number as payload;
they need the package nvtx (extra [nvtx]). Where no profiler listens, none is made.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

try:
    import nvtx
except ImportError:  # the extra [nvtx] brings it
    nvtx = None

DOMAIN = "dit-runtime"
TOOL = "NVTX_INJECTION64_PATH"  # the environment variable by which a profiler attaches to NVTX
COLOURS = {
    "request": 0x616161, "load": 0x9E9E9E, "text": 0x1E88E5, "encode": 0x00ACC1, "denoise": 0xFB8C00,
    "decode": 0x43A047, "save": 0x8E24AA,
}  # fmt: skip


@dataclass
class Stage:
    """What one stage took, summed over its calls."""

    seconds: float = 0.0
    calls: int = 0
    peak_bytes: int | None = None  # highest resident memory of the process during it; on a GPU, allocated device memory


Stages = dict[str, Stage]
_recorder: ContextVar[Stages | None] = ContextVar("recorder", default=None)
_watchers: list[Callable[[str, bool], None]] = []
_quiet = nullcontext()
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
def span(name: str, *, memory: bool = False, waits: bool = True, number: int | None = None) -> Iterator[None]:
    """Time what is inside under `name`; with `memory`, also its peak. Spans with `memory` do not nest.

    With `memory` a GPU's work is waited for at the end, unless `waits` is off: what is inside does so where it must.
    `number` tells profilers which one it is of several.
    """
    for watch in _watchers:
        watch(name, True)
    cuda = torch.cuda.is_initialized()
    if memory:
        _reset_peak(cuda)
    began = time.perf_counter()
    try:
        with mark(name, number):
            yield
            if cuda and memory and waits:
                torch.cuda.synchronize()
    finally:
        seconds = time.perf_counter() - began
        for watch in _watchers:
            watch(name, False)
        if (stages := _recorder.get()) is not None:
            stage = stages.setdefault(name, Stage())
            stage.seconds += seconds
            stage.calls += 1
            if memory and (peak := _peak(cuda)) is not None:
                stage.peak_bytes = max(stage.peak_bytes or 0, peak)


@contextmanager
def watched(watch: Callable[[str, bool], None]) -> Iterator[None]:
    """Call `watch(name, entered)` when any thread's span begins and ends."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def mark(name: str, number: int | None = None) -> AbstractContextManager[None]:
    """Return a range for profilers alone, not for receipts: what is inside is too short or too frequent for these."""
    if torch.compiler.is_compiling():
        return nullcontext()
    if _domain is None and not torch.autograd.profiler._is_profiler_enabled:
        return _quiet
    return Mark(name, number)


class Mark(AbstractContextManager[None]):
    """A range that NVTX and PyTorch's profiler are told of."""

    def __init__(self, name: str, number: int | None) -> None:
        self.name, self.number = name, number
        self.function: Any = None

    def __enter__(self) -> None:
        if _domain is not None:
            _domain.push_range(_attributes(self.name, self.number))
        if torch.autograd.profiler._is_profiler_enabled:
            label = None if self.number is None else str(self.number)
            self.function = torch.profiler.record_function(self.name, label)
            self.function.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.function is not None:
            self.function.__exit__(*error)
        if _domain is not None:
            _domain.pop_range()


def _find_domain() -> Any:
    """Return our NVTX domain where a tool listens to it."""
    if nvtx is None:
        return None
    found = nvtx.get_domain(DOMAIN)
    if not isinstance(found, nvtx.Domain) and TOOL in os.environ:
        # Nsight Systems 2022.4 and 2023.4 call every domain disabled, and record those that do not ask.
        found = object.__new__(nvtx.Domain)
        found.handle = nvtx._lib.lib.DomainHandle(DOMAIN)
        nvtx.Domain.__init__(found, DOMAIN)
    return found if isinstance(found, nvtx.Domain) else None


_domain = _find_domain()


@lru_cache(maxsize=4096)
def _attributes(name: str, number: int | None) -> Any:
    stage = name.partition("/")[0]
    return _domain.get_event_attributes(message=name, color=COLOURS.get(stage), category=stage, payload=number)


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
