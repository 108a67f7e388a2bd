"""An autoencoder that runs out of memory, for tests of what steps down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

Tile = tuple[int, int] | None


class Failing:
    """An autoencoder that runs out of memory at a given chunk of each of its first decodes or encodes.

    `tiles` are those that it was asked for.
    """

    def __init__(self, network: Any, failures: list[int]) -> None:
        self.network, self.failures, self.tiles = network, failures, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def decode_stream(self, latents: torch.Tensor, tile: Tile = None, start: int = 0) -> Iterator[torch.Tensor]:
        self.tiles.append(tile)
        return self._until(self.network.decode_stream(latents, tile, start), start)

    def encode_stream(self, chunks: Iterable[torch.Tensor], tile: Tile = None) -> Iterator[torch.Tensor]:
        self.tiles.append(tile)
        return self._until(self.network.encode_stream(chunks, tile), 0)

    def _until(self, chunks: Iterator[torch.Tensor], start: int) -> Iterator[torch.Tensor]:
        fails = self.failures.pop(0) if self.failures else None

        def stream() -> Iterator[torch.Tensor]:
            for index, chunk in enumerate(chunks, start):
                if index == fails:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield chunk

        return stream()
