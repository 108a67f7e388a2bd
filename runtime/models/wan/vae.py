"""Wan's video autoencoder, 2.1 and 2.2: a causal 3-D convolutional encoder and decoder that stream.

One structure serves both: 2.2 adds parameter-free residual paths around its blocks (`is_residual`) and folds pixels
into channels in front (`patch_size`). A clip passes in chunks of one latent frame: the first holds 1 pixel frame,
each next one `stride[0]`. What a causal convolution must remember of the chunks before stands in its `Ring` of the
clip's `History`; so memory does not grow with the clip, and no call disturbs another.

B batch, C channels, T H W latent time, height, width, F pixel frames; z_dim is C of the latents.
Source of the architecture: the published configs and code of Wan 2.1 and 2.2, https://arxiv.org/abs/2503.20314.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from runtime.kernels.norm_silu import norm_silu
from runtime.models.spec import config_from
from runtime.models.tiles import Tile, tiles
from runtime.models.wan.vae_blocks import (
    CausalConv3d,
    DownBlock,
    History,
    MidBlock,
    Norm,
    Ring,
    UpBlock,
    UpsamplingConv2d,
    pointwise,
)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The published `vae/config.json`; absent keys have the published code's defaults."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: as base_dim
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # published spelling
    dropout: float = 0.0  # of the training; not used
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> VAEConfig:
        """Read a published config; ValueError for unknown keys, contradictions and variants not supported."""
        # Wan 2.2 publishes clip_output, which its code does not read: pixels are always clamped.
        given = {key: value for key, value in given.items() if key != "clip_output"}
        return cls(**config_from(cls, given, "vae config"))

    def __post_init__(self) -> None:
        if self.attn_scales:
            raise ValueError(f"vae config has attn_scales {list(self.attn_scales)}; supported is none, as published")
        levels = len(self.dim_mult) - 1
        time, height, _ = self.stride
        for key, value, expected, why in (
            ("temperal_downsample", len(self.temperal_downsample), levels, "entries, one less than dim_mult"),
            ("latents_mean", len(self.latents_mean), self.z_dim, "entries, as z_dim"),
            ("latents_std", len(self.latents_std), self.z_dim, "entries, as z_dim"),
            ("scale_factor_temporal", self.scale_factor_temporal, time, "as temperal_downsample gives"),
            ("scale_factor_spatial", self.scale_factor_spatial, height, "as dim_mult and patch_size give"),
        ):
            if value != expected:
                raise ValueError(f"vae config has {key}: {value}; expected {expected} {why}")
        cells = (self.patch_size or 1) ** 2
        for key, value in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if value % cells:
                raise ValueError(f"vae config has {key}: {value}; expected a multiple of {cells}, patch_size squared")

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent cell in (time, height, width)."""
        spatial = 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)
        return 2 ** sum(self.temperal_downsample), spatial, spatial


class WanVAE(nn.Module):
    """Video to latents and back, chunk by chunk."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.stride = config.stride
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def prepare(self) -> None:
        """Lay the weights out for speed; call once, after loading and moving. Results stay the same.

        Afterwards the upsampling convolutions hold folded kernels, so published weights no longer load.
        """
        for module in self.modules():
            if isinstance(module, CausalConv3d | UpsamplingConv2d):
                module.prepare()
            elif isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def decode_stream(self, latents: torch.Tensor, tile: tuple[int, int] | None = None) -> Iterator[torch.Tensor]:
        """Yield the clip of latents [B, C, T, H, W], normalised as the sampler has them, while it is decoded.

        Chunks are [B, 3, F, height, width] float32 in [-1, 1]: F is 1 for the first latent frame, `stride[0]` for
        each next one. `tile` (height, width) in pixels bounds what is decoded at once, halo included; the numbers are
        the same. ValueError for latents of another shape, or a tile that holds nothing but halo.
        """
        if latents.dim() != 5 or latents.shape[1] != self.config.z_dim or 0 in latents.shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; expected [B, {self.config.z_dim}, T, H, W]")
        height, width = latents.shape[3:]
        halo = self.decoder.reach()
        return self._decode_chunks(latents, tiles((height, width), self._cells(tile, halo), halo))

    @torch.no_grad()
    def _decode_chunks(self, latents: torch.Tensor, cuts: list[Tile]) -> Iterator[torch.Tensor]:
        weight = self.post_quant_conv.weight
        mean, std = self._statistics(weight.device)
        whole = self.decoder.empty_history()
        histories = [self.decoder.empty_history() for _ in cuts]
        for t in range(latents.shape[2]):
            z = latents[:, :, t : t + 1].to(weight.device, torch.float32) * std + mean
            z = pointwise(self.post_quant_conv, z.to(weight.dtype, memory_format=torch.channels_last_3d))
            x = self.decoder.trunk(z, whole)
            parts = self._decode_tiles(x, cuts, histories, t == 0)
            yield assembled(parts, cuts, (latents.shape[3], latents.shape[4]), self.stride[1])

    def _decode_tiles(
        self, x: torch.Tensor, cuts: list[Tile], histories: list[History], first: bool
    ) -> Iterator[torch.Tensor]:
        for tile, history in zip(cuts, histories, strict=True):
            part = tile.cut(x) if len(cuts) == 1 else tile.cut(x).clone(memory_format=torch.channels_last_3d)
            pixels = self.decoder.branch(part, history, first)
            yield unpatchify(pixels, self.config.patch_size or 1).float().clamp_(-1.0, 1.0)

    def tile_of(self, height: int, width: int, parts: int) -> tuple[int, int]:
        """Return the tile (height, width) in pixels, halo included, that cuts a frame into `parts` each way."""
        halo = self.decoder.reach()
        sides = (-(-(side // self.stride[1]) // parts) + halo * min(parts - 1, 2) for side in (height, width))
        down, across = (max(cells, 2 * halo + 1) * self.stride[1] for cells in sides)
        return down, across

    def _cells(self, tile: tuple[int, int] | None, halo: int) -> tuple[int, int] | None:
        """Return a tile's size in latent cells; ValueError where a halo of so many leaves no core."""
        if tile is None:
            return None
        scale = self.stride[1]
        height, width = (side // scale for side in tile)
        if min(height, width) <= 2 * halo:
            least = (2 * halo + 1) * scale
            raise ValueError(
                f"tile is {tile[0]}x{tile[1]} pixels (height x width), of which {halo * scale} on each side are halo; "
                f"legal: at least {least}x{least}"
            )
        return height, width

    def encode(self, frames: torch.Tensor, tile: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the normalised latents [B, C, T, H, W] float32 of frames [B, 3, F, height, width] in [-1, 1].

        They are the mean of the encoder's distribution. `tile` as in `decode_stream`. ValueError unless F is 1 + a
        multiple of `stride[0]` and height and width are multiples of `stride[1:]`.
        """
        self._check_frames(frames)
        count, step = frames.shape[2], self.stride[0]
        if count % step != 1 % step:
            below = count - (count - 1) % step
            legal = f"{below} or {below + step}" if count else "1"
            raise ValueError(f"frames holds {count} frames; expected 1 + a multiple of {step}: nearest {legal}")
        starts = [0, *range(1, count, step)]
        chunks = (frames[:, :, a:b] for a, b in itertools.pairwise([*starts, count]))
        return torch.cat(list(self.encode_stream(chunks, tile)), dim=2)

    @torch.no_grad()
    def encode_stream(
        self, chunks: Iterable[torch.Tensor], tile: tuple[int, int] | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield one latent frame [B, C, 1, H, W], as of `encode`, per chunk of frames [B, 3, F, height, width].

        F is 1 in the first chunk and `stride[0]` in each next one; ValueError at a chunk that is not so.
        """
        weight = self.quant_conv.weight
        mean, std = self._statistics(weight.device)
        whole = self.encoder.empty_history()
        halo = self.encoder.reach()
        size = self._cells(tile, halo)
        histories: list[History] = []
        for index, frames in enumerate(chunks):
            self._check_frames(frames)
            expected = self.stride[0] if index else 1
            if frames.shape[2] != expected:
                raise ValueError(f"chunk {index} holds {frames.shape[2]} frames; expected {expected}")
            height, width = (side // self.stride[1] for side in frames.shape[3:])
            cuts = tiles((height, width), size, halo)
            histories = histories or [self.encoder.empty_history() for _ in cuts]
            x = patchify(frames.to(weight.device, weight.dtype), self.config.patch_size or 1)
            parts = self._encode_tiles(x, cuts, histories, index == 0)
            x = self.encoder.trunk(assembled(parts, cuts, (height, width), 1), whole)
            mu = pointwise(self.quant_conv, x)[:, : self.config.z_dim]
            yield (mu.float() - mean) / std

    def _encode_tiles(
        self, x: torch.Tensor, cuts: list[Tile], histories: list[History], first: bool
    ) -> Iterator[torch.Tensor]:
        scale = self.stride[1] // (self.config.patch_size or 1)
        for tile, history in zip(cuts, histories, strict=True):
            part = tile.cut(x, scale).clone(memory_format=torch.channels_last_3d)
            yield self.encoder.branch(part, history, first)

    def _check_frames(self, frames: torch.Tensor) -> None:
        channels = self.config.in_channels // (self.config.patch_size or 1) ** 2
        if frames.dim() != 5 or frames.shape[1] != channels:
            raise ValueError(f"frames have shape {list(frames.shape)}; expected [B, {channels}, F, height, width]")
        for name, given, multiple in zip(("height", "width"), frames.shape[3:], self.stride[1:], strict=True):
            if given == 0 or given % multiple:
                below = given // multiple * multiple
                legal = f"{below} or {below + multiple}" if below else f"{multiple}"
                raise ValueError(f"frames have {name} {given}; expected a multiple of {multiple}: nearest {legal}")

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each latent channel, [C, 1, 1, 1]."""
        both = torch.tensor([self.config.latents_mean, self.config.latents_std], device=device)
        mean, std = both.view(2, -1, 1, 1, 1)
        return mean, std


def diffusers_keys(config: VAEConfig, vae: WanVAE | None = None) -> dict[str, str]:
    """Return the name in a published (diffusers) state dict -> our parameter name, for every parameter.

    Wan 2.1's encoder is published as one flat list; some layers stand in lists of their own.
    """
    if vae is None:
        with torch.device("meta"):
            vae = WanVAE(config)
    per_block = config.num_res_blocks + 1  # the published flat list: residual blocks, then the downsampler

    def published(name: str) -> str:
        name = re.sub(r"(up|down)sampler\.conv\.", r"\1sampler.resample.1.", name)
        if config.is_residual:
            return name
        name = name.replace(".upsampler.", ".upsamplers.0.")
        name = re.sub(
            r"down_blocks\.(\d+)\.resnets\.(\d+)\.",
            lambda m: f"down_blocks.{int(m[1]) * per_block + int(m[2])}.",
            name,
        )
        return re.sub(
            r"down_blocks\.(\d+)\.downsampler\.", lambda m: f"down_blocks.{(int(m[1]) + 1) * per_block - 1}.", name
        )

    return {published(name): name for name, _ in vae.named_parameters()}


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
    """One latent frame [B, z_dim, 1, H, W] to its pixel frames [B, out_channels, F, 8 H, 8 W]."""

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
            blocks.append(UpBlock(width, out, config, upsample=i < levels, time=time))
            width = out if config.is_residual else out // 2
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, (3, 3, 3))
        self.number_slots()

    def trunk(self, z: torch.Tensor, history: History) -> torch.Tensor:
        """The part that sees the whole frame: attention is there."""
        return self.mid_block(self.conv_in(z, history), history)

    def reach(self) -> int:
        """Return how many cells of the trunk's result, to each side, a pixel of the branch's depends on."""
        reach = self.conv_out.weight.shape[3] // 2
        for block in reversed(self.up_blocks):
            reach = cast(UpBlock, block).reach(reach)
        return reach

    def branch(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        """The part that sees a neighbourhood only, so that it may run on tiles."""
        for block in self.up_blocks:
            x = block(x, history, first)
        return self.conv_out(norm_silu(x, self.norm_out.gamma, inplace=True), history)


class Encoder(Streaming):
    """A chunk of frames [B, in_channels, F, 8 H, 8 W] to the moments [B, 2 * z_dim, 1, H, W] of one latent frame."""

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

    def branch(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        """The part that sees a neighbourhood only, so that it may run on tiles."""
        x = self.conv_in(x, history)
        for block in self.down_blocks:
            x = block(x, history, first)
        return x

    def reach(self) -> int:
        """Return how many cells of the branch's result, to each side, share pixels with one; pixels are 2^levels."""
        reach, levels = 0, 0
        for block in reversed(self.down_blocks):
            reach = cast(DownBlock, block).reach(reach)
            levels += cast(DownBlock, block).downsampler is not None
        return -(-(reach + self.conv_in.weight.shape[3] // 2) // 2**levels)

    def trunk(self, x: torch.Tensor, history: History) -> torch.Tensor:
        """The part that sees the whole frame: attention is there."""
        x = self.mid_block(x, history)
        return self.conv_out(norm_silu(x, self.norm_out.gamma, inplace=True), history)


def assembled(parts: Iterator[torch.Tensor], cuts: list[Tile], cells: tuple[int, int], scale: int) -> torch.Tensor:
    """Put the results of the tiles of one chunk together, `scale` pixels per cell; a single one is the whole."""
    part = next(parts)
    if len(cuts) == 1:
        return part
    whole = part.new_empty(*part.shape[:3], cells[0] * scale, cells[1] * scale)
    for tile, result in zip(cuts, itertools.chain([part], parts), strict=True):
        tile.paste(result, whole, scale)
    return whole


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Fold patch x patch pixels of x [B, C, F, H, W] into channels, columns before rows."""
    cells = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B, C, F, H, row, W, column]
    return cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Undo `patchify`."""
    cells = x.unflatten(1, (-1, patch, patch))  # [B, C, column, row, F, H, W]
    return cells.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
