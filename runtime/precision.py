"""Layers in 8-bit floating point (e4m3): which ones may be, and a transformer with some of them so.

Weights are quantised once, a scale per output channel; activations as they come, a scale per token, and for attention
per head. Where a device has no such products the numerics are simulated: the same numbers, later. What each layer costs
is measured by runtime/sensitivity.py; nothing else knows about it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TypeVar, cast

import torch
from torch import nn

from runtime.models.layers import AttentionFp8, FullAttention, LinearFp8
from runtime.models.spec import Transformer

PRECISIONS = ("full", "fp8")
ENGINES = ("eager", "cuda_graph", "inductor")  # that run layers in 8 bits

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def candidates(network: Transformer) -> tuple[str, ...]:
    """Return the names of the layers that may be in 8 bits, block after block."""
    blocks = network.blocks
    return tuple(f"blocks.{i}.{name}" for i in range(len(blocks)) for name in blocks[i].may_be_fp8)  # type: ignore[union-attr]


def weighty(network: Transformer) -> tuple[str, ...]:
    """Return those of the candidates that have weights, and so save memory in 8 bits: the linear ones."""
    module = cast(nn.Module, network)
    return tuple(name for name in candidates(network) if isinstance(module.get_submodule(name), nn.Linear | LinearFp8))


def to_fp8(network: Transformer, names: Iterable[str], made: MutableMapping[str, nn.Module]) -> Transformer:
    """Return the transformer with the layers `names` in 8 bits; it shares all else with the given one.

    `made` holds the layers that were quantised before, and takes those that are new.
    """
    module = cast(nn.Module, network)
    found: dict[str, nn.Module] = {}
    for name in names:
        layer = module.get_submodule(name)
        if isinstance(layer, nn.Linear):
            found[name] = made[name] if name in made else made.setdefault(name, LinearFp8(layer))
        elif isinstance(layer, FullAttention):
            found[name] = AttentionFp8()
    return cast(Transformer, replaced(module, found))


def replaced(module: AnyModule, layers: Mapping[str, nn.Module]) -> AnyModule:
    """Return a module that shares everything with the given one but the submodules of these names."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    inner: dict[str, dict[str, nn.Module]] = {}
    for name, layer in layers.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = layer
        else:
            found._modules[first] = layer
    for first, parts in inner.items():
        child = module._modules[first]
        assert child is not None
        found._modules[first] = replaced(child, parts)
    return found


def narrow(network: Transformer, device: torch.device) -> None:
    """Put every candidate with weights into 8 bits in place, and the transformer on a device, where one full layer is
    at a time."""
    module = cast(nn.Module, network)
    for name in weighty(network):
        parent, _, leaf = name.rpartition(".")
        linear = cast(nn.Linear, module.get_submodule(name)).to(device)
        setattr(module.get_submodule(parent), leaf, LinearFp8(linear))
    module.to(device)


def gains(device: torch.device) -> bool:
    """Tell whether a device has products in 8 bits, so that they save time; elsewhere they are simulated."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
