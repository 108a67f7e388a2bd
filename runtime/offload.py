"""Which weights stay on the device, and which come when they are needed: blocks through slots.

A block that does not stay comes into one of two slots while the block before it computes: from pinned host memory over
a copy stream on a GPU, from its file in a thread on a CPU. Two experts share all slots, so that the second one takes
the first one's places block by block.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from runtime.models.costs import Weights
from runtime.weights import BlockFiles, Component
from runtime.weights import load as load_module

SLOTS = 2  # blocks that come and go share these: one computes while the next one comes


@dataclass(frozen=True)
class Offload:
    """`text` is "resident", "released" after each use, or "streamed" block by block; `blocks` are the transformer
    blocks that stay on the device (None: every block of every expert)."""

    text: str = "resident"
    blocks: int | None = None

    def text_bytes(self, weights: Weights, itemsize: int) -> int:
        """Bytes of the text encoder while it works."""
        if self.text != "streamed":
            return weights.bytes(itemsize)
        return weights.outer_bytes(itemsize) + min(SLOTS, weights.blocks) * weights.block_bytes(itemsize)

    def transformer_bytes(self, weights: Weights, experts: int, itemsize: int) -> int:
        """Bytes of all experts on the device."""
        if self.blocks is None:
            return experts * weights.bytes(itemsize)
        held = min(self.blocks + SLOTS, weights.blocks) if self.blocks < weights.blocks else weights.blocks
        return experts * weights.outer_bytes(itemsize) + held * weights.block_bytes(itemsize)

    def coming_bytes(self, weights: Weights, itemsize: int) -> int:
        """Bytes of blocks that come in each pass of one transformer."""
        if self.blocks is None:
            return 0
        return max(weights.blocks - self.blocks, 0) * weights.block_bytes(itemsize)


def choices(weights: Weights, experts: int) -> list[Offload]:
    """Return the ways to hold the weights, from the fastest to the one that takes the least memory."""
    blocks: list[int | None] = [None]
    if experts > 1:
        blocks.append(weights.blocks)
    blocks += range(weights.blocks - SLOTS - 1, -1, -1)
    return [Offload(text, count) for count in blocks for text in ("resident", "released", "streamed")]


class Source(Protocol):
    """Where a component's blocks wait."""

    def fetch(self, index: int, places: Mapping[str, torch.Tensor]) -> None:
        """Fill the parameters of one block, by their names in it."""
        ...


class HostBlocks:
    """Blocks in pinned host memory, so that copies to a GPU run beside its arithmetic."""

    def __init__(self, files: BlockFiles, shapes: list[dict[str, torch.Tensor]]) -> None:
        self.blocks = [
            {name: torch.empty_like(each, device="cpu").pin_memory() for name, each in block.items()}
            for block in shapes
        ]
        for index, block in enumerate(self.blocks):
            files.fetch(index, block)

    def fetch(self, index: int, places: Mapping[str, torch.Tensor]) -> None:
        """Begin to copy one block on the current stream."""
        for name, place in places.items():
            place.copy_(self.blocks[index][name], non_blocking=True)


@dataclass
class Slot:
    """Device memory for one block: whose it is, and what must pass before it may be used or filled."""

    places: dict[str, torch.Tensor]
    holds: tuple[int, int] | None = None  # (which list of blocks, which block)
    coming: Future[None] | None = None  # on a CPU
    copied: Any = None  # on a GPU: the event behind the copy
    used: Any = None  # on a GPU: the event behind the last computation with it


@dataclass
class Shelf:
    """The slots that one or more lists of equal blocks share."""

    device: torch.device
    stay: int
    slots: dict[int, Slot] = field(default_factory=dict)
    reader: ThreadPoolExecutor | None = None
    stream: Any = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
        else:
            self.reader = ThreadPoolExecutor(1, thread_name_prefix="weights")

    def number(self, index: int) -> int:
        """Return the slot of a block: its own where it stays, else one of those that are shared."""
        return index if index < self.stay else self.stay + (index - self.stay) % SLOTS

    def begin(self, owner: int, index: int, source: Source) -> None:
        """Start to bring a block, unless it is there or on its way."""
        slot = self.slots[self.number(index)]
        if slot.holds == (owner, index):
            return
        slot.holds = owner, index
        if self.reader is not None:
            slot.coming = self.reader.submit(source.fetch, index, slot.places)
            return
        if slot.used is not None:
            self.stream.wait_event(slot.used)
        with torch.cuda.stream(self.stream):
            source.fetch(index, slot.places)
            slot.copied = self.stream.record_event()

    def finish(self, index: int) -> dict[str, torch.Tensor]:
        """Return the places of a block once it is there."""
        slot = self.slots[self.number(index)]
        if slot.coming is not None:
            coming, slot.coming = slot.coming, None
            try:
                coming.result()
            except BaseException:
                slot.holds = None
                raise
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
            slot.copied = None
        return slot.places

    def release(self, index: int) -> None:
        """Say that what computes with a block has been issued."""
        if self.stream is not None:
            self.slots[self.number(index)].used = torch.cuda.current_stream(self.device).record_event()


class Streamed(nn.ModuleList):
    """A list of blocks whose weights are there while it is iterated: each one until the next is asked for."""

    def __init__(self, blocks: nn.ModuleList, shelf: Shelf, source: Source, owner: int) -> None:
        super().__init__(blocks)
        self.shelf, self.source, self.owner = shelf, source, owner

    def __iter__(self) -> Iterator[nn.Module]:
        """Yield the blocks in order, the next missing one on its way."""
        for index in range(len(self)):
            self.shelf.begin(self.owner, index, self.source)
            places = self.shelf.finish(index)
            self._begin_next(index)
            block = self[index]
            for name, place in places.items():
                owner, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(owner), leaf, nn.Parameter(place, requires_grad=False))
            yield block
            self.shelf.release(index)

    def _begin_next(self, index: int) -> None:
        """Bring the next block that is not there, unless its slot is the one in use."""
        shelf = self.shelf
        for later in range(index + 1, len(self)):
            slot = shelf.slots[shelf.number(later)]
            if slot.holds != (self.owner, later):
                if shelf.number(later) != shelf.number(index) and slot.coming is None:
                    shelf.begin(self.owner, later, self.source)
                return


def load_streamed(component: Component, dtype: torch.dtype, shelf: Shelf, owner: int) -> nn.Module:
    """Load a component whose blocks come through the slots of a shelf; ValueError for weights that do not fit."""
    module = load_module(component, shelf.device, dtype, without_blocks=True)
    parent, _, leaf = component.blocks.rpartition(".")
    blocks = module.get_submodule(component.blocks)
    assert isinstance(blocks, nn.ModuleList)
    files = BlockFiles(component, module)
    shapes = [
        {
            name: torch.empty_like(each, dtype=torch.float32 if keeps(component, index, name) else dtype, device="meta")
            for name, each in block.named_parameters()
        }
        for index, block in enumerate(blocks)
    ]
    for index, block in enumerate(shapes):
        number = shelf.number(index)
        if number not in shelf.slots:
            shelf.slots[number] = Slot({n: torch.empty_like(each, device=shelf.device) for n, each in block.items()})
    source = HostBlocks(files, shapes) if shelf.device.type == "cuda" else files
    setattr(module.get_submodule(parent), leaf, Streamed(blocks, shelf, source, owner))
    return module


def give_back_memory() -> None:
    """Hand freed memory back to the system, or to other users of the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # another C library gives back by itself, or never
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keeps(component: Component, index: int, name: str) -> bool:
    """Tell whether a block's parameter stays float32."""
    return component.keep_float32(f"{component.blocks}.{index}.{name}")
