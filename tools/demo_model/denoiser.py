"""The demo model's DiT: diffusers' WanTransformer3DModel, small, with a forward made for training on whole batches.

`forward` computes what the module's own forward does (tests hold it) with one timestep per latent frame, one attention
bias instead of 512 padded text tokens (zero-padded tokens are all the same: n of them are one with log n added to its
score), and what hidden layers know handed out for the auxiliary losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn

TEXT_LENGTH = 512


def build(
    *, width: int, layers: int, ffn: int, text: int, channels: int, heads: int | None = None
) -> WanTransformer3DModel:
    """Return a new transformer in the Wan layout whose output starts at zero."""
    heads = heads or width // 64
    dit = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels,
        out_channels=channels, text_dim=text, freq_dim=256, ffn_dim=ffn, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
    )  # fmt: skip
    nn.init.zeros_(dit.proj_out.weight)
    nn.init.zeros_(dit.proj_out.bias)
    for block in dit.blocks:
        nn.init.zeros_(block.scale_shift_table)
        for out in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            out.weight.data *= 1 / math.sqrt(2 * layers)
            nn.init.zeros_(out.bias)
    return dit


class Rotary:
    """Cosines and sines of every position, kept per grid (T, H, W)."""

    def __init__(self, head: int, device: torch.device | str = "cpu") -> None:
        across = 2 * (head // 6)
        self.parts = (head - 2 * across, across, across)
        self.device = device
        self.kept: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [L, K/2] of the tokens of a grid."""
        if grid not in self.kept:
            angles = []
            for axis, part in enumerate(self.parts):
                rates = 1.0 / 10000 ** (torch.arange(0, part, 2, dtype=torch.float64) / part)
                shape = [1, 1, 1, -1]
                shape[axis] = grid[axis]
                at = torch.outer(torch.arange(grid[axis], dtype=torch.float64), rates)
                angles.append(at.reshape(shape).expand(*grid, -1))
            angle = torch.cat(angles, -1).reshape(-1, sum(self.parts) // 2).to(self.device)
            self.kept[grid] = (angle.cos().float(), angle.sin().float())
        return self.kept[grid]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of x [B, L, N, K] by the angles of [L, K/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def _rms(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), norm.weight.float(), norm.eps or 1e-6).to(x.dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Attention over [B, L, N, K] and [B, S, N, K]; bias [B, 1, 1, S]. Returns [B, L, N * K]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.device.type == "cuda":
        bias = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    # On CPUs the fused kernel's backward takes longer than these three products of short sequences.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = F.softmax(scores if bias is None else scores + bias.to(scores.dtype), -1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def _modulated(norm: nn.Module, h: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return norm(h) * (1 + scale) + shift [B, L, D] with a shift and a scale [B, T, 1, D] per latent frame."""
    frames = h.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, F.layer_norm(frames, h.shape[-1:], eps=norm.eps), 1 + scale).flatten(1, 2)


def _gated(h: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return h + gate * y [B, L, D] with a gate [B, T, 1, D] per latent frame."""
    frames = (gate.shape[1], -1)
    return torch.addcmul(h.unflatten(1, frames), gate, y.unflatten(1, frames).float()).flatten(1, 2)


def run_block(
    block: nn.Module, h: torch.Tensor, six: torch.Tensor, context: torch.Tensor, bias: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return the hidden states [B, L, D] float32 after one block; `six` is [B, T, 1, 6, D], `context` [B, S, D]."""
    shift, scale, gate, shift_2, scale_2, gate_2 = (block.scale_shift_table[0] + six).unbind(3)
    y = _modulated(block.norm1, h, shift, scale).to(context.dtype)
    a = block.attn1
    split = lambda t: t.unflatten(-1, (a.heads, -1))  # noqa: E731
    q, k = split(_rms(a.norm_q, a.to_q(y))), split(_rms(a.norm_k, a.to_k(y)))
    y = _attend(_rotate(q, cos, sin), _rotate(k, cos, sin), split(a.to_v(y)), None)
    h = _gated(h, gate, a.to_out[0](y))
    a = block.attn2
    q = split(_rms(a.norm_q, a.to_q(block.norm2(h).to(context.dtype))))
    y = _attend(q, split(_rms(a.norm_k, a.to_k(context))), split(a.to_v(context)), bias)
    h = h + a.to_out[0](y)
    return _gated(h, gate_2, block.ffn(_modulated(block.norm3, h, shift_2, scale_2).to(context.dtype)))


def forward(
    dit: WanTransformer3DModel, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, bias: torch.Tensor,
    rotary: Rotary, taps: Sequence[int] = (), run: Callable[..., torch.Tensor] = run_block,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """Return the velocity [B, C, T, H, W] and the hidden states [B, T, H/2 * W/2, D] after the blocks in `taps`.

    x is [B, C, T, H, W], sigma [B, T] in [0, 1], text [B, S, text], bias [B, 1, 1, S] (0, log n, or -inf); `run` is
    `run_block`, or that compiled.
    """
    count, channels, frames, height, width = x.shape
    grid = (frames, height // 2, width // 2)
    h = x.unflatten(3, (-1, 2)).unflatten(5, (-1, 2))  # [B, C, T, h, 2, w, 2]
    h = h.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)  # [B, L, C * 4]
    h = F.linear(h, dit.patch_embedding.weight.flatten(1), dit.patch_embedding.bias).float()
    embed = dit.condition_embedder
    at = embed.time_embedder(embed.timesteps_proj(sigma.flatten() * 1000)).float()  # [B * T, D]
    six = embed.time_proj(F.silu(at)).float().reshape(count, frames, 1, 6, -1)
    context = embed.text_embedder(text).to(x.dtype)
    cos, sin = rotary(grid)
    kept = []
    for index, block in enumerate(dit.blocks):
        h = run(block, h, six, context, bias, cos, sin)
        if index in taps:
            kept.append(h.unflatten(1, (frames, -1)))
    shift, scale = (dit.scale_shift_table[0] + at.reshape(count, frames, 1, 1, -1)).unbind(3)
    y = dit.proj_out(_modulated(dit.norm_out, h, shift, scale).to(x.dtype)).unflatten(1, (frames, -1))
    y = y.unflatten(2, grid[1:]).unflatten(-1, (2, 2, channels))  # [B, T, h, w, 2, 2, C]
    return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape), kept
