"""Wan's video encoder and decoder: each a trunk that sees whole frames, and a branch that may run on tiles.

The trunk holds the middle block, whose attention sees the whole frame, and the level beside it: there cells are few,
so it costs little memory, and what it sees no tile's halo must hold. B batch, F frames of a chunk, H W latent height
and width. Source: the published code of Wan 2.1 and 2.2, https://arxiv.org/abs/2503.20314.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from runtime.kernels.norm_silu import norm_silu
from runtime.models.wan.vae_blocks import CausalConv3d, DownBlock, History, MidBlock, Norm, Ring, UpBlock
from runtime.trace import mark

if TYPE_CHECKING:
    from runtime.models.wan.vae_config import VAEConfig

WHOLE_LEVELS = 1  # that the trunk takes of each network


class Streaming(nn.Module):
    """A network over a stream of chunks: it knows how many frames its causal convolutions must remember."""

    kept: tuple[int, ...]  # per causal convolution

    def number_slots(self) -> None:
        """Give each causal convolution its place in the history; the last step of construction."""
        convolutions = [module for module in self.modules() if isinstance(module, CausalConv3d)]
        for slot, convolution in enumerate(convolutions):
            convolution.slot = slot
        self.kept = tuple(convolution.weight.shape[2] - convolution.time_stride for convolution in convolutions)

    def empty_history(self) -> History:
        """Return the history in front of a clip's first chunk."""
        return [Ring(size) for size in self.kept]


class Decoder(Streaming):
    """One latent frame [B, z_dim, 1, H, W] to its pixel frames [B, out_channels, F, 8 H, 8 W]; `conv_in` may be of a
    wider dtype than the rest."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * multiple for multiple in config.dim_mult[::-1]]
        levels = len(widths) - 1
        self.conv_in = CausalConv3d(config.z_dim, widths[0], (3, 3, 3))
        self.mid_block = MidBlock(widths[0])
        blocks, width = [], widths[0]
        for i, out in enumerate(widths):
            time = config.temperal_downsample[levels - 1 - i] if i < levels else False
            blocks.append(UpBlock(width, out, config, level=i, upsample=i < levels, time=time))
            width = out if config.is_residual else out // 2
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, (3, 3, 3))
        self.number_slots()

    @property
    def scale(self) -> int:
        """Cells of the trunk's result per latent cell, each way."""
        return 2 ** sum(cast(UpBlock, block).upsampler is not None for block in self.up_blocks[:WHOLE_LEVELS])

    def trunk(self, z: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        """The part that sees the whole frame: attention is there."""
        with mark("decode/middle"):
            x = self.conv_in(z, history).to(self.conv_out.weight.dtype)
            x = self.mid_block(x, history)
        for block in self.up_blocks[:WHOLE_LEVELS]:
            x = block(x, history, first)
        return x

    def reach(self) -> int:
        """Return how many latent cells around, to each side, a pixel of the branch's result depends on."""
        reach = self.conv_out.weight.shape[3] // 2
        for block in reversed(self.up_blocks[WHOLE_LEVELS:]):
            reach = cast(UpBlock, block).reach(reach)
        return -(-reach // self.scale)

    def memory(self) -> int:
        """Return how many latent frames before it a latent frame's pixels depend on."""
        frames = self.conv_out.weight.shape[2] - 1
        for block in reversed(self.up_blocks):
            frames = cast(UpBlock, block).memory(frames)
        return frames + self.mid_block.memory() + self.conv_in.weight.shape[2] - 1

    def branch(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        """The part that sees a neighbourhood only, so that it may run on tiles."""
        for block in self.up_blocks[WHOLE_LEVELS:]:
            x = block(x, history, first)
        with mark("decode/head"):
            return self.conv_out(norm_silu(x, self.norm_out.gamma, inplace=True), history)


class Encoder(Streaming):
    """A chunk of frames [B, in_channels, F, 8 H, 8 W] to the moments [B, 2 * z_dim, 1, H, W] of one latent frame;
    `conv_out` may be of a wider dtype than the rest."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * multiple for multiple in config.dim_mult]
        levels = len(widths) - 1
        self.conv_in = CausalConv3d(config.in_channels, config.base_dim, (3, 3, 3))
        blocks, width = [], config.base_dim
        for i, out in enumerate(widths):
            time = config.temperal_downsample[i] if i < levels else False
            blocks.append(DownBlock(width, out, config, downsample=i < levels, time=time))
            width = out
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(width)
        self.norm_out = Norm(width)
        self.conv_out = CausalConv3d(width, 2 * config.z_dim, (3, 3, 3))
        self.number_slots()

    @property
    def scale(self) -> int:
        """Cells of the branch's result per latent cell, each way."""
        return 2 ** sum(cast(DownBlock, block).downsampler is not None for block in self.down_blocks[-WHOLE_LEVELS:])

    def branch(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        """The part that sees a neighbourhood only, so that it may run on tiles."""
        x = self.conv_in(x, history)
        for block in self.down_blocks[:-WHOLE_LEVELS]:
            x = block(x, history, first)
        return x

    def reach(self) -> int:
        """Return how many latent cells around, to each side, a cell of the branch's result depends on."""
        reach, levels = 0, 0
        for block in reversed(self.down_blocks[:-WHOLE_LEVELS]):
            reach = cast(DownBlock, block).reach(reach)
            levels += cast(DownBlock, block).downsampler is not None
        return -(-(reach + self.conv_in.weight.shape[3] // 2) // 2**levels)

    def trunk(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        """The part that sees the whole frame: attention is there."""
        for block in self.down_blocks[-WHOLE_LEVELS:]:
            x = block(x, history, first)
        x = norm_silu(self.mid_block(x, history), self.norm_out.gamma, inplace=True)
        return self.conv_out(x.to(self.conv_out.weight.dtype), history)
