"""Which weights stay on the device, and which come when they are needed."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.models.costs import Weights

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
