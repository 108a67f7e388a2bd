"""A process of its own, with limits, for whatever looks into a file that somebody sent."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.serve.errors import disk_full

SECONDS = 60  # of CPU time for one file
MEMORY = 4 * 2**30
FILE_BYTES = 2**30  # of one file that is written


def boxed(module: str, *arguments: str) -> dict[str, Any]:
    """Return what `python -m module` prints with `answer`; ValueError for what it refuses, or has not the means
    for, OSError where the disk is full."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise ValueError("the upload takes too long to decode; give a shorter or smaller one") from None
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise ValueError("the upload cannot be decoded within the limits of memory and time") from None
    if "errno" in found:
        raise OSError(found["errno"], "the upload cannot be written")
    if "error" in found:
        raise ValueError(found["error"])
    return found


def answer(look: Callable[[Path], dict[str, Any]], path: Path, *failures: type[Exception]) -> None:
    """Limit this process, look at a file, and print what was found as JSON; or what was wrong with the file."""
    failures = (*failures, OSError, SyntaxError, MemoryError)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        print(json.dumps(look(path)))
    except ValueError as error:
        print(json.dumps({"error": str(error).replace(str(path.parent) + "/", "")}))
    except failures as error:
        told = {"error": f"the upload cannot be decoded ({type(error).__name__})"}
        print(json.dumps({"errno": getattr(error, "errno", None)} if disk_full(error) else told))
