"""The parts of Wan's video autoencoder: blocks, causal convolutions, and the rings in which these remember frames.

B batch, C channels, T H W latent time, height, width, F frames of a chunk. A block owns its input: it writes into it
where nothing needs it later. Source: the published code of Wan 2.1 and 2.2, https://arxiv.org/abs/2503.20314.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import nn

from runtime.kernels.causal_conv3d import causal_conv3d
from runtime.kernels.norm_silu import norm_silu
from runtime.trace import mark

if TYPE_CHECKING:
    from runtime.models.wan.vae_config import VAEConfig

History = list["Ring"]  # of one clip, a ring per causal convolution


class Ring:
    """The newest input frames of one causal convolution, `filled` of at most `size`; their memory stays in place."""

    def __init__(self, size: int) -> None:
        self.size, self.filled = size, 0
        self.closed = False  # the clip's last chunk is being worked on, so nothing need be remembered
        self.frames: torch.Tensor | None = None  # [B, C, size, H, W], the newest last
        self.parked: torch.Tensor | None = None  # where they lie in the host's memory meanwhile

    @classmethod
    def of(cls, frames: torch.Tensor) -> Ring:
        """Return a full ring that holds a copy of frames [B, C, size, H, W]."""
        ring = cls(frames.shape[2])
        ring.frames, ring.filled = frames.clone(), ring.size
        return ring

    def all(self) -> torch.Tensor:
        """Return all its frames, [B, C, size, H, W]."""
        assert self.frames is not None
        return self.frames

    def newest(self) -> torch.Tensor | None:
        """Return the frames that are there, [B, C, filled, H, W]; None for none."""
        return self.frames[:, :, self.size - self.filled :] if self.frames is not None and self.filled else None

    def remember(self, x: torch.Tensor) -> None:
        """Copy the newest frames of x [B, C, F, H, W] in, over the oldest; a closed ring lets go of all."""
        if self.closed:
            self.frames, self.filled = None, 0
            return
        if self.frames is None:
            shape, layout = (*x.shape[:2], self.size, *x.shape[3:]), torch.channels_last_3d
            self.frames = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        staying = max(self.size - x.shape[2], 0)
        for place in range(staying):
            self.frames[:, :, place].copy_(self.frames[:, :, place + x.shape[2]])
        self.frames[:, :, staying:].copy_(x[:, :, -self.size :])
        self.filled = min(self.filled + x.shape[2], self.size)


def close(history: History) -> None:
    """Say that a clip's last chunk comes next: each convolution lets go of what it remembers as it is done."""
    for ring in history:
        ring.closed = True


def park(history: History) -> None:
    """Move a history into the host's memory, page-locked, until it is fetched; on a CPU it is there already."""
    for ring in history:
        if ring.frames is not None and ring.frames.device.type != "cpu":
            if ring.parked is None:
                ring.parked = torch.empty_like(ring.frames, device="cpu", pin_memory=True)
            ring.parked.copy_(ring.frames, non_blocking=True)  # in the stream's order, as all that follows
            ring.frames = None


def fetch(history: History, device: torch.device) -> None:
    """Bring a parked history back."""
    for ring in history:
        if ring.frames is None and ring.parked is not None:
            ring.frames = ring.parked.to(device, non_blocking=True)


class UpBlock(nn.Module):
    """Residual blocks, then twice the size, and twice the frames where `time`; 2.2 repeats the input beside them.

    `level` from 0 is its place in the decoder, which profilers are told.
    """

    def __init__(self, width: int, out: int, config: VAEConfig, *, level: int, upsample: bool, time: bool) -> None:
        super().__init__()
        self.range = f"decode/up_{level}"
        inputs = [width, *[out] * config.num_res_blocks]
        self.resnets = nn.ModuleList(ResidualBlock(each, out) for each in inputs)
        self.upsampler = Upsampler(out, out if config.is_residual else out // 2, time) if upsample else None
        self.shortcut = config.is_residual and upsample
        self.time = 2 if time else 1
        if self.shortcut and (width % out or 4 * self.time % (width // out)):
            raise ValueError(f"vae config leads from width {width} to {out}; supported: equal, or 2, 4 or 8 times less")

    def forward(self, x: torch.Tensor, history: History, first: bool) -> torch.Tensor:
        with mark(self.range):
            y = x
            for resnet in self.resnets:
                y = resnet(y, history, keep=self.shortcut and y is x)
            if self.upsampler is not None:
                with mark(f"{self.range}/upsample"):
                    y = self.upsampler(y, history, first)
            return add_repeated(y, x, self.time, first) if self.shortcut else y

    def reach(self, after: int) -> int:
        """Return how many cells to each side the block sees at its input, if `after` are seen at its output."""
        if self.upsampler is not None:
            after = -(-(after + 1) // 2)  # a 3 x 3 convolution of repeated pixels
        return after + sum(cast(ResidualBlock, resnet).reach() for resnet in self.resnets)

    def memory(self, after: int) -> int:
        """Return how many frames back the block sees at its input, if `after` are seen at its output."""
        if self.upsampler is not None and self.upsampler.time_conv is not None:
            after = -(-after // 2) + self.upsampler.time_conv.weight.shape[2] - 1
        return after + sum(cast(ResidualBlock, resnet).memory() for resnet in self.resnets)


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

    def memory(self) -> int:
        """Return how many frames back a result depends on."""
        return sum(cast(ResidualBlock, resnet).memory() for resnet in self.resnets)


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

    def memory(self) -> int:
        """Return how many frames back a result depends on."""
        return sum(conv.weight.shape[2] - 1 for conv in (self.conv1, self.conv2))


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
