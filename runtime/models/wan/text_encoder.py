"""UMT5's encoder, which Wan's prompts go through: relative positions in every layer, a gated feed-forward.

Parameters are named as `transformers` publishes them, and the arithmetic is in its order, so that the numbers are the
same; its library is not needed for them, which takes seconds to load. Source: mT5, https://arxiv.org/abs/2010.11934;
UniMax, https://arxiv.org/abs/2304.09151.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class TextConfig:
    """The encoder's numbers, by their names in its config.json."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


class Encoder(nn.Module):
    """Token numbers [R, S] -> states [R, S, D]; nothing is masked."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.shared = table(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the last norm gives."""
        return self.encoder(self.shared(tokens))


class Stack(nn.Module):
    """All layers, and the norm behind them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = Norm(config)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[R, S, D] -> the same."""
        for block in self.block:
            h = block(h)
        return self.final_layer_norm(h)


class Block(nn.Module):
    """One layer: attention, then the feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config), FeedForwardLayer(config)])

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[R, S, D] -> the same."""
        for layer in self.layer:
            h = layer(h)
        return h


class AttentionLayer(nn.Module):
    """h + attention(norm(h))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.SelfAttention = Attention(config)
        self.layer_norm = Norm(config)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[R, S, D] -> the same."""
        return h + self.SelfAttention(self.layer_norm(h))


class FeedForwardLayer(nn.Module):
    """h + feed_forward(norm(h))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = Norm(config)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[R, S, D] -> the same."""
        return h + self.DenseReluDense(self.layer_norm(h))


class Attention(nn.Module):
    """Attention whose scores are not scaled and have a bias by distance, per head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = table(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[R, S, D] -> the same."""
        rows, length, _ = h.shape
        q, k, v = (
            part(h).view(rows, length, -1, self.config.d_kv).transpose(1, 2) for part in (self.q, self.k, self.v)
        )  # [R, N, S, K]
        bias = self.relative_attention_bias(self.buckets(length, h.device)).permute(2, 0, 1)[None]  # [1, N, S, S]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(found.transpose(1, 2).reshape(rows, length, -1))

    def buckets(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the bucket [S, S] of each distance: both ways, near ones exactly, far ones by logarithm."""
        half = self.config.relative_attention_num_buckets // 2
        places = torch.arange(length, device=device)
        distance = places[None, :] - places[:, None]
        after, distance = (distance > 0).to(torch.long) * half, distance.abs()
        near = half // 2
        ratio = torch.log(distance.float() / near) / math.log(self.config.relative_attention_max_distance / near)
        far = (near + (ratio * (half - near)).to(torch.long)).clamp(max=half - 1)
        return after + torch.where(distance < near, distance, far)


class FeedForward(nn.Module):
    """(gelu(wi_0 h) * wi_1 h) wo, with the tanh form of GELU as published."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[R, S, D] -> the same."""
        gate = self.wi_0(h)
        gate = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))))
        return self.wo(gate * self.wi_1(h))


class Norm(nn.Module):
    """RMS norm with a gain; the mean of squares is float32."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[R, S, D] -> the same."""
        h = h * torch.rsqrt(h.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(self.weight.dtype)


def table(count: int, width: int) -> nn.Embedding:
    """Return an empty table: drawing numbers that weights replace at once, PyTorch would load its compiler for that."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)


def build_text_encoder(config: Mapping[str, Any]) -> Encoder:
    """Return an empty encoder of a config.json's numbers; ValueError for a config of another."""
    if config.get("model_type") != "umt5":
        raise ValueError(f"the text encoder is a {config.get('model_type')!r}; Wan has 'umt5': fetch its config again")
    if (kind := config.get("feed_forward_proj", "gated-gelu")) != "gated-gelu":
        raise ValueError(f"the text encoder has feed_forward_proj {kind!r}; Wan's is 'gated-gelu': fetch it again")
    known = {field.name for field in fields(TextConfig)}
    try:
        return Encoder(TextConfig(**{name: value for name, value in config.items() if name in known}))
    except TypeError as error:
        raise ValueError(f"the text encoder's config lacks numbers ({error}); fetch it again") from error
