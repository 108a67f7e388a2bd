"""python -m runtime.serve with workers that fail as a job's prompt says: python faulty.py [flags of the server]

The prompt "hang" hangs the worker at the third step; and so does "die" (the process is gone), "memory" (the device has
no more of it), "lost" (the device answers no more) and "fill" (the disk is full). "fill frame" does so before the first
frame is written, "fill commit" before the result is told to the store. With "once" at the end it happens but once.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

STEP = 3


def fail(kind: str, data: Path) -> None:
    """Fail in one way."""
    import torch

    if kind == "hang":
        time.sleep(3600)
    elif kind == "die":
        os._exit(9)
    elif kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    elif kind == "lost":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    elif kind == "fill":
        fill(data)


def fill(data: Path) -> None:
    """Leave no byte of a small disk."""
    with suppress(OSError), (data / "filler").open("ab", buffering=0) as handle:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while handle.write(b"x" * size) == size:
                    pass


def work() -> int:
    """Be a worker that fails so."""
    from runtime.serve import maker, worker

    tried: set[str] = set()

    def reach(place: str, job: Any, data: Path) -> None:
        kind, *rest = job.prompt.split()
        where = next((word for word in rest if word in ("frame", "commit")), "step")
        first = job.attempt == 1 and job.id not in tried
        if where == place and (first or "once" not in rest):
            tried.add(job.id)
            fail(kind, data)

    step, frame, end = maker.Report.step, maker.Report.frame, worker.Worker.end

    def failing_step(self: Any, number: int, *rest: Any) -> None:
        step(self, number, *rest)
        if number == STEP:
            reach("step", self.job, self.maker.store.data)

    def failing_frame(self: Any, done: int, total: int) -> None:
        frame(self, done, total)
        if done == 1:
            reach("frame", self.job, self.maker.store.data)

    def failing_end(self: Any, job: Any, *rest: Any, **more: Any) -> None:
        reach("commit", job, self.store.data)
        end(self, job, *rest, **more)

    maker.Report.step = failing_step  # type: ignore[method-assign]
    maker.Report.frame = failing_frame  # type: ignore[method-assign]
    worker.Worker.end = failing_end  # type: ignore[method-assign]
    return worker.main()


def serve() -> int:
    """Be a server with such workers."""
    from runtime.serve import __main__ as server
    from runtime.serve import supervisor

    supervisor.WORKER = (sys.executable, __file__, "worker")
    return server.main()


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        del sys.argv[1]
        sys.exit(work())
    sys.exit(serve())
