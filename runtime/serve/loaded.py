"""The models that a worker holds in memory, and the LoRAs that requests may have merged into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

import runtime
from runtime.calibration import local
from runtime.lora import Lora
from runtime.machine import free_memory, usable_memory
from runtime.model import change_loras, choose_device, fit_loras
from runtime.offload import give_back_memory
from runtime.planner import load_within
from runtime.warming import parse_sizes, warmup

SQUEEZE = 0.8  # of the free memory, for a job that ran out of it before


class Loaded(dict[str, runtime.Model]):
    """Models by name, each loaded at first use and kept, with what its engine has made; `loras` are the files that each
    name stands for."""

    def __init__(self, places: Mapping[str, str], *, device: str, dtype: str, engine: str, precision: str) -> None:
        super().__init__()
        self.places, self.engine = places, engine
        self.how: dict[str, Any] = {"device": device, "dtype": dtype, "precision": precision}
        self.loras: Mapping[str, Sequence[Lora]] = {}

    def model(self, name: str, asked: Sequence[str] = ()) -> runtime.Model:
        """Return a model with the LoRAs of texts NAME or NAME:STRENGTH merged into it, and no others."""
        if name not in self:
            self[name] = runtime.load(self.places[name], engine=self.engine, **self.how)
        change_loras(self[name], self.meant(asked))
        return self[name]

    def squeezed(self, name: str, request: runtime.Request, asked: Sequence[str]) -> runtime.Model:
        """Load a model anew so that a request takes less than the memory that is free; ValueError where it cannot."""
        self.pop(name, None)
        give_back_memory()
        device = choose_device(self.how["device"])
        # On a CPU a budget is of the whole process; on a GPU of this model alone, beside the others that are loaded.
        left = usable_memory(device) if device.type == "cpu" else free_memory(device)
        memory = f"{SQUEEZE * left / 2**20:.0f}MiB"
        self[name] = load_within(self.places[name], request, memory=memory, loras=self.meant(asked), **self.how)
        return self[name]

    def warm(self, sizes: str) -> None:
        """Run each part of requests of some sizes once, such as 832x480x81,480x832x49; of none where none is given."""
        for model in self.values() if sizes else ():
            warmup(model, parse_sizes(sizes))

    def prepare(self) -> list[Callable[[], object]]:
        """Measure the device as far as a forecast needs it; return what is better done while nobody waits: the whole
        measurement, and loading the libraries that the first prompt needs."""
        left: list[Callable[[], object]] = [partial(load_libraries, model) for model in self.values()]
        for device, dtype in {(model.device, model.dtype) for model in self.values()}:
            machine = local(device, dtype, "brief" if device.type == "cpu" else "whole")
            if machine is not None and machine.brief:
                left.append(partial(local, device, dtype))
        return left

    def meant(self, asked: Sequence[str]) -> list[Lora]:
        """Return the LoRAs that texts stand for; ValueError for a name that the operator gives no more."""
        found = []
        for text in asked:
            name, colon, strength = text.partition(":")
            if name not in self.loras:
                raise ValueError(f"there is no LoRA {name!r} any more; legal: {', '.join(self.loras) or 'none'}")
            found += [replace(each, strength=float(strength)) if colon else each for each in self.loras[name]]
        return found

    def card(self, name: str) -> dict[str, Any]:
        """Return what the server needs to know of a model."""
        model = self.model(name)
        loras = [lora for lora, files in self.loras.items() if fits(model, files) is None]
        return {
            "spec": asdict(model.spec), "fingerprint": model.fingerprint, "device": str(model.device), "loras": loras
        }  # fmt: skip

    def check_loras(self) -> None:
        """ValueError for a LoRA that fits none of the models."""
        for files in self.loras.values():
            reasons = [fits(model, files) for model in self.values()]
            if all(reasons):
                raise ValueError(reasons[0])


def fits(model: runtime.Model, loras: Sequence[Lora]) -> str | None:
    """Return why LoRAs cannot be merged into a model; None where they can."""
    try:
        fit_loras(model, loras)
    except ValueError as error:
        return str(error)
    return None


def load_libraries(model: runtime.Model) -> None:
    """Load what cuts text, and what encodes pictures, without its weights."""
    assert model.tokenizer is not None
    if (pictures := model.checkpoint.image_encoder) is not None:
        with torch.device("meta"):
            pictures.build()
