"""Checkpoints: the sampler's state on disk, so that a generation that was killed goes on to the same frames."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from runtime.samplers import Past, SamplerState
from runtime.weights import publish

FORMAT = "1"


class Checkpoints:
    """The states of one generation, a safetensors file per window in `folder`.

    A state is kept where `steps` steps or `seconds` seconds have passed since the last, and after a window's last step.
    `key` tells generations apart: a file with another key, of another format or with damaged content is not used.
    """

    def __init__(self, folder: str | Path, key: str, *, steps: int = 5, seconds: float = 10.0) -> None:
        self.folder, self.key, self.steps, self.seconds = Path(folder), key, steps, seconds
        self.state: tuple[int, SamplerState] | None = None  # the newest, kept or not
        self.step, self.time = 0, time.monotonic()  # of the newest that is kept

    def file(self, window: int) -> Path:
        """Return the file of a window's state."""
        return self.folder / f"window-{window}.safetensors"

    def find(self, window: int) -> SamplerState | None:
        """Return the state that was kept of a window, on the CPU; None, with a warning, for one that cannot be used."""
        file = self.file(window)
        try:
            with safe_open(file, framework="pt") as handle:
                notes = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name).clone() for name in handle.offset_keys()}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            return self._refuse(file, str(error))
        if notes.get("format") != FORMAT or notes.get("key") != self.key:
            return self._refuse(file, "it is of another request, model or version")
        if notes.get("digest") != digest(tensors, notes.get("step", "") + notes.get("past", "")):
            return self._refuse(file, "its content does not fit its checksum")
        past = None
        if "past" in notes:
            told = json.loads(notes["past"])
            past = Past(**told | {"steps": tuple(told["steps"]), "velocities": numbered(tensors, "velocity")})
        history = numbered(tensors, "history")
        state = SamplerState(int(notes["step"]), tensors["x"], history, tensors.get("corrected"), past)
        self.step, self.time = state.step, time.monotonic()
        return state

    def keep(self, window: int, state: SamplerState, *, last: bool = False) -> None:
        """Take note of a state, and write it where it is time to; OSError where the disk is full."""
        if self.state is None or self.state[0] != window:
            self.step = min(self.step, state.step - 1)
        self.state = window, state
        if last or state.step - self.step >= self.steps or time.monotonic() - self.time >= self.seconds:
            self.write()

    def write(self) -> None:
        """Write the newest state now."""
        if self.state is None:
            return
        window, state = self.state
        tensors = {"x": state.x} | {f"history.{i}": past for i, past in enumerate(state.history)}
        if state.corrected is not None:
            tensors["corrected"] = state.corrected
        notes = {"format": FORMAT, "key": self.key, "step": str(state.step)}
        if state.past is not None:
            tensors |= {f"velocity.{i}": velocity for i, velocity in enumerate(state.past.velocities)}
            notes["past"] = json.dumps(
                {f.name: getattr(state.past, f.name) for f in fields(Past) if f.name != "velocities"}
            )
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        notes["digest"] = digest(tensors, notes["step"] + notes.get("past", ""))
        publish(self.file(window), tensors, notes)
        self.step, self.time = state.step, time.monotonic()

    @staticmethod
    def _refuse(file: Path, reason: str) -> None:
        warnings.warn(f"the checkpoint {file} is not used ({reason}); its window is made from the start", stacklevel=3)


def numbered(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, ...]:
    """Return the tensors name.0, name.1 and so on."""
    return tuple(tensors[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in tensors)))


def digest(tensors: Mapping[str, torch.Tensor], notes: str) -> str:
    """Return a hash of the notes of a state and its float32 tensors, their names and shapes."""
    found = hashlib.sha256(notes.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {list(tensor.shape)}".encode())
        found.update(tensor.numpy().data)
    return found.hexdigest()
