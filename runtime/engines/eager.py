"""The eager engine: the family's transformer as it is written."""

from __future__ import annotations

import torch

from runtime.models.spec import Context, Denoiser, Transformer


def build(transformer: Transformer, expert: int, weights: str = "") -> Denoiser:
    """Return a Denoiser that calls the transformer with its own expert's part of the context."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        return transformer(x, sigma, context.experts[expert])

    return denoise
