"""Wan's video autoencoder, 2.1 and 2.2: a causal 3-D convolutional encoder and decoder that stream.

One structure serves both: 2.2 adds parameter-free residual paths around its blocks (`is_residual`) and folds pixels
into channels in front (`patch_size`). A clip passes in chunks of one latent frame: the first holds 1 pixel frame,
each next one `stride[0]`. What a causal convolution must remember of the chunks before stands in its `Ring` of the
clip's `History`; so memory does not grow with the clip, and no call disturbs another. A block owns its input: it
writes into it where nothing needs it later.

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
import torch.nn.functional as F
from torch import nn

from runtime.kernels.causal_conv3d import causal_conv3d
from runtime.kernels.norm_silu import norm_silu
from runtime.models.spec import config_from
from runtime.models.tiles import Tile, tiles

History = list["Ring"]  # of one clip, a ring per causal convolution


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


class Ring:
    """The newest input frames of one causal convolution, `filled` of at most `size`; their memory stays in place."""

    def __init__(self, size: int) -> None:
        self.size, self.filled = size, 0
        self.frames: torch.Tensor | None = None  # [B, C, size, H, W], the newest last

    def newest(self) -> torch.Tensor | None:
        """Return the frames that are there, [B, C, filled, H, W]; None for none."""
        return self.frames[:, :, self.size - self.filled :] if self.frames is not None and self.filled else None

    def remember(self, x: torch.Tensor) -> None:
        """Copy the newest frames of x [B, C, F, H, W] in, over the oldest."""
        if self.frames is None:
            shape, layout = (*x.shape[:2], self.size, *x.shape[3:]), torch.channels_last_3d
            self.frames = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        staying = max(self.size - x.shape[2], 0)
        for place in range(staying):
            self.frames[:, :, place].copy_(self.frames[:, :, place + x.shape[2]])
        self.frames[:, :, staying:].copy_(x[:, :, -self.size :])
        self.filled = min(self.filled + x.shape[2], self.size)


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


class UpBlock(nn.Module):
    """Residual blocks, then twice the size, and twice the frames where `time`; 2.2 repeats the input beside them."""

    def __init__(self, width: int, out: int, config: VAEConfig, *, upsample: bool, time: bool) -> None:
        super().__init__()
        inputs = [width, *[out] * config.num_res_blocks]
        self.resnets = nn.ModuleList(ResidualBlock(each, out) for each in inputs)
        self.upsampler = Upsampler(out, out if config.is_residual else out // 2, time) if upsample else None
        self.shortcut = config.is_residual and upsample
        self.time = 2 if time else 1
        if self.shortcut and (width % out or 4 * self.time % (width // out)):
            raise ValueError(f"vae config leads from width {width} to {out}; supported: equal, or 2, 4 or 8 times less")

    def forward(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        y = x
        for resnet in self.resnets:
            y = resnet(y, history, keep=self.shortcut and y is x)
        if self.upsampler is not None:
            y = self.upsampler(y, history, first)
        return add_repeated(y, x, self.time, first) if self.shortcut else y

    def reach(self, after: int) -> int:
        """Return how many cells to each side the block sees at its input, if `after` are seen at its output."""
        if self.upsampler is not None:
            after = -(-(after + 1) // 2)  # a 3 x 3 convolution of repeated pixels
        return after + sum(cast(ResidualBlock, resnet).reach() for resnet in self.resnets)


class DownBlock(nn.Module):
    """Residual blocks, then half the size, and half the frames where `time`; 2.2 averages the input beside them."""

    def __init__(self, width: int, out: int, config: VAEConfig, *, downsample: bool, time: bool) -> None:
        super().__init__()
        inputs = [width, *[out] * (config.num_res_blocks - 1)]
        self.resnets = nn.ModuleList(ResidualBlock(each, out) for each in inputs)
        self.downsampler = Downsampler(out, time) if downsample else None
        self.factors = (2 if time else 1, 2 if downsample else 1) if config.is_residual else None

    def forward(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        y = x
        for resnet in self.resnets:
            y = resnet(y, history, keep=self.factors is not None and y is x)
        if self.downsampler is not None:
            y = self.downsampler(y, history, first)
        if self.factors is None:
            return y
        return y.add_(averaged(x, y.shape[1], *self.factors))

    def reach(self, after: int) -> int:
        """Return how many cells to each side the block sees at its input, if `after` are seen at its output."""
        if self.downsampler is not None:
            after = 2 * after + self.downsampler.conv.kernel_size[0] - 1
        return after + sum(cast(ResidualBlock, resnet).reach() for resnet in self.resnets)


class MidBlock(nn.Module):
    """Residual block, attention within each frame, residual block, at the lowest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(width, width), ResidualBlock(width, width)])
        self.attentions = nn.ModuleList([FrameAttention(width)])

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        x = self.attentions[0](self.resnets[0](x, history))
        return self.resnets[1](x, history)


class ResidualBlock(nn.Module):
    """x + conv(norm_silu(conv(norm_silu(x)))), x projected where the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1 = Norm(width)
        self.conv1 = CausalConv3d(width, out, (3, 3, 3))
        self.norm2 = Norm(out)
        self.conv2 = CausalConv3d(out, out, (3, 3, 3))
        self.conv_shortcut = nn.Conv3d(width, out, 1) if width != out else None

    def forward(self, x: torch.Tensor, history: History, keep: bool = False) -> torch.Tensor:
        """With `keep`, x is not overwritten."""
        h = self.conv1(norm_silu(x, self.norm1.gamma), history)
        shortcut = x if self.conv_shortcut is None else pointwise(self.conv_shortcut, x)
        h = norm_silu(h, self.norm2.gamma, inplace=True)
        return self.conv2(h, history, shortcut, inplace=not keep or shortcut is not x)

    def reach(self) -> int:
        """Return how many cells to each side a result depends on."""
        return sum(conv.weight.shape[3] // 2 for conv in (self.conv1, self.conv2))


class FrameAttention(nn.Module):
    """x + self-attention with one head among the pixels of each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width, dimensions=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = pointwise(self.to_qkv, norm_silu(x, self.norm.gamma, silu=False))
        q, k, v = qkv.permute(0, 2, 3, 4, 1).flatten(2, 3).chunk(3, dim=-1)  # [B, F, H * W, C]
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)  # [B, C, F, H, W]
        return pointwise(self.proj, y).add_(x)


class Upsampler(nn.Module):
    """Twice the frames except in the first chunk (where `time`), then each frame at twice the size."""

    def __init__(self, width: int, out: int, time: bool) -> None:
        super().__init__()
        self.conv = UpsamplingConv2d(width, out)
        self.time_conv = CausalConv3d(width, 2 * width, (3, 1, 1)) if time else None

    def forward(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        # A clip's first frame is not doubled, nor remembered: the second chunk sees zeros before it.
        if self.time_conv is not None and not first:
            pairs = self.time_conv(x, history).unflatten(1, (2, -1))  # [B, 2, C, F, H, W]
            x = pairs.permute(0, 3, 1, 4, 5, 2).flatten(1, 2).permute(0, 4, 1, 2, 3)  # [B, C, 2 F, H, W]
        return self.conv(x)


class Downsampler(nn.Module):
    """Each frame at half the size, then half the frames except in the first chunk (where `time`)."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)
        self.time_conv = CausalConv3d(width, width, (3, 1, 1), time_stride=2) if time else None

    def forward(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        y = self.conv(F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1)))
        y = y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        if self.time_conv is None:
            return y
        if first:
            history[self.time_conv.slot].remember(y)
            return y
        return self.time_conv(y, history)


class CausalConv3d(nn.Module):
    """A convolution over the chunk and the newest frames of the chunks before, kept in its slot of the history."""

    slot: int

    def __init__(self, width: int, out: int, kernel: tuple[int, int, int], time_stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width, *kernel))
        self.bias = nn.Parameter(torch.empty(out))
        self.time_stride = time_stride

    def forward(
        self, x: torch.Tensor, history: History, residual: torch.Tensor | None = None, *, inplace: bool = False
    ) -> torch.Tensor:
        """Return the result plus the residual, with `inplace` maybe in the residual's memory."""
        ring = history[self.slot]
        y = causal_conv3d(
            x, self.weight, self.bias, ring.newest(), stride=self.time_stride, residual=residual, inplace=inplace
        )
        ring.remember(x)
        return y

    def prepare(self) -> None:
        """Make each tap in time a channels-last block on CPUs, the whole channels-last elsewhere."""
        if self.weight.device.type == "cpu":
            self.weight.data = self.weight.data.permute(2, 0, 3, 4, 1).contiguous().permute(1, 4, 0, 2, 3)
        else:
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last_3d)


class UpsamplingConv2d(nn.Module):
    """Twice the size by repeating pixels, then a 3 x 3 convolution; as one transposed convolution.

    The four outputs above one input pixel see only 2 x 2 different inputs each, so summing the kernel's taps
    beforehand leaves 16 multiplications of 36, and the enlarged input is never written.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width, 3, 3))
        self.bias = nn.Parameter(torch.empty(out))
        self.folded = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.folded else fold_repetition(self.weight)
        y = F.conv_transpose2d(x.transpose(1, 2).flatten(0, 1), weight, self.bias, stride=2, padding=1)
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def prepare(self) -> None:
        """Hold the folded kernel [C, O, 4, 4] in place of the published one."""
        if not self.folded:
            self.weight.data = fold_repetition(self.weight.data)
            self.folded = True


class Norm(nn.Module):
    """The scale of an RMS norm over channels; `dimensions` ones follow in its published shape."""

    def __init__(self, width: int, dimensions: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * dimensions))


def pointwise(conv: nn.Conv2d | nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution with a kernel of one tap to x [B, C, F, H, W]."""
    return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)


def assembled(parts: Iterator[torch.Tensor], cuts: list[Tile], cells: tuple[int, int], scale: int) -> torch.Tensor:
    """Put the results of the tiles of one chunk together, `scale` pixels per cell; a single one is the whole."""
    part = next(parts)
    if len(cuts) == 1:
        return part
    whole = part.new_empty(*part.shape[:3], cells[0] * scale, cells[1] * scale)
    for tile, result in zip(cuts, itertools.chain([part], parts), strict=True):
        tile.paste(result, whole, scale)
    return whole


def fold_repetition(weight: torch.Tensor) -> torch.Tensor:
    """Return the kernel [C, O, 4, 4] of the transposed convolution (stride 2, padding 1) that equals repeating each
    pixel 2 x 2 and convolving with weight [O, C, 3, 3] (padding 1)."""
    sums = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32, device=weight.device)
    folded = torch.einsum("mk,nl,ockl->cmno", sums, sums, weight.float()).to(weight.dtype)
    return folded.contiguous().permute(0, 3, 1, 2)


def add_repeated(y: torch.Tensor, x: torch.Tensor, time: int, first: bool) -> torch.Tensor:
    """Add x [B, C, F, H, W], enlarged by repetition, to y [B, O, time * F, 2 H, 2 W] in place.

    The cells (frame, row, column) of y above one pixel of x share its C channels: output channel o takes those from
    o * C / O on, in the order of the cells. A clip's first chunk lacks all cells but the last in time.
    """
    group = x.shape[1] // y.shape[1]
    repeats = 4 * time // group
    frames = range(time - 1, time) if first else range(time)
    cells = y.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, len(frames)))
    for frame, row, column in itertools.product(frames, range(2), range(2)):
        channel = (4 * frame + 2 * row + column) // repeats
        cells[:, :, :, frame - frames[0], :, row, :, column] += x[:, channel::group]
    return y


def averaged(x: torch.Tensor, out: int, time: int, space: int) -> torch.Tensor:
    """Return x [B, C, F, H, W] with cells of time x space x space pixels folded into channels and averaged in `out`
    groups of neighbours; zero frames in front where F is no multiple of `time`."""
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
    cells = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4).unflatten(1, (out, -1)).mean(dim=2)


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Fold patch x patch pixels of x [B, C, F, H, W] into channels, columns before rows."""
    cells = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B, C, F, H, row, W, column]
    return cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Undo `patchify`."""
    cells = x.unflatten(1, (-1, patch, patch))  # [B, C, column, row, F, H, W]
    return cells.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
