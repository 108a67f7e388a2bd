"""causal_conv3d: a 3-D convolution over a stream of frames that never looks ahead.

    y[b, o, j] = bias[o] + residual[b, o, j]
               + sum over c, k of  weight[o, c, k] (*) frame[b, c, (j + 1) * stride - KT + k]

(*) is the 2-D convolution that keeps height and width (zeros around the picture); frame[0 ...] is x, frame[-1],
frame[-2], ... is the history read backwards, and frames before the history are zero. Output j sees nothing newer
than frame (j + 1) * stride - 1, so a stream cut into chunks gives the same numbers as the whole.

C in channels, O out channels, T frames, KT taps in time, KH x KW taps in the picture (odd).
x [B, C, T, H, W] with T a multiple of stride; weight [O, C, KT, KH, KW], KT >= stride; bias [O] or None;
history [B, C, P, H, W] with 0 <= P <= KT - stride, or None for P = 0; y and residual (or None)
[B, O, T / stride, H, W]; one dtype for all. Sums are float32.

Triton reads x, history, residual and weight in place where they are channels_last_3d (or some frames of such a clip),
and copies them to that layout where they are not; y is channels_last_3d. Its products are never rounded to tf32.
The norm and SiLU before a convolution stay a pass of their own, and the history holds normed frames: redone at each of
27 taps, two special functions per 2 * O operations (16 a clock and multiprocessor) take over twice the tensor cores'
time at O = 96 on an H200, while the pass, 4 bytes per element, adds about a seventh to it.
Source: the causal convolution of Wan's VAE, https://arxiv.org/abs/2503.20314, section 4.1.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .backend import is_forced, is_opaque, jit, launch, next_power_of_2, pick, register, tl, triton
from .checks import expect_device, expect_floating, expect_shape, expect_some
from .tuning import tuned


def causal_conv3d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    stride: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, float32 inside, and on GPUs without the rounding of inputs that cuDNN is allowed by default."""
    bias, history, residual = (None if each is None else each.float() for each in (bias, history, residual))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if x.is_cuda else nullcontext():
        return causal_conv3d_window(x.float(), weight.float(), bias, history, stride, residual).to(x.dtype)


def causal_conv3d_window(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    stride: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One convolution over the joined window, in x's dtype; the backend accumulates in float32."""
    taps, rows, columns = weight.shape[2:]
    window = x if history is None else torch.cat([history, x], dim=2)
    missing = taps - stride - (window.shape[2] - x.shape[2])
    if missing:
        window = F.pad(window, (0, 0, 0, 0, missing, 0))
    y = F.conv3d(window, weight, bias, stride=(stride, 1, 1), padding=(0, rows // 2, columns // 2))
    return y if residual is None else y.add_(residual)


def causal_conv3d_taps(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    stride: int,
    residual: torch.Tensor | None = None,
    inplace: bool = False,
) -> torch.Tensor:
    """The sum of one 2-D convolution per tap in time, for CPUs; with `inplace` in the residual's memory.

    Nothing is joined or padded, and frames that are zero cost nothing. Fastest where x is channels_last_3d and
    weight[:, :, k] is channels_last for each k. Sums of 16 bits are rounded once per tap, so there the residual,
    often larger than they are, comes last.
    """
    taps = weight.shape[2]
    past = 0 if history is None else history.shape[2]
    x = x.contiguous(memory_format=torch.channels_last_3d)
    newest = x[:, :, stride - 1 :: stride]
    late = residual if x.element_size() == 2 else None
    if residual is None or late is not None:
        y = _conv_frames(newest.transpose(1, 2).flatten(0, 1), weight[:, :, -1], bias)
        y = y.unflatten(0, newest.shape[:1] + newest.shape[2:3]).transpose(1, 2)
    else:
        kept = inplace and residual.is_contiguous(memory_format=torch.channels_last_3d)
        y = residual if kept else residual.clone(memory_format=torch.channels_last_3d)
        _add_frames(y, newest, weight[:, :, -1], bias)
    for tap in range(taps - 1):
        first = stride - taps + tap  # the frame that output 0 sees through this tap; negative: in the history
        inside = min(y.shape[2], -(min(first, 0) // stride))  # first output whose frame is in x
        if inside < y.shape[2]:
            _add_frames(y[:, :, inside:], x[:, :, first + inside * stride :: stride], weight[:, :, tap])
        begin = max(0, -((past + first) // stride))  # first output whose frame is not before the history
        if history is not None and begin < inside:
            _add_frames(
                y[:, :, begin:inside], history[:, :, past + first + begin * stride :: stride], weight[:, :, tap]
            )
    return y if late is None else y.add_(late)


def _conv_frames(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolve frames x [n, C, H, W] with weight [O, C, KH, KW], keeping their size."""
    rows, columns = weight.shape[2:]
    y = F.conv2d(x, weight, bias, padding=(rows // 2, columns // 2))
    return y.contiguous(memory_format=torch.channels_last)


def _add_frames(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Add the convolution of the first frames of x [B, C, T, H, W] to y [B, O, T, H, W], channels_last_3d, in place."""
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    for sums, clip in zip(y.transpose(1, 2), x.transpose(1, 2), strict=True):  # frames first, dense in a sample
        frames = clip[: len(sums)]
        if _adds_in_place(y.dtype):
            add_conv = torch.ops.mkldnn._convolution_pointwise_.binary
            add_conv(sums, frames, weight, bias, padding, [1, 1], [1, 1], 1, "add", 1.0, None, [], None)
        else:
            sums += _conv_frames(frames, weight, bias)


def _adds_in_place(dtype: torch.dtype) -> bool:
    """Tell whether PyTorch's oneDNN can add a convolution to what is there: no pass of its own, no large block."""
    if not torch.backends.mkldnn.enabled or not hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@jit
def finish(sums, bias, residual, out, spots, inside, first, OUT: tl.constexpr):
    """Add bias and residual to sums [pixels, channels from `first` on], and write them, 64 channels at a time."""
    if sums.shape[1] > 64:  # fewer registers than all at once
        half: tl.constexpr = sums.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(sums, (sums.shape[0], 2, half)), (0, 2, 1)))
        finish(left, bias, residual, out, spots, inside, first, OUT)
        finish(right, bias, residual, out, spots, inside, first + half, OUT)
    else:
        outs = first + tl.arange(0, sums.shape[1])
        places = spots[:, None] * OUT + outs[None, :]
        legal = inside[:, None] & (outs < OUT)[None, :]
        if bias is not None:
            sums += tl.load(bias + outs, mask=outs < OUT, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            sums += tl.load(residual + places, mask=legal, other=0.0).to(tl.float32)
        tl.store(out + places, sums.to(out.dtype.element_ty), mask=legal)


@jit
def load_weight(start, channels, outs, C: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr, WHOLE: tl.constexpr):
    """One tap's block [channels, outs] of the weight; zeros outside where it is not WHOLE."""
    places = start + outs[None, :] * (TAPS * C) + channels[:, None]
    if WHOLE:
        return tl.load(places)
    return tl.load(places, mask=(channels < C)[:, None] & (outs < OUT)[None, :], other=0.0)


@jit
def causal_conv3d_kernel(
    x, history, weight, bias, residual, out,
    x_batch, x_frame, history_batch, history_frame, residual_batch, residual_frame,
    past, outputs, height, width, tiles,
    C: tl.constexpr, OUT: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, TAIL: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A product of matrices: BLOCK pixels of one output frame by N + TAIL channels, K channels of one tap at a time.

    Two accumulators share each tile of x, so 96 = 64 + 32 and 192 = 128 + 64 channels waste nothing though Triton's
    tiles are powers of 2; one of 128 or 256 would waste a quarter of the tensor cores' work.
    Programs that run together share what they read: out channels are numbered fastest, then frames, then pixels.
    """
    parts: tl.constexpr = (OUT + N + TAIL - 1) // (N + TAIL)
    steps: tl.constexpr = (C + K - 1) // K
    whole: tl.constexpr = C % K == 0 and OUT % (N + TAIL) == 0
    program = tl.program_id(0)
    first_out = program % parts * (N + TAIL)
    output = program // parts % outputs
    tile = program // (parts * outputs) % tiles
    batch = (program // (parts * outputs) // tiles).to(tl.int64)
    pixel = tile * BLOCK
    spots = tl.arange(0, BLOCK)
    inside = pixel + spots < height * width
    row, column = (pixel + spots) // width, (pixel + spots) % width
    seen = tl.zeros((BLOCK,), tl.int32)  # a bit per tap in the picture: whether it finds a pixel there
    for spot in tl.static_range(KH * KW):
        down, right = spot // KW - KH // 2, spot % KW - KW // 2
        found = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        seen |= (found & inside).to(tl.int32) << spot
    lanes = tl.arange(0, K)
    outs = first_out + tl.arange(0, N)
    sums = tl.zeros((BLOCK, N), tl.float32)
    if TAIL > 0:
        tail_outs = first_out + N + tl.arange(0, TAIL)
        tail_sums = tl.zeros((BLOCK, TAIL), tl.float32)
    oldest = (output + 1) * STRIDE - KT
    missing = tl.maximum(0, -past - oldest)  # taps that see only frames before the history
    for step in range(missing * (KH * KW * steps), KT * KH * KW * steps):
        tap = step // steps
        channels = step % steps * K + lanes
        frame = oldest + tap // (KH * KW)
        down = tap // KW % KH - KH // 2
        right = tap % KW - KW // 2
        start = x + batch * x_batch + frame.to(tl.int64) * x_frame
        if history is not None:
            before = history + batch * history_batch + (past + frame).to(tl.int64) * history_frame
            start = tl.where(frame < 0, before, start)
        start += (pixel + down * width + right).to(tl.int64) * C  # 64 bits only here: within a tile 32 are enough
        legal = ((seen >> tap % (KH * KW)) & 1 != 0)[:, None]
        legal = legal if C % K == 0 else legal & (channels < C)[None, :]
        a = tl.load(start + spots[:, None] * C + channels[None, :], mask=legal, other=0.0)
        w = load_weight(weight + tap * C, channels, outs, C, OUT, KT * KH * KW, whole)
        sums = tl.dot(a, w, sums, input_precision="ieee")
        if TAIL > 0:
            w = load_weight(weight + tap * C, channels, tail_outs, C, OUT, KT * KH * KW, whole)
            tail_sums = tl.dot(a, w, tail_sums, input_precision="ieee")
    out += ((batch * outputs + output) * height * width + pixel) * OUT
    if residual is not None:
        residual += batch * residual_batch + output.to(tl.int64) * residual_frame + pixel.to(tl.int64) * OUT
    finish(sums, bias, residual, out, spots, inside, first_out, OUT)
    if TAIL > 0:
        finish(tail_sums, bias, residual, out, spots, inside, first_out + N, OUT)


class Tile(NamedTuple):
    """What one program computes: `block` pixels by `n` + `tail` channels, `k` in channels at a time, on `warps`."""

    block: int
    n: int
    tail: int
    warps: int
    k: int = 32


# Where two cost the same, the first is taken. With four stages all fit into 99 KiB of shared memory.
TILES = (
    Tile(128, 256, 0, 8), Tile(256, 128, 0, 8), Tile(128, 128, 64, 8), Tile(128, 128, 32, 8), Tile(256, 64, 32, 8),
    Tile(256, 64, 0, 8), Tile(128, 32, 0, 4), Tile(128, 16, 0, 4),
)  # fmt: skip
STAGES = 4
MOST_TAPS = 31  # in the picture: bits of a number that stays positive
ENOUGH = 100  # programs that keep a large GPU busy


def choose_tile(channels: int, outs: int, pixels: int, frames: int, itemsize: int) -> Tile:
    """Return the tile for a convolution to `frames` frames (of all samples) of `pixels` pixels each."""
    k = 16 if 0 < channels % 32 <= 16 else 32  # what leaves less of the last block empty
    if itemsize > 2:  # no tensor cores: small, for registers
        return Tile(64, 32, 0, 4, k)

    def cost(tile: Tile) -> float:
        """Time on the tensor cores, and to bring both operands: per pixel, in columns of the product."""
        columns = tile.n + tile.tail
        return -(-outs // columns) * (columns + 64 * (1 + columns / tile.block))

    tile = min(TILES, key=cost)
    parts, block = -(-outs // (tile.n + tile.tail)), tile.block
    while block > 64 and -(-pixels // block) * frames * parts < ENOUGH:
        block //= 2
    return tile._replace(block=block, k=k)


def causal_conv3d_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    stride: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One launch. x, history and residual are dense per frame with channels fastest, weight is channels_last_3d, or
    they are made so; batch and frames may stand at any distance."""
    batch, channels, frames, height, width = x.shape
    outs, _, taps, rows, columns = weight.shape
    outputs = frames // stride
    if rows * columns > MOST_TAPS:
        raise ValueError(f"weight has {rows} x {columns} taps in the picture; the Triton version takes {MOST_TAPS}")
    x, weight = _by_frame(x), weight.contiguous(memory_format=torch.channels_last_3d)
    history = None if history is None or history.shape[2] == 0 else _by_frame(history)
    residual = None if residual is None else _by_frame(residual)
    assert weight.numel() < 2**31 and height * width < 2**31
    out = _new_output(x, weight, stride)
    tile = choose_tile(channels, outs, height * width, batch * outputs, x.element_size())
    cells = next_power_of_2(height * width * batch * outputs)
    found = tuned("causal_conv3d", f"{channels} to {outs} by {taps}x{rows}x{columns} {cells}", x.device)
    tile = tile._replace(**{name: value for name, value in found.items() if name in Tile._fields})
    tiles = -(-height * width // tile.block)
    launch(
        causal_conv3d_kernel,
        (-(-outs // (tile.n + tile.tail)) * outputs * tiles * batch,),
        {
            "x": x, "history": history, "weight": weight,
            "bias": None if bias is None else bias.contiguous(), "residual": residual, "out": out,
            "x_batch": x.stride(0), "x_frame": x.stride(2),
            "history_batch": 0 if history is None else history.stride(0),
            "history_frame": 0 if history is None else history.stride(2),
            "residual_batch": 0 if residual is None else residual.stride(0),
            "residual_frame": 0 if residual is None else residual.stride(2),
            "past": 0 if history is None else history.shape[2],
            "outputs": outputs, "height": height, "width": width, "tiles": tiles,
        },
        {
            "C": channels, "OUT": outs, "KT": taps, "KH": rows, "KW": columns, "STRIDE": stride,
            "BLOCK": tile.block, "N": tile.n, "TAIL": tile.tail, "K": tile.k,
        },
        num_warps=tile.warps,
        num_stages=found.get("num_stages", STAGES),
    )  # fmt: skip
    return out


def _by_frame(tensor: torch.Tensor) -> torch.Tensor:
    """Return [B, C, T, H, W] with each frame a dense [H, W, C] block: the tensor itself where it is so."""
    channels, width = tensor.shape[1], tensor.shape[4]
    steps = {1: 1, 4: channels, 3: channels * width}
    if all(tensor.shape[axis] == 1 or tensor.stride(axis) == step for axis, step in steps.items()):
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def _new_output(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    shape = (x.shape[0], weight.shape[0], x.shape[2] // stride, *x.shape[3:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def causal_conv3d_picked(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    stride: int,
    residual: torch.Tensor | None = None,
    inplace: bool = False,
) -> torch.Tensor:
    """What runs eagerly: the forced implementation; else Triton for 16-bit numbers on GPUs and PyTorch elsewhere.

    float32 on GPUs is left to cuDNN: Triton would multiply outside the tensor cores.
    """
    if not is_forced() and x.device.type == "cpu":
        return causal_conv3d_taps(x, weight, bias, history, stride, residual, inplace)
    takes = triton is not None and x.is_cuda and x.element_size() == 2 and weight[0, 0, 0].numel() <= MOST_TAPS
    if is_forced() or takes:
        chosen = pick(x, ref=causal_conv3d_ref, triton=causal_conv3d_triton)
    else:
        chosen = causal_conv3d_window
    return chosen(x, weight, bias, history, stride, residual)


register(
    "causal_conv3d(Tensor x, Tensor weight, Tensor? bias, Tensor? history, int stride, Tensor? residual) -> Tensor",
    lambda *arguments: causal_conv3d_picked(*arguments).contiguous(memory_format=torch.channels_last_3d),
    lambda x, weight, bias, history, stride, residual: _new_output(x, weight, stride),
)


def causal_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    *,
    stride: int = 1,
    residual: torch.Tensor | None = None,
    inplace: bool = False,
) -> torch.Tensor:
    """Return the causal convolution of x after history, plus the residual, [B, O, T / stride, H, W].

    With `inplace` the result may take the residual's memory. ValueError for what does not fit. On GPUs all that is
    channels_last_3d is read in place, and the rest copied.
    """
    expect_floating("x", x)
    expect_shape("x", x, (None, None, None, None, None))
    expect_shape("weight", weight, (None, x.shape[1], None, None, None))
    expect_some("weight", weight)
    expect_some("x", x, 3, 4)
    out_channels, _, taps, rows, columns = weight.shape
    if not 1 <= stride <= taps:
        raise ValueError(f"stride is {stride}; expected 1 to {taps}, the weight's taps in time")
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(f"weight has {rows} x {columns} taps in the picture; expected odd numbers")
    if x.shape[2] == 0 or x.shape[2] % stride:
        raise ValueError(f"x has {x.shape[2]} frames; expected a positive multiple of the stride, {stride}")
    if bias is not None:
        expect_shape("bias", bias, (out_channels,))
    if history is not None:
        expect_shape("history", history, (x.shape[0], x.shape[1], None, *x.shape[3:]))
        if history.shape[2] > taps - stride:
            raise ValueError(f"history has {history.shape[2]} frames; expected at most {taps - stride}")
    if residual is not None:
        expect_shape("residual", residual, (x.shape[0], out_channels, x.shape[2] // stride, *x.shape[3:]))
    for name, tensor in (("weight", weight), ("bias", bias), ("history", history), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected that of x, {x.dtype}")
    expect_device(x, weight=weight, bias=bias, history=history, residual=residual)
    if is_opaque():
        return torch.ops.runtime.causal_conv3d(x, weight, bias, history, stride, residual)
    return causal_conv3d_picked(x, weight, bias, history, stride, residual, inplace)
