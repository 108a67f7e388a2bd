"""The process that is profiled: a command of the runtime, recorded from one denoising step to another.

python -m tools.profile.capture nsys|ncu STEPS COMMAND...
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STEP = "denoise/step"


def steps_of(text: str) -> tuple[int, int] | None:
    """Return (first, last) of a text such as 2-3 or 5, None of "all"; ValueError for anything else."""
    if text == "all":
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"steps are {text!r}; legal: all, a step from 1 such as 5, or from one to another such as 2-3")
    return first, last


def record(profiler: str, steps: str, command: Sequence[str], trace: Path | None = None) -> int:
    """Run a command of the runtime, record the steps, and return its exit status."""
    from runtime.__main__ import main
    from runtime.trace import watched

    begin, end = torch_profiler(trace) if trace is not None else cuda_profiler()
    chosen = steps_of(steps)
    if chosen is None:
        begin()
        try:
            return main(command)
        finally:
            end()
    count, running = 0, False

    def watch(name: str, entered: bool) -> None:
        nonlocal count, running
        count += name == STEP and entered
        if name == STEP and entered and count == chosen[0]:
            begin()
            running = True
        elif name == STEP and not entered and count == chosen[1]:
            end()
            running = False

    with watched(watch):
        status = main(command)
    if running:
        end()
    return status


def cuda_profiler() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return what tells an outer profiler to begin and to end; ValueError where PyTorch cannot."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f"PyTorch {torch.__version__} sees no GPU, and CUDA is what tells Nsight when to begin; install a PyTorch "
            "with CUDA, or take the profiler torch"
        )

    def end() -> None:
        torch.cuda.synchronize()  # what was launched belongs to it
        torch.cuda.profiler.stop()

    return torch.cuda.profiler.start, end


def torch_profiler(trace: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return what begins PyTorch's profiler, and what ends it and writes a Chrome trace."""
    import torch
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    # A decode on a GPU runs in a thread of its own, whose ranges are else not recorded.
    profiler = profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))

    def end() -> None:
        profiler.stop()
        profiler.export_chrome_trace(str(trace))

    return profiler.start, end


def main(argv: Sequence[str]) -> int:
    """Record for an outer profiler; return the command's exit status, or 2 where nothing can be recorded."""
    try:
        return record(argv[0], argv[1], argv[2:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
