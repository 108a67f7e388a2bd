"""qk_norm_rope: RMS norm over the whole width, then 3D rotary embedding, of the queries and keys of one projection.

    q = rotate(RMSNorm(qkv[..., :D];   q_weight))
    k = rotate(RMSNorm(qkv[..., D:2D]; k_weight))
    v = qkv[..., 2D:]

qkv [B, L, 3D]: the fused projection's output, not used afterwards (implementations may write in place); q_weight,
k_weight [D] float32; rope [L, K/2, 2] float32 holds (cos, sin) for each pair of a head, pairs are neighbours
(x[2i], x[2i+1]); returns q, k, v, each [B, L, N, K] in qkv's dtype. Arithmetic is float32.
Source: Wan 2.1 `rope_apply` and `WanRMSNorm`; RoFormer, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import expect_floating, expect_shape


def qk_norm_rope_ref(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, float32 inside; a pair is one complex number, so a rotation is one multiplication."""
    rows, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    turn = torch.view_as_complex(rope).unsqueeze(1)  # [L, 1, K/2]

    def normed(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = F.rms_norm(part.float(), (width,), weight, eps)
        pairs = torch.view_as_complex(h.view(rows, length, heads, -1, 2))  # [B, L, N, K/2]
        return torch.view_as_real(pairs * turn).flatten(3).to(qkv.dtype)

    q, k, v = qkv.split(width, dim=2)
    return normed(q, q_weight), normed(k, k_weight), v.unflatten(2, (heads, -1))


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    *,
    heads: int,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k (normed and rotated) and v, each [B, L, N, K]; ValueError for shapes that do not fit together."""
    expect_floating("qkv", qkv)
    expect_shape("qkv", qkv, (None, None, None))
    width = qkv.shape[2] // 3
    if qkv.shape[2] != 3 * width or width % heads or (width // heads) % 2:
        raise ValueError(f"qkv has width {qkv.shape[2]}; expected three times {heads} heads of an even size")
    expect_shape("q_weight", q_weight, (width,))
    expect_shape("k_weight", k_weight, (width,))
    expect_shape("rope", rope, (qkv.shape[1], width // heads // 2, 2))
    return qk_norm_rope_ref(qkv, q_weight, k_weight, rope, heads, eps)
