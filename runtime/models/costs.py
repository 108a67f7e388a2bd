"""What a network computes, counted before it runs: operations, the bytes they move, the bytes they hold.

A family writes its formulas in these terms; the planner turns them into seconds for a device. FLOPs are counted as
torch's FlopCounterMode does: two per multiplication of a matrix product, attention or convolution, none for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

LANES = 16  # channels that a convolution works on at once: of the last ones some may be empty


@dataclass(frozen=True)
class Operation:
    """`count` equal calls of one kind; numbers are of one call."""

    kind: str
    flops: float = 0.0
    bytes: float = 0.0  # operands read and results written, once each
    scores: float = 0.0  # entries of attention's matrix: each costs an exponential beside its FLOPs
    idle: float = 0.0  # FLOPs of lanes that no channel fills: they take time, and count nowhere else
    count: float = 1

    def times(self, count: float) -> Operation:
        """Return so many times as many calls."""
        return replace(self, count=self.count * count)

    def share(self, part: float) -> Operation:
        """Return as many calls, each over a part of what is worked on."""
        return replace(
            self, flops=self.flops * part, bytes=self.bytes * part, scores=self.scores * part, idle=self.idle * part
        )


@dataclass(frozen=True)
class Work:
    """One stage's operations, and the bytes that are live at once beside the weights, at most."""

    operations: tuple[Operation, ...]
    live: int

    @property
    def flops(self) -> float:
        """Floating-point operations of all calls."""
        return sum(each.flops * each.count for each in self.operations)

    @property
    def bytes(self) -> float:
        """Bytes moved by all calls, if none finds its operands in a cache."""
        return sum(each.bytes * each.count for each in self.operations)


@dataclass(frozen=True)
class Weights:
    """Numbers of one network: outside its blocks and in each block, those that follow the dtype and float32 ones."""

    outer: int
    outer_float32: int = 0
    block: int = 0
    block_float32: int = 0
    blocks: int = 0
    block_bytewise: int = 0  # numbers of one byte
    may_be_fp8: tuple[int, int] = (0, 0)  # of a block's numbers, those that may be of one byte, and the rows they form

    def in_fp8(self) -> Weights:
        """Return the same with all that may be in 8 bits, and a float32 scale per row."""
        numbers, rows = self.may_be_fp8
        return replace(
            self,
            block=self.block - numbers,
            block_float32=self.block_float32 + rows,
            block_bytewise=numbers,
            may_be_fp8=(0, 0),
        )

    def outer_bytes(self, itemsize: int) -> int:
        """Bytes outside the blocks, at `itemsize` bytes per number of the chosen dtype."""
        return self.outer * itemsize + self.outer_float32 * 4

    def block_bytes(self, itemsize: int) -> int:
        """Bytes of one block."""
        return self.block * itemsize + self.block_float32 * 4 + self.block_bytewise

    def bytes(self, itemsize: int) -> int:
        """Bytes of the whole network."""
        return self.outer_bytes(itemsize) + self.blocks * self.block_bytes(itemsize)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of one forward pass: `rows` prompts of `text` tokens over latents [T, H, W], `itemsize` bytes each."""

    latents: tuple[int, int, int]
    text: int
    rows: int = 1
    itemsize: int = 2


class Costs(Protocol):
    """A family's formulas for one checkpoint.

    `published` counts the arithmetic that the published code does (padding attended to, text projected in every
    pass, zero frames convolved), which benchmarks and limits refer to; without it, what this runtime executes.
    """

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of the transformer's attention, and the size of each."""
        ...

    @property
    def text_encoder(self) -> Weights:
        """Its numbers; blocks are its layers."""
        ...

    @property
    def transformer(self) -> Weights:
        """The numbers of one expert."""
        ...

    @property
    def vae(self) -> Weights:
        """The numbers of the autoencoder, laid out for running."""
        ...

    def text(self, tokens: int, itemsize: int, *, published: bool = False) -> Work:
        """Encoding one prompt of so many tokens; `published`: without the passes between products."""
        ...

    def project(self, shape: Shape) -> Work:
        """What one transformer computes of the text once per request."""
        ...

    def forward(self, shape: Shape, *, published: bool = False) -> Work:
        """One pass of one transformer over all rows."""
        ...

    def ranges(self, shape: Shape, *, published: bool = False) -> Mapping[str, tuple[Operation, ...]]:
        """The operations of `forward` by the range that profilers see them in; "" holds those that are in none."""
        ...

    def decode(
        self, latents: tuple[int, int, int], tile: tuple[int, int] | None, itemsize: int, *, published: bool = False,
        parked: bool = False,
    ) -> Work:  # fmt: skip
        """Decoding latents [T, H, W], in tiles (height, width) in pixels with their halo.

        With `parked`, the histories of all tiles but one are in the host's memory.
        """
        ...

    def decode_ranges(self, latents: tuple[int, int, int], itemsize: int) -> Mapping[str, Sequence[Operation]]:
        """The operations of `decode` over whole frames, as `ranges` are; NAME/PART lies within NAME.

        Copies that keep frames for the next ones are left out, since limits do not hold them.
        """
        ...

    def encode(
        self, latents: tuple[int, int, int], tile: tuple[int, int] | None, itemsize: int, *, published: bool = False,
        parked: bool = False,
    ) -> Work:  # fmt: skip
        """Encoding the clip of such latents."""
        ...

    def tile_of(self, height: int, width: int, parts: tuple[int, int]) -> tuple[int, int]:
        """Return the tile (height, width) in pixels, halo included, that cuts a frame into parts (rows, columns)."""
        ...


def linear(rows: int, inputs: int, outputs: int, itemsize: int, count: float = 1) -> Operation:
    """x [rows, inputs] times a matrix."""
    moved = rows * inputs + inputs * outputs + rows * outputs
    return Operation("linear", 2.0 * rows * inputs * outputs, float(moved * itemsize), count=count)


def attention(length: int, keys: int, heads: int, size: int, itemsize: int, count: float = 1) -> Operation:
    """`length` queries over `keys` keys in each head."""
    scores = float(heads * length * keys)
    return Operation(
        "attention", 4.0 * scores * size, 2.0 * (length + keys) * heads * size * itemsize, scores, count=count
    )


def convolution(kind: str, pixels: int, taps: float, inputs: int, outputs: int, itemsize: int) -> Operation:
    """A convolution to `pixels` pixels (all frames) by `taps` taps each; "narrow" from a few channels, such as RGB."""
    if kind == "convolution" and inputs < LANES:
        kind = "narrow"
    moved = pixels * (inputs + outputs) + taps * inputs * outputs
    each = 2.0 * pixels * taps * inputs  # FLOPs of one output channel
    return Operation(kind, each * outputs, float(moved * itemsize), idle=each * (-outputs % LANES))


def sweep(kind: str, numbers: int, itemsize: int, count: float = 1) -> Operation:
    """A pass that moves so many numbers and computes next to nothing."""
    return Operation(kind, bytes=float(numbers * itemsize), count=count)
