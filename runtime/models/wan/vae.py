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
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from runtime.models.tiles import Tile, tiles
from runtime.models.wan.vae_blocks import CausalConv3d, History, Ring, UpsamplingConv2d, close, fetch, park, pointwise
from runtime.models.wan.vae_config import VAEConfig
from runtime.models.wan.vae_networks import Decoder, Encoder

LATENTS = ("post_quant_conv.", "decoder.conv_in.", "encoder.conv_out.", "quant_conv.")  # networks that see latents
FRAMES_PER_TILE = 8  # latent frames that a tile decodes in its turn on a GPU: its history is moved once for all


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

    @staticmethod
    def keep_float32(name: str) -> bool:
        """Tell whether a parameter stays float32 in any dtype: of what sees latents, a thousandth of the arithmetic."""
        return name.startswith(LATENTS)

    def prepare(self) -> None:
        """Lay the weights out for speed; call once, after loading and moving. Results stay the same.

        Afterwards the upsampling convolutions hold folded kernels, so published weights no longer load.
        """
        for module in self.modules():
            if isinstance(module, CausalConv3d | UpsamplingConv2d):
                module.prepare()
            elif isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def decode_stream(
        self, latents: torch.Tensor, tile: tuple[int, int] | None = None, start: int = 0
    ) -> Iterator[torch.Tensor]:
        """Yield the clip of latents [B, C, T, H, W], normalised as the sampler has them, while it is decoded.

        Chunks are [B, 3, F, height, width] float32 in [-1, 1]: F is 1 for the first latent frame, `stride[0]` for
        each next one; they begin at latent frame `start`, for which no more is decoded than it depends on. `tile`
        (height, width) in pixels bounds what is decoded at once, halo included; the numbers are the same. ValueError
        for latents of another shape, or a tile that holds nothing but halo.
        """
        if latents.dim() != 5 or latents.shape[1] != self.config.z_dim or 0 in latents.shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; expected [B, {self.config.z_dim}, T, H, W]")
        height, width = latents.shape[3:]
        halo = self.decoder.reach()
        return self._decode_chunks(latents, tiles((height, width), self.cells(tile, halo), halo), start)

    @torch.no_grad()
    def _decode_chunks(self, latents: torch.Tensor, cuts: list[Tile], start: int) -> Iterator[torch.Tensor]:
        whole = self.decoder.empty_history()
        histories = [self.decoder.empty_history() for _ in cuts]
        at_once = self._at_once(cuts)
        for begin in range(max(start - self.decoder.memory(), 0), latents.shape[2], at_once):
            times = range(begin, min(begin + at_once, latents.shape[2]))
            last, trunks = times[-1] == latents.shape[2] - 1, []
            for t in times:
                if last and t == times[-1]:
                    close(whole)
                trunks.append(self._trunk(latents[:, :, t : t + 1], whole, t == 0))
            scales = (self.decoder.scale, self.stride[1])
            made = over_tiles(self._pixels, trunks, cuts, histories, scales, torch.device("cpu"), (begin == 0, last))
            yield from made[max(start - begin, 0) :]

    def _trunk(self, latent: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        weight = self.post_quant_conv.weight
        mean, std = self._statistics(weight.device)
        z = latent.to(weight.device, torch.float32) * std + mean
        z = pointwise(self.post_quant_conv, z.to(weight.dtype, memory_format=torch.channels_last_3d))
        return self.decoder.trunk(z, history, first)

    def _pixels(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        made = self.decoder.branch(x, history, first)
        return unpatchify(made, self.config.patch_size or 1).float().clamp_(-1.0, 1.0)

    def decode_chunk(
        self, latent: torch.Tensor, kept: Sequence[torch.Tensor], first: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return pixels [B, 3, F, height, width] in [-1, 1] of one latent frame [B, C, 1, H, W], and what to keep.

        `kept` are the frames that the convolutions remember, from the call before or `kept_at_first`.
        """
        history = [Ring.of(frames) for frames in kept]
        pixels = self._pixels(self._trunk(latent, history, first), history, first)
        return pixels, tuple(ring.all() for ring in history)

    @torch.no_grad()
    def kept_at_first(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return zeros in the shapes of all that is remembered; two frames are decoded to learn these."""
        history = self.decoder.empty_history()
        for first in (True, False):
            self._pixels(self._trunk(latent, history, first), history, first)
        return tuple(torch.zeros_like(ring.all(), memory_format=torch.contiguous_format) for ring in history)

    def _at_once(self, cuts: list[Tile]) -> int:
        """Return how many latent frames a tile takes in its turn; on a CPU its history is not moved."""
        return 1 if len(cuts) == 1 or self.quant_conv.weight.device.type == "cpu" else FRAMES_PER_TILE

    def tile_of(self, height: int, width: int, parts: tuple[int, int]) -> tuple[int, int]:
        """Return the tile (height, width) in pixels, halo included, that cuts a frame into parts (rows, columns)."""
        halo = max(self.decoder.reach(), self.encoder.reach())
        down, across = (
            max(-(-(side // self.stride[1]) // count) + halo * min(count - 1, 2), 2 * halo + 1) * self.stride[1]
            for side, count in zip((height, width), parts, strict=True)
        )
        return down, across

    def cells(self, tile: tuple[int, int] | None, halo: int) -> tuple[int, int] | None:
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
        weight = self.encoder.conv_in.weight
        mean, std = self._statistics(weight.device)
        whole = self.encoder.empty_history()
        halo = self.encoder.reach()
        size, cells = self.cells(tile, halo), self.stride[1] // (self.config.patch_size or 1)
        cuts: list[Tile] = []
        histories: list[History] = []
        done, coming = 0, iter(chunks)
        while group := list(itertools.islice(coming, self._at_once(cuts) if cuts else 1)):
            for index, frames in enumerate(group, done):
                self._check_frames(frames)
                expected = self.stride[0] if index else 1
                if frames.shape[2] != expected:
                    raise ValueError(f"chunk {index} holds {frames.shape[2]} frames; expected {expected}")
            if not cuts:
                cuts = tiles((group[0].shape[3] // self.stride[1], group[0].shape[4] // self.stride[2]), size, halo)
                histories = [self.encoder.empty_history() for _ in cuts]
            folded = [patchify(x.to(weight.device, weight.dtype), self.config.patch_size or 1) for x in group]
            laid = [x.clone(memory_format=torch.channels_last_3d) for x in folded]
            scales = (cells, self.encoder.scale)
            for x in over_tiles(self.encoder.branch, laid, cuts, histories, scales, weight.device, (not done, False)):
                mu = pointwise(self.quant_conv, self.encoder.trunk(x, whole, not done))[:, : self.config.z_dim]
                yield (mu.float() - mean) / std
                done += 1

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
        both = torch.tensor([self.config.latents_mean, self.config.latents_std])
        mean, std = both.to(device, non_blocking=True).view(2, -1, 1, 1, 1)
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


def over_tiles(
    run: Callable[[torch.Tensor, History, bool], torch.Tensor], chunks: list[torch.Tensor], cuts: list[Tile],
    histories: list[History], scales: tuple[int, int], device: torch.device, ends: tuple[bool, bool],
) -> list[torch.Tensor]:  # fmt: skip
    """Return run(chunk, history, is the clip's first) of consecutive chunks, put together of their tiles on `device`.

    `scales` are the pixels per latent cell of what is given and made. A tile takes all chunks in its turn, and its
    history waits in the host's memory while others have theirs. `ends` says whether the clip's first chunk is among
    them, and whether its last: then what tiles remember is let go.
    """
    first, last = ends

    def made(i: int, x: torch.Tensor, history: History) -> torch.Tensor:
        if last and i == len(chunks) - 1:
            close(history)
        return run(x, history, first and not i)

    if len(cuts) == 1:
        return [made(i, x, histories[0]) for i, x in enumerate(chunks)]
    wholes: list[torch.Tensor] = []
    for tile, history in zip(cuts, histories, strict=True):
        fetch(history, chunks[0].device)
        for i, x in enumerate(chunks):
            part = made(i, tile.cut(x, scales[0]).clone(memory_format=torch.channels_last_3d), history)
            if len(wholes) == i:
                sides = (side // scales[0] * scales[1] for side in x.shape[3:])
                wholes.append(torch.empty(*part.shape[:3], *sides, dtype=part.dtype, device=device))
            tile.paste(part, wholes[i], scales[1])
        park(history)
    return wholes


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Fold patch x patch pixels of x [B, C, F, H, W] into channels, columns before rows."""
    cells = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B, C, F, H, row, W, column]
    return cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Undo `patchify`."""
    cells = x.unflatten(1, (-1, patch, patch))  # [B, C, column, row, F, H, W]
    return cells.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
