"""norm_silu: normalise each pixel over its channels, then SiLU.

    h = x / max(|x|, 1e-12) * sqrt(C) * gamma        |x| is the Euclidean norm over the C channels
    y = h * sigmoid(h)                               (y = h with silu=False)

x [B, C, ...] any float dtype, any number of dimensions behind the channels; gamma holds C numbers, in any shape;
returns y in x's shape, dtype and memory layout. Arithmetic is float32.
Source: the RMS norm of Wan's VAE, https://arxiv.org/abs/2503.20314, section 4.1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .checks import expect_floating

SMALLEST_NORM = 1e-12


def norm_silu_ref(x: torch.Tensor, gamma: torch.Tensor, silu: bool, inplace: bool) -> torch.Tensor:
    """The definition, float32 inside; few passes over memory."""
    channels = x.shape[1]
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_(min=SMALLEST_NORM)
    factor = norm.reciprocal_().mul_(math.sqrt(channels))
    h = wide.mul_(factor) if inplace or wide is not x else wide * factor
    h.mul_(gamma.float().reshape(channels, *[1] * (x.dim() - 2)))
    if silu:
        F.silu(h, inplace=True)
    return x.copy_(h) if inplace and h is not x else h.to(x.dtype)


def norm_silu(x: torch.Tensor, gamma: torch.Tensor, *, silu: bool = True, inplace: bool = False) -> torch.Tensor:
    """Return SiLU of x normalised over its channels, in x's shape; ValueError for shapes that do not fit together.

    With `inplace` the result takes x's memory, and x is returned.
    """
    expect_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, C, ...]")
    if gamma.numel() != x.shape[1]:
        raise ValueError(f"gamma has shape {list(gamma.shape)}; expected {x.shape[1]} numbers, one per channel of x")
    return norm_silu_ref(x, gamma, silu, inplace)
