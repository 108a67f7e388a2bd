"""norm_silu: normalise each pixel over its channels, then SiLU, then (if asked) twice the size by repeating pixels.

    h = x / max(|x|, 1e-12) * sqrt(C) * gamma        |x| is the Euclidean norm over the C channels
    y = h * sigmoid(h)                               (y = h with silu=False)
    y[..., 2i + (0, 1), 2j + (0, 1)] = y[..., i, j]  (upsample=True)

x [B, C, ...] any float dtype, any number of dimensions behind the channels; gamma holds C numbers, in any shape;
returns y in x's dtype and shape, [..., 2 H, 2 W] with upsample. The reference keeps x's memory layout; the kernel
reads and writes channels-last, and copies an x that is not. Arithmetic is float32.
Source: the RMS norm of Wan's VAE, https://arxiv.org/abs/2503.20314, section 4.1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .activations import silu as silu_of
from .backend import is_forced, is_opaque, jit, launch, next_power_of_2, pick, register, tl
from .checks import expect_device, expect_floating, expect_some
from .cuda import norm_silu_cuda
from .tuning import tuned

SMALLEST_NORM = 1e-12
BLOCK = 2**16  # numbers that a core of a CPU takes at a time: 256 KiB in float32


def norm_silu_ref(x: torch.Tensor, gamma: torch.Tensor, silu: bool, inplace: bool, upsample: bool) -> torch.Tensor:
    """The definition, float32 inside; few passes over memory."""
    channels = x.shape[1]
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_(min=SMALLEST_NORM)
    factor = norm.reciprocal_().mul_(math.sqrt(channels))
    h = wide.mul_(factor) if inplace or wide is not x else wide * factor
    h.mul_(gamma.float().reshape(channels, *[1] * (x.dim() - 2)))
    if silu:
        F.silu(h, inplace=True)
    if upsample:
        return F.interpolate(h.to(x.dtype), scale_factor=(1.0, 2.0, 2.0)[5 - x.dim() :], mode="nearest")
    return x.copy_(h) if inplace and h is not x else h.to(x.dtype)


def norm_silu_blocks(x: torch.Tensor, gamma: torch.Tensor, silu: bool, inplace: bool, upsample: bool) -> torch.Tensor:
    """The reference over blocks of pixels whose float32 numbers stay in a core's cache, for 16 bits on CPUs."""
    moved = x.movedim(1, -1)
    if upsample or not moved.is_contiguous():
        return norm_silu_ref(x, gamma, silu, inplace, upsample)
    out = moved if inplace else torch.empty_like(moved)
    rows = max(BLOCK * torch.get_num_threads() // x.shape[1], 1)
    for source, target in zip(moved.flatten(0, -2).split(rows), out.flatten(0, -2).split(rows), strict=True):
        target.copy_(norm_silu_ref(source, gamma, silu, False, False))
    return x if inplace else out.movedim(-1, 1)


@jit
def load_pixels(x, pixel, lanes, pixels, C: tl.constexpr):
    """Some channels of some pixels, float32; zeros outside."""
    inside = (pixel < pixels)[:, None] & (lanes < C)[None, :]
    return tl.load(x + pixel[:, None] * C + lanes[None, :], mask=inside, other=0.0).to(tl.float32)


@jit
def finish_pixels(
    values, factor, gamma, out, pixel, lanes, pixels, width,
    C: tl.constexpr, SILU: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """Weigh, activate and store what `load_pixels` gave; in four places with UPSAMPLE."""
    h = values * factor[:, None] * tl.load(gamma + lanes, mask=lanes < C, other=0.0).to(tl.float32)[None, :]
    if SILU:
        h = silu_of(h)
    result = h.to(out.dtype.element_ty)
    inside = (pixel < pixels)[:, None] & (lanes < C)[None, :]
    if UPSAMPLE:
        first = tl.min(pixel, axis=0)
        line = first // width  # counted through all frames; each becomes two of twice the width
        column = (pixel - line * width).to(tl.int32)
        corner = (line + column // width) * 4 * width + column % width * 2
        for below in tl.static_range(2):
            for beside in tl.static_range(2):
                target = (corner + below * 2 * width + beside)[:, None]
                tl.store(out + target * C + lanes[None, :], result, mask=inside)
    else:
        tl.store(out + pixel[:, None] * C + lanes[None, :], result, mask=inside)


@jit
def norm_silu_kernel(
    x, gamma, out, pixels, width, root, smallest,
    C: tl.constexpr, BODY: tl.constexpr, TAIL: tl.constexpr, PIXELS: tl.constexpr,
    SILU: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """One program per PIXELS pixels of C neighbouring numbers: read once, written once (four times with UPSAMPLE).

    The channels are two tiles, BODY and TAIL, both powers of 2: 96 are 64 and 32, where one tile would hold 128.
    """
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    body, tail = tl.arange(0, BODY), BODY + tl.arange(0, TAIL)
    a, b = load_pixels(x, pixel, body, pixels, C), load_pixels(x, pixel, tail, pixels, C)
    norm = tl.maximum(tl.sqrt(tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)), smallest)
    factor = root / norm
    finish_pixels(a, factor, gamma, out, pixel, body, pixels, width, C, SILU, UPSAMPLE)
    finish_pixels(b, factor, gamma, out, pixel, tail, pixels, width, C, SILU, UPSAMPLE)


def norm_silu_triton(x: torch.Tensor, gamma: torch.Tensor, silu: bool, inplace: bool, upsample: bool) -> torch.Tensor:
    """One pass over x, channels-last; an x in another layout is copied into it, and back with `inplace`."""
    channels = x.shape[1]
    moved = x.movedim(1, -1)  # [B, ..., C]
    pixels = moved.contiguous()
    copied = pixels is not moved
    shape = list(moved.shape)
    if upsample:
        shape[-3:-1] = [2 * shape[-3], 2 * shape[-2]]
    out = pixels if inplace or (copied and not upsample) else torch.empty(shape, dtype=x.dtype, device=x.device)
    count = pixels.numel() // max(channels, 1)
    body = max(next_power_of_2(channels) // 2, 1)
    tail = next_power_of_2(channels - body)
    found = tuned("norm_silu", f"{channels}{' upsample' if upsample else ''}", x.device)
    tile = max(1, found.get("numbers", 4096) // (body + tail))
    tile = next_power_of_2(tile + 1) // 2  # the largest power of 2 in it
    launch(
        norm_silu_kernel,
        (-(-count // tile),),
        {
            "x": pixels, "gamma": gamma.contiguous(), "out": out, "pixels": count, "width": x.shape[-1],
            "root": math.sqrt(channels), "smallest": SMALLEST_NORM,
        },
        {"C": channels, "BODY": body, "TAIL": tail, "PIXELS": tile, "SILU": silu, "UPSAMPLE": upsample},
        num_warps=found.get("num_warps", max(4, min(16, tile * (body + tail) // 1024))),
    )  # fmt: skip
    if inplace:
        return x.copy_(out.movedim(-1, 1)) if copied else x
    return out.movedim(-1, 1)


def norm_silu_picked(x: torch.Tensor, gamma: torch.Tensor, silu: bool, inplace: bool, upsample: bool) -> torch.Tensor:
    """What runs eagerly, and behind `torch.ops.runtime.norm_silu` (to channels-last) and `norm_silu_` (in place)."""
    if x.device.type == "cpu" and x.element_size() == 2 and not is_forced():
        return norm_silu_blocks(x, gamma, silu, inplace, upsample)
    found = tuned("norm_silu", f"{x.shape[1]}{' upsample' if upsample else ''}", x.device)
    chosen = pick(x, found, ref=norm_silu_ref, triton=norm_silu_triton, cuda=norm_silu_cuda)
    return chosen(x, gamma, silu, inplace, upsample)


def norm_silu_fake(x: torch.Tensor, gamma: torch.Tensor, silu: bool, upsample: bool) -> torch.Tensor:
    """An output without numbers."""
    scales = [1] * (x.dim() - 2) if not upsample else [1] * (x.dim() - 4) + [2, 2]
    shape = [size * scale for size, scale in zip(x.shape[2:], scales, strict=True)]
    return x.new_empty(x.shape[0], *shape, x.shape[1]).movedim(-1, 1)


register(
    "norm_silu(Tensor x, Tensor gamma, bool silu, bool upsample) -> Tensor",
    lambda x, gamma, silu, upsample: (
        norm_silu_picked(x, gamma, silu, False, upsample).movedim(1, -1).contiguous().movedim(-1, 1)
    ),
    norm_silu_fake,
)
register(
    "norm_silu_(Tensor(a!) x, Tensor gamma, bool silu) -> ()",
    lambda x, gamma, silu: (norm_silu_picked(x, gamma, silu, True, False), None)[1],
    lambda x, gamma, silu: None,
)


def norm_silu(
    x: torch.Tensor, gamma: torch.Tensor, *, silu: bool = True, inplace: bool = False, upsample: bool = False
) -> torch.Tensor:
    """Return SiLU of x normalised over its channels, in x's shape; ValueError for arguments that do not fit together.

    With `inplace` the result takes x's memory, and x is returned; with `upsample` (x [B, C, H, W] or [B, C, T, H, W])
    the result has each pixel four times, [..., 2 H, 2 W].
    """
    expect_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, C, ...]")
    expect_some("x", x, 1)
    if gamma.numel() != x.shape[1]:
        raise ValueError(f"gamma has shape {list(gamma.shape)}; expected {x.shape[1]} numbers, one per channel of x")
    expect_device(x, gamma=gamma)
    if upsample and inplace:
        raise ValueError("upsample and inplace are both set; the enlarged result does not fit into x's memory")
    if upsample and x.dim() not in (4, 5):
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, C, H, W] or [B, C, T, H, W] to upsample")
    if is_opaque():
        if not inplace:
            return torch.ops.runtime.norm_silu(x, gamma, silu, upsample)
        torch.ops.runtime.norm_silu_(x, gamma, silu)
        return x
    return norm_silu_picked(x, gamma, silu, inplace, upsample)
