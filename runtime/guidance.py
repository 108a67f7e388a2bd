"""Classifier-free guidance, as a wrapper: a Denoiser in, a Denoiser out."""

from __future__ import annotations

import torch

from runtime.models.spec import Context, Denoiser


def guided(denoiser: Denoiser, scale: float, *, batched: bool) -> Denoiser:
    """Return a Denoiser of one row: unconditional + scale * (conditional - unconditional).

    A scale of at most 1 asks the conditional row alone. `batched` runs both rows at once: faster for small inputs,
    twice the memory. Source: https://arxiv.org/abs/2207.12598.
    """

    def denoise(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        if scale <= 1:
            return denoiser(x, sigma, context.row(context.rows - 1) if context.rows > 1 else context)
        if batched:
            unconditional, conditional = denoiser(x, sigma, context).chunk(2)
        else:
            unconditional = denoiser(x, sigma, context.row(0))
            conditional = denoiser(x, sigma, context.row(1))
        return unconditional + scale * (conditional - unconditional)

    return denoise
