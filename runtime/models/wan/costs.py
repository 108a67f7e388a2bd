"""Wan's arithmetic, bytes and memory as formulas over the published configs; `published` as in `models.costs.Costs`.

Held against torch's FlopCounterMode, and the runtime's own peaks, in tests/test_costs.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch

from runtime.models.costs import Operation, Shape, Weights, Work, attention, linear, sweep
from runtime.models.tiles import tiles
from runtime.models.wan.transformer import TransformerConfig
from runtime.models.wan.vae import WanVAE
from runtime.models.wan.vae_blocks import UpsamplingConv2d
from runtime.models.wan.vae_config import VAEConfig
from runtime.models.wan.vae_costs import decoder, encoder

PICTURE_TOKENS = 257  # of one picture's embedding, where pictures are shown to the cross-attention


@dataclass(frozen=True)
class WanCosts:
    """The formulas of one checkpoint."""

    config: TransformerConfig
    vae_config: VAEConfig
    text_config: Mapping[str, Any]

    @property
    def image_tokens(self) -> int:
        """Tokens of the pictures that cross-attention reads beside the text."""
        return 0 if self.config.image_dim is None else self.config.pos_embed_seq_len or PICTURE_TOKENS

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of the transformer's attention, and the size of each."""
        return self.config.num_attention_heads, self.config.attention_head_dim

    @cached_property
    def text_encoder(self) -> Weights:
        """UMT5's encoder: a token table, layers of attention and gated feed-forward."""
        c = self.text_config
        width, inner = c["d_model"], c["num_heads"] * c["d_kv"]
        layer = 4 * width * inner + 3 * width * c["d_ff"] + 2 * width
        layer += c["relative_attention_num_buckets"] * c["num_heads"]
        return Weights(outer=c["vocab_size"] * width + width, block=layer, blocks=c["num_layers"])

    @cached_property
    def transformer(self) -> Weights:
        """One expert."""
        c, d = self.config, self.config.width
        cells = math.prod(c.patch_size)
        block = 8 * d * d + 8 * d + 2 * d * c.ffn_dim + c.ffn_dim + d  # eight products with biases, the feed-forward
        norms = (4 + 2 * c.cross_attn_norm) * d
        outer = (c.in_channels * cells + 1) * d + (d + 1) * c.out_channels * cells
        outer += (c.text_dim + 1) * d + (d + 1) * d
        branch = len(c.vace_layers)
        wide = (c.freq_dim + 1) * d + (d + 1) * d + (d + 1) * 6 * d + ((c.num_layers + branch) * 6 + 2) * d
        if branch:
            outer += (c.vace_in_channels * cells + 1) * d + (d + 1) * d + branch * (block + (d + 1) * d)
            wide += branch * norms
        if c.image_dim is not None:
            block += 2 * (d + 1) * d
            norms += d
            outer += (c.image_dim + 1) * (c.image_dim + d) + (c.pos_embed_seq_len or 0) * c.image_dim
            wide += 2 * c.image_dim + 2 * d
        narrow = 6 * d * d + 2 * d * c.ffn_dim, 7 * d + c.ffn_dim  # Block.may_be_fp8
        return Weights(outer, wide, block, norms, c.num_layers, may_be_fp8=narrow)

    @cached_property
    def vae(self) -> Weights:
        """The autoencoder with its upsampling kernels folded from 3 x 3 to 4 x 4."""
        folded = [module.weight for module in self._vae_module.modules() if isinstance(module, UpsamplingConv2d)]
        wide = sum(p.numel() for name, p in self._vae_module.named_parameters() if WanVAE.keep_float32(name))
        count = sum(p.numel() for p in self._vae_module.parameters()) + sum(w.numel() * 7 // 9 for w in folded)
        return Weights(outer=count - wide, outer_float32=wide)

    @cached_property
    def _vae_module(self) -> WanVAE:
        with torch.device("meta"):
            return WanVAE(self.vae_config)

    def tile_of(self, height: int, width: int, parts: tuple[int, int]) -> tuple[int, int]:
        """Return the tile (height, width) in pixels, halo included, that cuts a frame into parts (rows, columns)."""
        return self._vae_module.tile_of(height, width, parts)

    def text(self, tokens: int, itemsize: int, *, published: bool = False) -> Work:
        """One prompt through UMT5; `published`: its products alone."""
        c = self.text_config
        width, inner, size, layers = c["d_model"], c["num_heads"] * c["d_kv"], itemsize, c["num_layers"]
        operations = [
            linear(tokens, width, inner, size, 3 * layers),
            attention(tokens, tokens, c["num_heads"], c["d_kv"], size, layers),
            linear(tokens, inner, width, size, layers),
            linear(tokens, width, c["d_ff"], size, 2 * layers),
            linear(tokens, c["d_ff"], width, size, layers),
        ]
        if not published:  # norms, residuals, the gated GELU, positions and softmax as separate passes
            operations += [
                sweep("pass", 4 * tokens * width, size, 8 * layers),
                sweep("pass", 3 * tokens * c["d_ff"], size, 9 * layers),
                sweep("pass", 2 * c["num_heads"] * tokens**2, 4, 4 * layers),
            ]
        live = tokens * (6 * width + 3 * c["d_ff"]) * size + 3 * c["num_heads"] * tokens**2 * 4
        return Work(tuple(operations), live)

    def project(self, shape: Shape) -> Work:
        """The text's way into keys and values of every block."""
        c, d, size = self.config, self.config.width, shape.itemsize
        rows, blocks = shape.rows * shape.text, c.num_layers + len(c.vace_layers)
        operations = [
            linear(rows, c.text_dim, d, size),
            linear(rows, d, d, size),
            linear(rows, d, 2 * d, size, blocks),
            sweep("modulate", 2 * rows * d, size, blocks),
        ]
        if c.image_dim is not None:
            image = self.image_tokens
            operations += [
                linear(image, c.image_dim, c.image_dim, size),
                linear(image, c.image_dim, d, size),
                linear(image, d, 2 * d, size, c.num_layers),
            ]
        if c.vace_layers:
            tokens = self._tokens(shape)
            operations += [
                linear(tokens, c.vace_in_channels * math.prod(c.patch_size), d, size),
                linear(tokens, d, d, size),
            ]
        kept = 2 * (rows * blocks + self.image_tokens * c.num_layers) * d * size
        return Work(tuple(operations), kept + rows * (c.text_dim + 4 * d) * size)

    def forward(self, shape: Shape, *, published: bool = False) -> Work:
        """All rows through one transformer."""
        operations = tuple(chain.from_iterable(self.ranges(shape, published=published).values()))
        return Work(operations, self._live(shape, self._tokens(shape)))

    def ranges(self, shape: Shape, *, published: bool = False) -> dict[str, tuple[Operation, ...]]:
        """The operations of `forward`; rows of one batch share x as far as the first text attention."""
        c = self.config
        tokens, size = self._tokens(shape), shape.itemsize
        shared = 0 if published or shape.rows == 1 or c.vace_layers else 1
        blocks = c.num_layers + len(c.vace_layers)
        before = [(rows, count) for rows, count in ((shape.rows, blocks - shared), (1, shared)) if count]
        branch = linear(shape.rows * tokens, c.width, c.width, size, len(c.vace_layers))  # its blocks' ends
        text = self.project(shape).operations if published else ()
        return {
            "denoise/attention": tuple(
                each.times(count) for rows, count in before for each in self._self_attention(rows, tokens, size)
            ),
            "denoise/cross_attention": (
                *(each.times(count) for rows, count in before for each in self._query(rows, tokens, size)),
                *(each.times(blocks) for each in self._text_attention(shape, tokens)),
            ),
            "denoise/mlp": tuple(each.times(blocks) for each in self._feed_forward(shape.rows * tokens, size)),
            "": (*self._ends(shape, tokens, published), branch, *text),
        }

    def _tokens(self, shape: Shape) -> int:
        """Video tokens of a pass."""
        return math.prod(n // p for n, p in zip(shape.latents, self.config.patch_size, strict=True))

    def _ends(self, shape: Shape, tokens: int, published: bool) -> list[Operation]:
        """Patches in and out, and the time's way into modulation."""
        c, d, size = self.config, self.config.width, shape.itemsize
        cells = math.prod(c.patch_size)
        begun = shape.rows if published else 1
        return [
            linear(begun * tokens, c.in_channels * cells, d, size),
            linear(begun, c.freq_dim, d, 4),
            linear(begun, d, d, 4),
            linear(begun, d, 6 * d, 4),
            sweep("modulate", 2 * shape.rows * tokens * d, size),
            linear(shape.rows * tokens, d, c.out_channels * cells, size),
            sweep("pass", 2 * shape.rows * tokens * c.out_channels * cells, 4, 3),
        ]

    def _self_attention(self, rows: int, tokens: int, size: int) -> list[Operation]:
        """A block's attention among the video tokens."""
        c, d, count = self.config, self.config.width, rows * tokens
        return [
            sweep("modulate", 2 * count * d, size),
            linear(count, d, 3 * d, size),
            sweep("qk_norm_rope", 4 * count * d, size),
            attention(tokens, tokens, c.num_attention_heads, c.attention_head_dim, size, rows),
            linear(count, d, d, size),
            sweep("gate_residual", 3 * count * d, size),
        ]

    def _query(self, rows: int, tokens: int, size: int) -> list[Operation]:
        """A block's way to the text attention's query, norms included."""
        d, count = self.config.width, rows * tokens
        return [
            linear(count, d, d, size),
            sweep("modulate", 2 * count * d, size, 1 + self.config.cross_attn_norm),
        ]

    def _text_attention(self, shape: Shape, tokens: int) -> list[Operation]:
        """The rest of the text attention, and of that to pictures, as far as the feed-forward's input."""
        c, d, size, rows = self.config, self.config.width, shape.itemsize, shape.rows
        count, heads = rows * tokens, (c.num_attention_heads, c.attention_head_dim)
        operations = [
            attention(tokens, shape.text, *heads, size, rows),
            linear(count, d, d, size),
            sweep("gate_residual", 3 * count * d, size),
            sweep("modulate", 2 * count * d, size),
        ]
        if self.image_tokens:
            operations.append(attention(tokens, self.image_tokens, *heads, size, rows))
        return operations

    def _feed_forward(self, count: int, size: int) -> list[Operation]:
        """A block's feed-forward over `count` tokens."""
        d, inner = self.config.width, self.config.ffn_dim
        return [
            linear(count, d, inner, size),
            linear(count, inner, d, size),
            sweep("gate_residual", 3 * count * d, size),
        ]

    def _live(self, shape: Shape, tokens: int) -> int:
        """Bytes at the worst place of a block, in widths of the residual stream: attention's end or the feed-forward's.

        At attention's end: stream, normed input, q k v joined, q, k, result, output. In the feed-forward: stream,
        input, the branch before, its normed input, inner, output, sum. In 16 bits on a CPU float32 copies add to it.
        """
        d = self.config.width
        widths = max(9.0, 6.0 + self.config.ffn_dim / d)
        latents = 8 * shape.rows * math.prod(shape.latents) * self.config.out_channels * 4
        return int(widths * shape.rows * tokens * d * shape.itemsize) + latents

    def decode(
        self, latents: tuple[int, int, int], tile: tuple[int, int] | None, itemsize: int, *, published: bool = False,
        parked: bool = False,
    ) -> Work:  # fmt: skip
        """The decoder over all chunks and tiles."""
        return decoder(self.vae_config, latents, self._cuts(latents, tile, True), itemsize, published, parked)[0]

    def decode_ranges(self, latents: tuple[int, int, int], itemsize: int) -> dict[str, list[Operation]]:
        """The operations of `decode` over whole frames, without the copies of what is remembered."""
        found = decoder(self.vae_config, latents, self._cuts(latents, None, True), itemsize, False, False)[1]
        return {name: [each for each in operations if each.kind != "pass"] for name, operations in found.items()}

    def encode(
        self, latents: tuple[int, int, int], tile: tuple[int, int] | None, itemsize: int, *, published: bool = False,
        parked: bool = False,
    ) -> Work:  # fmt: skip
        """The encoder over all chunks and tiles."""
        return encoder(self.vae_config, latents, self._cuts(latents, tile, False), itemsize, published, parked)

    def _cuts(self, latents: tuple[int, int, int], tile: tuple[int, int] | None, up: bool) -> list[tuple[int, int]]:
        """Latent cells (height, width) of each tile with its halo; the whole frame where there is none."""
        if tile is None:
            return [latents[1:]]
        module = self._vae_module
        halo = module.decoder.reach() if up else module.encoder.reach()
        cut = tiles(latents[1:], module.cells(tile, halo), halo)
        return [(each.rows.high - each.rows.low, each.columns.high - each.columns.low) for each in cut]
