"""diffusers' networks, eager and compiled in turns: what of them is compiled, and how it is switched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.sides import Diffusers


def compiled_parts(stage: str, side: Diffusers) -> tuple[nn.Module, list[nn.Module]]:
    """Return the network of a stage and what of it is compiled: each block, as diffusers advises, or the decoder."""
    if stage == "decode":
        return side.pipe.vae, [side.pipe.vae.decoder]
    return side.pipe.transformer, list(side.pipe.transformer.blocks)


def laid_out(network: nn.Module, stage: str) -> None:
    """Give diffusers' decoder what is fastest for it: 16 bits and channels last."""
    if stage != "decode":
        return
    network.to(torch.bfloat16)
    for parameter in network.parameters():
        layouts = {5: torch.channels_last_3d, 4: torch.channels_last}
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])


class Compiled:
    """Modules that run by torch.compile, or as they are written."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.written = [(module, module._compiled_call_impl) for module in modules]
        self.compiled: list[tuple[nn.Module, Any]] = []

    def on(self) -> None:
        """Run compiled."""
        if not self.compiled:
            torch._dynamo.reset()
            for module, _ in self.written:
                module.compile(dynamic=False)
            self.compiled = [(module, module._compiled_call_impl) for module, _ in self.written]
        self._take(self.compiled)

    def off(self) -> None:
        """Run as written."""
        self._take(self.written)

    @staticmethod
    def _take(ways: Sequence[tuple[nn.Module, Any]]) -> None:
        for module, way in ways:
            module._compiled_call_impl = way
