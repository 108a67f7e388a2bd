"""attention: scaled dot-product attention without causality.

    out = softmax(q k^T / sqrt(K) + bias) v

q [B, L, N, K], k and v [B, S, N, K] (views are fine), bias [B or 1, 1, 1, S] in q's dtype or None; returns
[B, L, N * K] in q's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import expect_floating, expect_shape


def attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition, by PyTorch's own attention."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the attention of q over k and v, [B, L, N * K]; ValueError for shapes that do not fit together."""
    expect_floating("q", q)
    expect_shape("q", q, (None, None, None, None))
    rows, _, heads, size = q.shape
    expect_shape("k", k, (rows, None, heads, size))
    expect_shape("v", v, tuple(k.shape))
    if bias is not None:
        if bias.dim() != 4 or bias.shape[0] not in (1, rows):
            raise ValueError(f"bias has shape {list(bias.shape)}; expected [1 or {rows}, 1, 1, {k.shape[1]}]")
        expect_shape("bias", bias, (None, 1, 1, k.shape[1]))
    return attention_ref(q, k, v, bias)
