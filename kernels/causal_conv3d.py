"""causal_conv3d: a 3-D convolution over a stream of frames that never looks ahead.

    y[b, o, j] = bias[o] + sum over c, k of  weight[o, c, k] (*) frame[b, c, (j + 1) * stride - KT + k]

(*) is the 2-D convolution that keeps height and width (zeros around the picture); frame[0 ...] is x, frame[-1],
frame[-2], ... is the history read backwards, and frames before the history are zero. Output j sees nothing newer
than frame (j + 1) * stride - 1, so a stream cut into chunks gives the same numbers as the whole.

C in channels, O out channels, T frames, KT taps in time, KH x KW taps in the picture (odd).
x [B, C, T, H, W] with T a multiple of stride; weight [O, C, KT, KH, KW], KT >= stride; bias [O] or None;
history [B, C, P, H, W] with 0 <= P <= KT - stride, or None for P = 0; y [B, O, T / stride, H, W]; one dtype for all.
Sums are float32. Source: the causal convolution of Wan's VAE, https://arxiv.org/abs/2503.20314, section 4.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import expect_floating, expect_shape

LARGE_BLOCK = 2**25  # bytes; a larger block that is freed goes back to the system, and the next one is zeroed anew


def causal_conv3d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    stride: int,
) -> torch.Tensor:
    """The definition, float32 inside."""
    bias = None if bias is None else bias.float()
    history = None if history is None else history.float()
    return causal_conv3d_window(x.float(), weight.float(), bias, history, stride).to(x.dtype)


def causal_conv3d_window(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    stride: int,
) -> torch.Tensor:
    """One convolution over the joined window, in x's dtype; the backend accumulates in float32."""
    taps, rows, columns = weight.shape[2:]
    window = x if history is None else torch.cat([history, x], dim=2)
    missing = taps - stride - (window.shape[2] - x.shape[2])
    if missing:
        window = F.pad(window, (0, 0, 0, 0, missing, 0))
    return F.conv3d(window, weight, bias, stride=(stride, 1, 1), padding=(0, rows // 2, columns // 2))


def causal_conv3d_taps(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor | None,
    stride: int,
) -> torch.Tensor:
    """The sum of one 2-D convolution per tap in time, for float32 on CPUs.

    Nothing is joined or padded, and frames that are zero cost nothing. Fastest where x is channels_last_3d and
    weight[:, :, k] is channels_last for each k.
    """
    taps = weight.shape[2]
    outputs = x.shape[2] // stride
    past = 0 if history is None else history.shape[2]
    y = _conv_frames(x[:, :, stride - 1 :: stride], weight[:, :, taps - 1], bias)
    for tap in range(taps - 1):
        newest = stride - taps + tap  # the frame that output 0 sees through this tap; negative: in the history
        inside = min(outputs, -(min(newest, 0) // stride))  # first output whose frame is in x
        if inside < outputs:
            _add_frames(y[:, :, inside:], x[:, :, newest + inside * stride :: stride], weight[:, :, tap])
        begin = max(0, -((past + newest) // stride))  # first output whose frame is not before the history
        if history is not None and begin < inside:
            _add_frames(
                y[:, :, begin:inside], history[:, :, past + newest + begin * stride :: stride], weight[:, :, tap]
            )
    return y


def _conv_frames(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolve each frame of x [B, C, T, H, W] with weight [O, C, KH, KW], keeping its size."""
    rows, columns = weight.shape[2:]
    frames = x.transpose(1, 2).flatten(0, 1)  # [B * T, C, H, W]
    y = F.conv2d(frames, weight, bias, padding=(rows // 2, columns // 2))
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _add_frames(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Add the convolution of the first frames of x to y in place, as many at once as make no large block."""
    count = y.shape[2]
    step = max(1, LARGE_BLOCK * count // (y.numel() * y.element_size()))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        y[:, :, part] += _conv_frames(x[:, :, part], weight)


def causal_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    *,
    stride: int = 1,
) -> torch.Tensor:
    """Return the causal convolution of x after history, [B, O, T / stride, H, W]; ValueError for what does not fit."""
    expect_floating("x", x)
    expect_shape("x", x, (None, None, None, None, None))
    expect_shape("weight", weight, (None, x.shape[1], None, None, None))
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
    for name, tensor in (("weight", weight), ("bias", bias), ("history", history)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected that of x, {x.dtype}")
    by_taps = x.device.type == "cpu" and x.dtype == torch.float32
    return (causal_conv3d_taps if by_taps else causal_conv3d_window)(x, weight, bias, history, stride)
