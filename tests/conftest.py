"""Every test runs without a network, with a cache of its own, on two threads; Triton interprets where no GPU is."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined, so before any is imported


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache per test; the calibration of this machine alone is shared, measured by the first that needs it."""
    cache = tmp_path_factory.mktemp("cache")
    measured = tmp_path_factory.getbasetemp() / "machine"
    measured.mkdir(exist_ok=True)
    for file in measured.glob("*.json"):
        os.utime(file)  # so young that requests which are slow beside other tests do not drop it
    (cache / "machine").symlink_to(measured)
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(cache))
