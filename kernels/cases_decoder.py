"""Cases of a video decoder's operations: norm_silu and causal_conv3d."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .case import Arguments, Case, Maker
from .shapes import CUBE, DECODERS, HALF, IN_TIME


def norm_silu_cases() -> Iterator[Case]:
    """Channels-last and not; odd sizes; each with and without SiLU and twice the size."""
    for shape, last, silu, upsample in (
        ((2, 3, 2, 3, 5), True, True, False), ((1, 96, 1, 5, 7), True, False, False),
        ((1, 33, 2, 3, 4), False, True, True), ((2, 160, 3, 3, 3), True, True, True),
        ((1, 5, 1, 3, 7), True, False, True), ((0, 8, 1, 2, 2), True, True, False), ((2, 7, 11), False, True, False),
        ((3, 6, 3, 5), True, True, True),
    ):  # fmt: skip

        def make(
            m: Maker, shape: tuple[int, ...] = shape, last: bool = last, silu: bool = silu, upsample: bool = upsample
        ) -> Arguments:
            x = m.tensor(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if last else m.tensor(*shape)
            return {"x": x, "gamma": m.gain(shape[1], 1, 1, 1), "silu": silu, "upsample": upsample}

        yield Case("norm_silu", f"{'x'.join(map(str, shape))} last {last} silu {silu} upsample {upsample}", make)
    for name, channels, frames, height, width, upsample in (
        ("wan-vae 480p", 384, 4, 120, 208, False), ("wan-vae 480p", 192, 4, 240, 416, True),
        ("wan-vae 480p", 96, 4, 480, 832, False),
        ("wan-vae-2.2 704p", 1024, 4, 88, 160, False), ("wan-vae-2.2 704p", 256, 4, 352, 640, False),
        ("wan-vae-2.2 704p", 160, 4, 352, 640, False),
    ):  # fmt: skip

        def real(
            m: Maker, channels: int = channels, frames: int = frames, height: int = height, width: int = width,
            upsample: bool = upsample,
        ) -> Arguments:  # fmt: skip
            x = m.tensor(1, frames, height, width, channels).movedim(-1, 1)
            return {"x": x, "gamma": m.gain(channels, 1, 1, 1), "upsample": upsample}

        moved = (5 if upsample else 2) * HALF * channels * frames * height * width
        described = f"{name} {channels} channels{' upsample' if upsample else ''}"
        yield Case("norm_silu", described, real, real=True, bytes=moved)


def causal_conv3d_cases() -> Iterator[Case]:
    """Odd sizes; histories of no, one and two frames; each kernel, both strides; layouts that are copied or not."""

    def arguments(
        m: Maker, rows: int, channels: int, outs: int, frames: int, past: int, size: tuple[int, int],
        kernel: tuple[int, int, int], stride: int = 1, residual: bool = False, last: bool = True,
    ) -> Arguments:  # fmt: skip
        def video(channels: int, frames: int) -> torch.Tensor:
            x = m.tensor(rows, frames, *size, channels).movedim(-1, 1)
            return x if last else x.contiguous()

        weight = m.tensor(outs, channels, *kernel, scale=(channels * math.prod(kernel)) ** -0.5)
        return {
            "x": video(channels, frames),
            "weight": weight.contiguous(memory_format=torch.channels_last_3d) if last else weight,
            "bias": m.tensor(outs),
            "history": video(channels, past) if past else None,
            "stride": stride,
            "residual": video(outs, frames // stride) if residual else None,
        }

    for rows, channels, outs, frames, past, kernel, stride, residual, last in (
        (1, 16, 3, 1, 0, CUBE, 1, False, True), (2, 33, 96, 2, 1, CUBE, 1, False, True),
        (1, 5, 12, 4, 2, CUBE, 1, False, False), (0, 8, 16, 2, 2, CUBE, 1, False, True),
        (2, 96, 96, 1, 2, CUBE, 1, True, True), (1, 40, 200, 4, 1, IN_TIME, 2, True, True),
        (2, 48, 160, 2, 0, IN_TIME, 2, False, True), (1, 20, 256, 1, 2, IN_TIME, 1, True, False),
        (1, 64, 7, 3, 0, (1, 3, 3), 1, True, True), (2, 130, 33, 2, 0, (1, 1, 1), 1, True, True),
        (1, 1, 1, 2, 1, CUBE, 1, False, True),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, channels: int = channels, outs: int = outs, frames: int = frames,
            past: int = past, kernel: tuple[int, int, int] = kernel, stride: int = stride, residual: bool = residual,
            last: bool = last,
        ) -> Arguments:  # fmt: skip
            return arguments(m, rows, channels, outs, frames, past, (5, 7), kernel, stride, residual, last)

        name = f"{rows}x{channels}x{frames} to {outs} past {past} kernel {'x'.join(map(str, kernel))} stride {stride}"
        yield Case("causal_conv3d", f"{name} residual {residual} last {last}", make)

    def sliced(m: Maker) -> Arguments:
        given = arguments(m, 2, 8, 16, 4, 4, (9, 16), CUBE)
        return given | {"x": given["x"][:, :, 1:3], "history": given["history"][:, :, -2:], "bias": None}

    yield Case("causal_conv3d", "frames of longer clips", sliced)
    for decoder in DECODERS:
        for channels, outs, level, kernel in decoder.convolutions:
            frames, size = decoder.frames[level], (decoder.latent[0] << level, decoder.latent[1] << level)
            residual = channels == outs  # the second of a residual block

            def real(
                m: Maker, channels: int = channels, outs: int = outs, frames: int = frames,
                size: tuple[int, int] = size, kernel: tuple[int, int, int] = kernel, residual: bool = residual,
            ) -> Arguments:  # fmt: skip
                return arguments(m, 1, channels, outs, frames, 2, size, kernel, residual=residual)

            pixels, taps = math.prod(size), math.prod(kernel)
            read = (frames + 2) * pixels * channels + channels * outs * taps
            name = f"{decoder.name} {channels} to {outs} at {size[1]}x{size[0]}x{frames}"
            yield Case(
                "causal_conv3d", name, real, real=True,
                bytes=HALF * (read + (2 if residual else 1) * frames * pixels * outs),
                flops=2 * frames * pixels * outs * channels * taps,
            )  # fmt: skip
