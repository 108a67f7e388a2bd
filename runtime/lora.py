"""LoRA files -> weights: low-rank changes of matrices, merged into them.

Three styles are read, whatever layout the checkpoint has: diffusers (`transformer.blocks.0.attn1.to_q.lora_A.weight`),
the original repositories' names (`diffusion_model.blocks.0.self_attn.q.lora_down.weight`), and kohya's, dots turned to
underscores (`lora_unet_blocks_0_self_attn_q.lora_down.weight`). Source of the method: https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from runtime.weights import Component, Slot, WeightFile, fingerprint

EXPERTS = ("high", "low")  # of two experts: of high noise, of low noise
PREFIXES = re.compile(
    r"^(base_model\.model\.|model\.|diffusion_model\.|transformer\.|transformer_2\.|unet\."
    r"|lora_unet_|lora_transformer_2_|lora_transformer_)+"
)
SECOND = re.compile(r"^(transformer_2\.|lora_transformer_2_)")
ROLES = {
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up",
    ".alpha": "alpha", ".diff": "weight", ".diff_b": "bias", ".diff_m": "modulation",
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how strongly it counts; `expert` ("high", "low") of two that it is for, None: all it fits.

    Raises ValueError for another expert or a strength that is no number, and FileNotFoundError where there is no file.
    """

    file: Path
    strength: float = 1.0
    expert: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", Path(self.file))
        if self.expert not in (None, *EXPERTS):
            raise ValueError(f"expert is {self.expert!r}; legal: {', '.join(EXPERTS)}, or none for all")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength is {self.strength!r}; legal: a finite number")
        if not self.file.is_file():
            raise FileNotFoundError(f"there is no LoRA file {self.file}; legal: a .safetensors file")

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Return the LoRA of a text such as FILE, FILE:0.8 or high=FILE:0.8."""
        expert, equals, rest = text.partition("=")
        if not equals or expert not in EXPERTS:
            expert, rest = "", text
        name, _, number = rest.rpartition(":")
        try:
            strength = float(number) if name else 1.0
        except ValueError:  # the colon belongs to the name
            name, strength = "", 1.0
        return cls(Path(name or rest), strength, expert or None)

    def told(self) -> str:
        """Return what a receipt says of it."""
        return f"{'' if self.expert is None else self.expert + '='}{self.file.name}:{self.strength:g}"

    @property
    def fingerprint(self) -> str:
        """A hash of its content, its strength and its expert."""
        return f"{fingerprint((self.file,)).partition(':')[2]}-{self.strength:g}-{self.expert}"


@dataclass
class Change:
    """What a file says of one module: some of down [R, I], up [O, R], alpha, and whole differences."""

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)  # as the file calls them

    def shaped(self) -> Change:
        """Return the same with shapes alone."""
        return Change(
            {role: torch.empty_like(part, device="meta") for role, part in self.parts.items() if role != "alpha"}
        )


Fits = list[tuple[Change, dict[str, Slot]]]  # what a LoRA changes, and the places of its "weight", "bias", ...


def fit(lora: Lora, component: Component, module: nn.Module, number: int, experts: int) -> Fits:
    """Return where a LoRA changes one of `experts` transformers, whose `number` counts from 0.

    Raises ValueError that names keys which fit no weight, have no partner or another shape.
    """
    places = {name.replace(".", "_"): slot for name, slot in component.all_keys(module).items()}
    parameters = dict(module.named_parameters())
    wrong: list[str] = []
    found: Fits = []
    for key, change in changes(lora, number, experts).items():
        added = deltas(change.shaped())
        slots = {part: places[name] for part in added if (name := f"{key}_{part}") in places}
        held = {part: slot.within(parameters[slot.name].data) for part, slot in slots.items()}
        if not added or not all(part in held and same(delta, held[part]) for part, delta in added.items()):
            wrong += change.names
        found.append((change, slots))
    if wrong:
        raise ValueError(
            f"the LoRA {lora.file} does not fit {component.name}: {some(wrong)} match no weight of it, have no "
            "partner, or another shape; it was made for another model"
        )
    return found


def same(delta: torch.Tensor, place: torch.Tensor) -> bool:
    """Tell whether a change has a place's shape, give or take ones."""
    return delta.numel() == place.numel() and len(delta) in (1, len(place))


def merge(fits: Fits, strength: float, module: nn.Module) -> set[str]:
    """Add a LoRA to the weights that it fits; return the names of the parameters that it changed."""
    parameters = dict(module.named_parameters())
    for change, slots in fits:
        for part, delta in deltas(change).items():
            place = slots[part].within(parameters[slots[part].name].data)
            change_by = strength * delta.reshape(place.shape)
            place.copy_((place.float() + change_by.to(place.device)).to(place.dtype))
    return {slot.name for _, slots in fits for slot in slots.values()}


def changes(lora: Lora, number: int, experts: int) -> dict[str, Change]:
    """Return what a LoRA changes in one of `experts` transformers, by the module's name with underscores for dots.

    A file that names no second expert is for both, unless the LoRA says for which. ValueError for an expert that the
    model has not.
    """
    named = read(lora.file)
    second = [name for (other, _), change in named.items() if other for name in change.names]
    if experts == 1 and (lora.expert is not None or second):
        what = f"is for the expert {lora.expert!r}" if lora.expert else f"names a second expert in {some(second)}"
        raise ValueError(f"the LoRA {lora.file} {what}, and the model has one; it was made for another model")
    if lora.expert is None and second:
        return {key: change for (other, key), change in named.items() if other == bool(number)}
    if lora.expert is not None and EXPERTS.index(lora.expert) != number:
        return {}
    return {key: change for (_, key), change in named.items()}


def some(names: Sequence[str]) -> str:
    """Return the first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def deltas(change: Change) -> dict[str, torch.Tensor]:
    """Return what a change adds to a module's "weight", "bias", "modulation", float32; nothing where a half lacks."""
    parts = change.parts
    found: dict[str, torch.Tensor] = {}
    found |= {name: parts[name].float() for name in ("weight", "bias", "modulation") if name in parts}
    if "down" not in parts and "up" not in parts:
        return found
    if "down" not in parts or "up" not in parts or parts["up"].shape[1] != parts["down"].shape[0]:
        return {}
    down, up = parts["down"].float().flatten(1), parts["up"].float().flatten(1)
    scale = float(parts["alpha"]) / len(down) if "alpha" in parts else 1.0
    product = scale * (up @ down)
    return found | {"weight": product + found["weight"].flatten(1) if "weight" in found else product}


def read(file: Path) -> dict[tuple[bool, str], Change]:
    """Return what a file changes, by (is it of the second expert, module's name with underscores for dots)."""
    handle = WeightFile(file)
    found: dict[tuple[bool, str], Change] = {}
    for name in handle.shapes():
        suffix = next((suffix for suffix in ROLES if name.endswith(suffix)), "")
        module = PREFIXES.sub("", name.removesuffix(suffix)).replace(".", "_")
        change = found.setdefault((bool(SECOND.match(name)), module), Change())
        change.names.append(name)
        if suffix:
            change.parts[ROLES[suffix]] = handle.whole(name)
    return found
