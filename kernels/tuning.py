"""What was measured to be fastest on a GPU: kernels/tuned/<gpu>.json, which `python -m tools.tune` writes.

    {"<operation>": {"<key>": {"implementation": "cuda", "num_warps": 8, ...}}}

An operation makes its key from what decides, such as its width, and gives the settings that it knows; what a file does
not name keeps the operation's own choice. Nothing is timed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"

_trial: ContextVar[tuple[str, dict[str, Any], list[str]] | None] = ContextVar("trial", default=None)


def tuned(operation: str, key: str, device: torch.device) -> Mapping[str, Any]:
    """Return the settings measured for a key on a GPU, those of the trial that runs, or none."""
    if (trial := _trial.get()) is not None and trial[0] == operation:
        trial[2].append(key)
        return trial[1]
    return table(gpu_of(device)).get(operation, {}).get(key, {}) if device.type == "cuda" else {}


@contextmanager
def trial(operation: str, settings: dict[str, Any]) -> Iterator[list[str]]:
    """Let an operation take these settings; yields the keys that it asked for."""
    asked: list[str] = []
    token = _trial.set((operation, settings, asked))
    try:
        yield asked
    finally:
        _trial.reset(token)


@cache
def table(gpu: str) -> dict[str, dict[str, Any]]:
    """Read kernels/tuned/<gpu>.json; empty where nothing was measured."""
    path = TUNED / f"{gpu}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@cache
def gpu_of(device: torch.device) -> str:
    """Name a GPU as its tuned file is named: "h200"."""
    return slug(torch.cuda.get_device_name(device))


def slug(name: str) -> str:
    """Return a GPU's name without its vendor, in lower case and without spaces."""
    return name.lower().removeprefix("nvidia ").replace(" ", "-")
