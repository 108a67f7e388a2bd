"""Wan's diffusion transformer: 3D patches, self-attention with 3D rotary positions, text by cross-attention, adaLN.

Source of the architecture: the published configs and code of Wan 2.1 and 2.2. Three things are done once that the
published code repeats: the text's keys and values are projected per request, not per step; identical padding tokens
are folded into few; one x serves both guidance branches until the first cross-attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from runtime import kernels
from runtime.models.layers import (
    FullAttention,
    Read,
    added_and_modulated,
    feed_forward,
    modulated,
    rotary_table,
    timestep_embedding,
)
from runtime.models.spec import Projected, RunBlock, Stretch, config_from, run_block
from runtime.trace import mark

Attention = Callable[..., torch.Tensor]


QK_NORM = "rms_norm_across_heads"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The published `transformer/config.json`; absent keys have the published code's defaults."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    image_dim: int | None = None  # width of image embeddings, where pictures are shown to the cross-attention
    pos_embed_seq_len: int | None = None  # their number for two pictures, which then have positions
    vace_layers: tuple[int, ...] = ()  # blocks that a control branch adds to
    vace_in_channels: int = 0

    @property
    def width(self) -> int:
        """Width of the residual stream, D."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> TransformerConfig:
        """Read a published config; ValueError for unknown keys and for variants that are not supported."""
        given = dict(given)
        if (norm := given.pop("qk_norm", QK_NORM)) != QK_NORM:
            raise ValueError(f"transformer config has qk_norm {norm!r}; supported is {QK_NORM!r}")
        added = given.pop("added_kv_proj_dim", None)
        config = cls(**config_from(cls, given, "transformer config"))
        if config.image_dim is not None and added != config.width:
            raise ValueError(
                f"transformer config has added_kv_proj_dim {added}; supported is its width, {config.width}"
            )
        if config.attention_head_dim % 2 or config.attention_head_dim < 6:
            raise ValueError(
                f"transformer config has attention_head_dim {config.attention_head_dim}; legal: even, 6 or more"
            )
        return config


class WanTransformer(nn.Module):
    """Velocity of a noisy video latent, given sigma and the projected text."""

    def __init__(
        self, config: TransformerConfig, *, integer_time: bool = True, attention: Attention = kernels.attention
    ) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.integer_time = integer_time  # the published UniPC rounds times down to whole thousandths
        self.patch_embedding = nn.Linear(config.in_channels * math.prod(config.patch_size), width)
        self.time_in = nn.Linear(config.freq_dim, width)
        self.time_out = nn.Linear(width, width)
        self.time_projection = nn.Linear(width, 6 * width)
        self.text_in = nn.Linear(config.text_dim, width)
        self.text_out = nn.Linear(width, width)
        self.image_in = ImageProjection(config) if config.image_dim else None
        self.control = ControlBranch(config, attention) if config.vace_layers else None
        self.modulation = nn.Parameter(torch.empty(config.num_layers + len(config.vace_layers), 6, width))
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))  # type: ignore[assignment]
        self.head_modulation = nn.Parameter(torch.empty(2, width))
        self.head = nn.Linear(width, config.out_channels * math.prod(config.patch_size))

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings."""
        return self.config.text_dim

    @staticmethod
    def keep_float32(name: str) -> bool:
        """Tell whether a parameter stays float32 in any dtype: the time path, modulation and norms, as published."""
        return name.startswith("time_") or "modulation" in name or "norm" in name

    def project(
        self,
        texts: Sequence[torch.Tensor],
        text_length: int,
        latent_shape: tuple[int, int, int],
        *,
        pictures: torch.Tensor | None = None,
        control: torch.Tensor | None = None,
        stretch: Stretch | None = None,
    ) -> Projected:
        """Project the text embeddings of R prompts, each [S_r, text_dim] without padding, once for all steps.

        `text_length` is the length that the published model zero-pads to and attends to without a mask;
        `latent_shape` is (T, H, W). All padding tokens are equal behind the text layers, so they are folded: a few
        keys stand for all, their scores raised by the logarithm of how many they are.
        """
        device, dtype = self.head.weight.device, self.head.weight.dtype
        folds = [fold_padding(text_length - len(text), dtype) for text in texts]
        length = max(len(text) + len(fold) for text, fold in zip(texts, folds, strict=True))
        biased = any(any(fold) or len(text) + len(fold) < length for text, fold in zip(texts, folds, strict=True))
        padded = torch.zeros(len(texts), length, self.config.text_dim, device=device, dtype=dtype)
        bias = torch.full((len(texts), 1, 1, length), -math.inf, dtype=torch.float32)
        for row, (text, fold) in enumerate(zip(texts, folds, strict=True)):
            padded[row, : len(text)] = text.to(device, dtype)
            bias[row, ..., : len(text)] = 0.0
            bias[row, ..., len(text) : len(text) + len(fold)] = torch.tensor(fold)
        text = self.text_out(F.gelu(self.text_in(padded), approximate="tanh"))  # [R, S, D]
        branch = self.control
        # One block after the other: blocks that come and go are there only while it is their turn.
        pairs = [block.cross_attention.project(text) for block in chain(self.blocks, branch.blocks if branch else ())]
        grid = [n // p for n, p in zip(latent_shape, self.config.patch_size, strict=True)]
        rope = rotary_table(self.config.attention_head_dim, grid, self.config.rope_max_seq_len, stretch=stretch)
        return Projected(
            keys=tuple(k for k, _ in pairs),
            values=tuple(v for _, v in pairs),
            bias=bias.to(device, dtype) if biased else None,
            rope=rope.to(device),
            images=() if pictures is None else self.project_pictures(pictures.to(device, dtype)),
            control=None
            if branch is None or control is None
            else branch.embed(self.patchify(control.to(device, dtype))),
        )

    def project_pictures(self, pictures: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Return keys and values [1, P * S, N, K] per block of image embeddings [P, S, image_dim]."""
        assert self.image_in is not None
        tokens = self.image_in(pictures.flatten(0, 1)[None])
        return tuple(block.cross_attention.project_pictures(tokens) for block in self.blocks)

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, projected: Projected, run: RunBlock = run_block
    ) -> torch.Tensor:
        """Return the velocity [R, C, T, H, W] float32 of x [B, C, T, H, W] at sigma [B] or [B, T], B = R or 1."""
        tokens = self.patchify(x.to(self.head.weight.dtype))
        return self.unpatchify(self.flow(tokens, self.times(sigma), projected, run), x.shape).float()

    def flow(
        self, tokens: torch.Tensor, time: torch.Tensor, projected: Projected, run: RunBlock = run_block
    ) -> torch.Tensor:
        """Return the velocity's patches [R, L, C * pt * ph * pw] of x's patches, same but [B, ...], at times [B, M].

        Tensors in, tensors out, L tokens whatever grid they come from: what engines export. `run(block, *arguments)`
        calls each block.
        """
        h = self.patch_embedding(tokens)  # [B, L, D]
        modulation, head_modulation = self.modulate_time(time)
        added = {} if self.control is None else self.control(h, modulation[len(self.blocks) :], projected, run)
        for i, block in enumerate(self.blocks):
            pair = projected.keys[i], projected.values[i]
            images = projected.images[i] if projected.images else ()
            with mark("denoise/block", i):
                h = run(block, h, modulation[i], *pair, projected.bias, projected.rope, *images)
            if i in added:
                h = h + added.pop(i)
        shift, scale = head_modulation.unbind(2)
        return self.head(kernels.modulate(h, scale, shift, eps=self.config.eps))

    def times(self, sigma: torch.Tensor) -> torch.Tensor:
        """Turn sigma [B] or [B, T] float64 into the model's own times [B, M] float32, on its device."""
        time = sigma.view(len(sigma), -1) * 1000.0
        if self.integer_time:
            time = time.floor()
        return time.float().to(self.time_in.weight.device, non_blocking=True)  # else the host waits for the last step

    def modulate_time(self, time: torch.Tensor) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """Turn times [B, M] into modulation vectors: per block [B, M, 6, D], for the head [B, M, 2, D]; float32."""
        t = timestep_embedding(time.flatten(), self.config.freq_dim).unflatten(0, time.shape)
        t = self.time_out(F.silu(self.time_in(t)))  # [B, M, D]
        vectors = self.time_projection(F.silu(t)).unflatten(2, (6, -1))  # [B, M, 6, D]
        modulation = vectors + self.modulation[:, None, None]  # [blocks, B, M, 6, D]
        return modulation.unbind(0), t.unsqueeze(2) + self.head_modulation

    def patchify(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, L, C * pt * ph * pw], tokens in the order (t, h, w)."""
        pt, ph, pw = self.config.patch_size
        rows, channels, t, h, w = x.shape
        x = x.view(rows, channels, t // pt, pt, h // ph, ph, w // pw, pw)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(rows, -1, channels * pt * ph * pw)

    def unpatchify(self, h: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """[R, L, pt * ph * pw * C] -> [R, C, T, H, W]."""
        pt, ph, pw = self.config.patch_size
        _, _, t, height, width = shape
        h = h.view(h.shape[0], t // pt, height // ph, width // pw, pt, ph, pw, -1)
        return h.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(h.shape[0], -1, t, height, width)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; each adds to the residual stream [B, L, D]."""

    # Of forward's arguments; P are tokens of pictures.
    shapes = ("B L D", "B M 6 D", "R S N K", "R S N K", "R 1 1 S", "L K/2 2", "1 P N K", "1 P N K")
    # The layers that every video token passes in every step; the text's are passed once per request.
    may_be_fp8 = (
        "self_attention.qkv", "self_attention.attention", "self_attention.out", "cross_attention.q",
        "cross_attention.out", "ffn_in", "ffn_out",
    )  # fmt: skip

    def __init__(self, config: TransformerConfig, attention: Attention) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attention = SelfAttention(config, attention)
        self.cross_attention = CrossAttention(config, attention)
        self.cross_norm = LayerNormWeights(config.width) if config.cross_attn_norm else None
        self.ffn_in = nn.Linear(config.width, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.width)

    def forward(
        self,
        h: torch.Tensor,
        modulation: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        rope: torch.Tensor,
        *images: torch.Tensor,
    ) -> torch.Tensor:
        """h [B, L, D], modulation [B or 1, M, 6, D], keys and values [R, S, N, K]; returns [R, L, D].

        `images` are nothing, or keys and values [1, S, N, K] of pictures.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)
        with mark("denoise/attention"):
            x = modulated(self.self_attention.qkv, h, scale1, shift1, eps=self.eps)
            y = self.self_attention(x, rope)
            if (norm := self.cross_norm) is None:
                x = h = kernels.gate_residual(h, y, gate1)
            else:
                h, x = added_and_modulated(
                    self.cross_attention.q, h, y, gate1, weight=norm.weight, bias=norm.bias, eps=self.eps
                )
        with mark("denoise/cross_attention"):
            y = self.cross_attention(x, keys, values, bias, *images)
            h, x = added_and_modulated(self.ffn_in, h.expand_as(y), y, None, scale2, shift2, eps=self.eps)
        with mark("denoise/mlp"):
            return feed_forward(x, self.ffn_in, self.ffn_out, h, gate2)


class SelfAttention(nn.Module):
    """Attention among the video tokens: q and k normed over the whole width, then rotated."""

    def __init__(self, config: TransformerConfig, attention: Attention) -> None:
        super().__init__()
        self.heads, self.eps = config.num_attention_heads, config.eps
        self.attention = FullAttention(attention)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm = nn.Parameter(torch.empty(config.width))
        self.k_norm = nn.Parameter(torch.empty(config.width))
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Read, rope: torch.Tensor) -> torch.Tensor:
        """x [B, L, D] -> [B, L, D]."""
        qkv = self.qkv(x)
        q, k, v = kernels.qk_norm_rope(qkv, self.q_norm, self.k_norm, rope, heads=self.heads, eps=self.eps)
        return self.out(self.attention(q, k, v))


class CrossAttention(nn.Module):
    """Attention of the video tokens to the text; keys and values are projected once per request."""

    def __init__(self, config: TransformerConfig, attention: Attention) -> None:
        super().__init__()
        self.heads, self.eps, self.attention = config.num_attention_heads, config.eps, attention
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.q_norm = nn.Parameter(torch.empty(config.width))
        self.k_norm = nn.Parameter(torch.empty(config.width))
        self.out = nn.Linear(config.width, config.width)
        if config.image_dim:
            self.image_kv = nn.Linear(config.width, 2 * config.width)
            self.image_k_norm = nn.Parameter(torch.empty(config.width))

    def project_pictures(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens of pictures [1, S, D] -> keys and values [1, S, N, K]."""
        k, v = self.image_kv(tokens).chunk(2, dim=2)
        return self.split_heads(self.normed(k, self.image_k_norm)), self.split_heads(v).contiguous()

    def project(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """text [R, S, D] -> keys and values [R, S, N, K]."""
        k, v = self.kv(text).chunk(2, dim=2)
        return self.split_heads(self.normed(k, self.k_norm)), self.split_heads(v).contiguous()

    def forward(
        self,
        x: Read,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        *images: torch.Tensor,
    ) -> torch.Tensor:
        """x [B, L, D], keys and values [R, S, N, K] -> [R, L, D]; B is R or 1. Pictures are attended to apart."""
        q = self.split_heads(self.normed(self.q(x), self.q_norm)).expand(keys.shape[0], -1, -1, -1)
        y = self.attention(q, keys, values, bias)
        if images:
            y = y + self.attention(q, *(t.expand(keys.shape[0], -1, -1, -1).contiguous() for t in images))
        return self.out(y)

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm of [R, S, D] over the whole width."""
        return kernels.modulate(x, weight=weight, eps=self.eps, norm="rms")

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[R, S, D] -> [R, S, N, K]."""
        return x.unflatten(2, (self.heads, -1))


class ImageProjection(nn.Module):
    """Image embeddings -> tokens that cross-attention reads; two pictures are told apart by learned positions."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.image_dim
        self.norm_in = LayerNormWeights(config.image_dim)
        self.first = nn.Linear(config.image_dim, config.image_dim)
        self.second = nn.Linear(config.image_dim, config.width)
        self.norm_out = LayerNormWeights(config.width)
        length = config.pos_embed_seq_len
        self.positions = None if length is None else nn.Parameter(torch.empty(1, length, config.image_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, S, image_dim] -> [1, S, D]."""
        if self.positions is not None:
            if x.shape[1] != self.positions.shape[1]:
                raise ValueError("this model is shown two pictures, the first and the last frame; give both")
            x = x + self.positions
        y = F.gelu(self.first(normalised(x, self.norm_in)))
        return normalised(self.second(y), self.norm_out)


def normalised(x: torch.Tensor, norm: LayerNormWeights) -> torch.Tensor:
    """Layer norm in float32, with PyTorch's own epsilon as published."""
    return F.layer_norm(x.float(), (x.shape[-1],), norm.weight.float(), norm.bias.float()).to(x.dtype)


def checked(control: torch.Tensor | None) -> torch.Tensor:
    """Return the channels that a control branch cannot do without."""
    assert control is not None
    return control


class ControlBranch(nn.Module):
    """VACE's branch: blocks of its own read what is known and add to some of the main blocks.

    Source: https://arxiv.org/abs/2503.07598 and the published code.
    """

    def __init__(self, config: TransformerConfig, attention: Attention) -> None:
        super().__init__()
        width = config.width
        self.layers = config.vace_layers
        self.patch_embedding = nn.Linear(config.vace_in_channels * math.prod(config.patch_size), width)
        self.begin = nn.Linear(width, width)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config, attention) for _ in self.layers)  # type: ignore[assignment]
        self.ends: Sequence[nn.Linear] = nn.ModuleList(nn.Linear(width, width) for _ in self.layers)  # type: ignore[assignment]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the branch starts from [1, L, D], once for all steps."""
        return self.begin(self.patch_embedding(tokens))

    def forward(
        self, h: torch.Tensor, modulation: Sequence[torch.Tensor], projected: Projected, run: RunBlock
    ) -> dict[int, torch.Tensor]:
        """Return what is added behind the main blocks, by their number; h [B, L, D] is what these start from."""
        assert projected.control is not None
        c = projected.control + h
        added = {}
        first = len(projected.keys) - len(self.blocks)
        for i, (block, end, layer) in enumerate(zip(self.blocks, self.ends, self.layers, strict=True)):
            pair = projected.keys[first + i], projected.values[first + i]
            c = run(block, c, modulation[i], *pair, projected.bias, projected.rope)
            added[layer] = end(c)
        return added


class LayerNormWeights(nn.Module):
    """The affine weights of a layer norm that `kernels.modulate` applies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))


def fold_padding(count: int, dtype: torch.dtype) -> list[float]:
    """Return score biases, exact in `dtype`, of few keys that together weigh as much as `count` equal ones.

    One key with log(count) would do if the dtype held it; in bfloat16 that logarithm is off by up to 1.5 %, so each
    next key carries what rounding down left over, until less than 1e-5 of the whole is missing.
    """
    biases: list[float] = []
    left = float(count)
    while left > 1e-5 * count:
        bias = torch.tensor(math.log(left), dtype=torch.float64).to(dtype)
        if math.exp(bias) > left * (1 + 1e-6):
            bias = torch.nextafter(bias, torch.tensor(-math.inf, dtype=dtype))
        biases.append(float(bias))
        left -= math.exp(bias)
    return biases
