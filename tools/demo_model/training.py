"""What both trainings share: a schedule, averaged weights, a log, and states that a stopped run goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Run:
    """One training of a module for a fixed number of steps, in a folder that holds its state and its log.

    The learning rate warms up over `warm` steps and falls as a cosine to a twentieth from `flat` (a share) on. The
    average starts anew with each power of two, so that the first steps weigh nothing in the end.
    """

    def __init__(
        self, folder: Path, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer], steps: int, *,
        warm: int = 100, flat: float = 0.4, decay: float = 0.998, save_every: float = 120.0,
    ) -> None:  # fmt: skip
        self.folder, self.module, self.optimizers = folder, module, list(optimizers)
        self.steps, self.warm, self.flat, self.decay, self.save_every = steps, warm, flat, decay, save_every
        self.step = 0
        self.average = {name: p.detach().float().clone() for name, p in module.state_dict().items()}
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.saved = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if self.state_file.exists():
            self._restore()

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def rate(self) -> float:
        """Return the share of the full learning rate at this step."""
        rising = min(1.0, (self.step + 1) / self.warm)
        past = max(0.0, (self.step / self.steps - self.flat) / (1 - self.flat))
        return rising * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(past, 1.0))))

    def update(self, loss: torch.Tensor, clip: float = 1.0) -> float:
        """Take one step down `loss`; return the norm of its gradient."""
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), clip))
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * self.rate()
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.decay, self.step / (self.step + 10))
        for name, value in self.module.state_dict().items():
            self.average[name].lerp_(value.detach().float(), 1 - keep)
        if time.monotonic() - self.saved > self.save_every:
            self.save()
        return norm

    def log(self, **values: Any) -> None:
        """Append one line of values to log.jsonl."""
        values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        with (self.folder / "log.jsonl").open("a") as out:
            out.write(json.dumps({"step": self.step, **values}) + "\n")

    def save(self) -> None:
        """Write the state; a stop in the middle leaves the one before."""
        state = {
            "step": self.step,
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "random": torch.get_rng_state(),
        }
        torch.save(state, self.state_file.with_suffix(".new"))
        self.state_file.with_suffix(".new").replace(self.state_file)
        self.saved = time.monotonic()

    def _restore(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.step = state["step"]
        self.module.load_state_dict(state["module"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])

    def averaged(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights in the module's own dtypes."""
        return {name: self.average[name].to(value.dtype) for name, value in self.module.state_dict().items()}
