"""The shapes that matter, named once: tests, benchmarks, the compile report and tuning all draw from here.

A new operation is tested, timed and compiled ahead by adding its file and its cases. Small cases run in Triton's
interpreter on a CPU; real ones are a published model at a published resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .qk_norm_rope import AxisTables

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of one operation; `bytes` and `flops` are the least that it can take, for the roofline."""

    operation: str
    name: str
    make: Callable[[Maker], Arguments]  # keyword arguments of the operation
    real: bool = False
    bytes: int = 0
    flops: int = 0


@dataclass
class Maker:
    """Makes a case's tensors: seeded, on a device, in a dtype; on the meta device only their shapes."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        """Return normal numbers; drawn in float32 and rounded, so that all dtypes see the same ones."""
        kind = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=kind, device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.seed)
        self.seed += 1
        return (torch.randn(shape, generator=generator, device=self.device) * scale).to(kind)

    def vector(self, *shape: int) -> torch.Tensor:
        """Return float32 numbers around zero, as modulation vectors are."""
        return self.tensor(*shape, dtype=torch.float32, scale=0.5)

    def gain(self, *shape: int) -> torch.Tensor:
        """Return float32 numbers around one, as norm weights are."""
        return 1.0 + self.tensor(*shape, dtype=torch.float32, scale=0.2)

    def turns(self, length: int, pairs: int) -> torch.Tensor:
        """Return a rotary table [L, K/2, 2] float32."""
        if self.device.type == "meta":
            return torch.empty(length, pairs, 2, device=self.device)
        angle = torch.outer(
            torch.arange(length, device=self.device, dtype=torch.float32),
            10000.0 ** -(torch.arange(pairs, device=self.device) / pairs),
        )
        return torch.stack([angle.cos(), angle.sin()], 2)

    def axes(self, grid: tuple[int, int, int], pairs: int) -> AxisTables:
        """Return rotary tables by axis; t takes of the pairs what h and w leave, as in Wan."""
        side = pairs // 3
        t, h, w = grid
        return AxisTables(self.turns(t, pairs - 2 * side), self.turns(h, side), self.turns(w, side))


@dataclass(frozen=True)
class Transformer:
    """The widths of a published transformer."""

    name: str
    width: int
    heads: int
    ffn: int


@dataclass(frozen=True)
class Resolution:
    """A token grid (t, h, w) of a published size."""

    name: str
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Number of video tokens, L."""
        return self.grid[0] * self.grid[1] * self.grid[2]


WAN_1B = Transformer("wan-1.3b", 1536, 12, 8960)
WAN_14B = Transformer("wan-14b", 5120, 40, 13824)
WAN_5B = Transformer("wan-5b", 3072, 24, 14336)
P480 = Resolution("480p", (21, 30, 52))  # 832x480, 81 frames
P720 = Resolution("720p", (21, 45, 80))  # 1280x720, 81 frames
P704 = Resolution("704p", (31, 22, 40))  # 1280x704, 121 frames, the 16x16 autoencoder

REAL = ((WAN_1B, P480), (WAN_1B, P720), (WAN_14B, P480), (WAN_14B, P720), (WAN_5B, P704))
HALF = 2  # bytes of bfloat16, in which real cases are counted


def adapted_cases(operation: str, written: int) -> Iterator[Case]:
    """Plain, per sample, per token group, affine; a width that is no power of 2. `written`: bytes of each number."""
    for rows, length, width, groups, shared, affine, norm in (
        (1, 7, 33, 1, True, False, "layer"), (2, 12, 96, 3, False, False, "rms"), (2, 12, 65, 12, True, True, "layer"),
        (1, 5, 130, 0, True, True, "layer"), (2, 5, 48, 0, True, True, "rms"), (1, 4, 33, 1, True, False, "rms"),
        (0, 4, 16, 1, True, False, "layer"),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, width: int = width, groups: int = groups,
            shared: bool = shared, affine: bool = affine, norm: str = norm,
        ) -> Arguments:  # fmt: skip
            vectors = (1 if shared else rows, groups, width)
            return {
                "norm": norm,
                "x": m.tensor(rows, length, width),
                "scale": m.vector(*vectors) if groups else None,
                "shift": m.vector(*vectors) if groups else None,
                "weight": m.gain(width) if affine else None,
                "bias": m.vector(width) if affine else None,
            }

        yield Case(operation, f"{rows}x{length}x{width} groups {groups} affine {affine} {norm}", make)

    def strided(m: Maker) -> Arguments:
        return {"x": m.tensor(5, 2, 48).transpose(0, 1), "scale": m.vector(1, 1, 48), "shift": m.vector(1, 1, 48)}

    yield Case(operation, "transposed", strided)
    for model, size in REAL:

        def real(m: Maker, width: int = model.width, tokens: int = size.tokens) -> Arguments:
            return {"x": m.tensor(1, tokens, width), "scale": m.vector(1, 1, width), "shift": m.vector(1, 1, width)}

        def query(m: Maker, width: int = model.width, tokens: int = size.tokens) -> Arguments:
            return {"x": m.tensor(1, tokens, width), "weight": m.gain(width), "norm": "rms"}

        moved = (HALF + written) * size.tokens * model.width
        yield Case(operation, f"{model.name} {size.name}", real, real=True, bytes=moved)
        yield Case(operation, f"{model.name} {size.name} rms", query, real=True, bytes=moved)


def modulate_cases() -> Iterator[Case]:
    """See `adapted_cases`."""
    return adapted_cases("modulate", HALF)


def modulate_fp8_cases() -> Iterator[Case]:
    """See `adapted_cases`."""
    return adapted_cases("modulate_fp8", 1)


def residual_cases(operation: str, written: int) -> Iterator[Case]:
    """Plain sums, gates per sample and per token group, one row of x for all; fused: the norm's own groups besides.

    `written`: bytes of each number.
    """
    fused = written > HALF

    def vectors(m: Maker, name: str, rows: int, groups: int, width: int) -> Arguments:
        return {name: m.vector(rows, groups, width) if groups else None}

    for rows, length, width, groups, norm_groups, shared, affine in (
        (1, 7, 33, 1, 1, True, False), (2, 12, 96, 3, 1, False, False), (2, 12, 65, 12, 4, True, True),
        (2, 5, 130, 0, 5, True, False), (1, 5, 48, 0, 0, True, True), (0, 4, 16, 1, 1, True, False),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, width: int = width, groups: int = groups,
            norm_groups: int = norm_groups, shared: bool = shared, affine: bool = affine,
        ) -> Arguments:  # fmt: skip
            count = 1 if shared else rows
            given = {"x": m.tensor(rows, length, width), "y": m.tensor(rows, length, width)}
            given |= vectors(m, "gate", count, groups, width)
            if fused:
                given |= vectors(m, "scale", count, norm_groups, width) | vectors(m, "shift", count, norm_groups, width)
                given |= {"weight": m.gain(width), "bias": m.vector(width)} if affine else {}
            return given

        yield Case(operation, f"{rows}x{length}x{width} groups {groups}, {norm_groups} affine {affine}", make)

    def expanded(m: Maker) -> Arguments:
        given = {"x": m.tensor(1, 5, 40).expand(3, -1, -1), "y": m.tensor(5, 3, 40).transpose(0, 1)}
        return given | ({"scale": m.vector(1, 1, 40), "shift": m.vector(1, 1, 40)} if fused else {})

    def sliced(m: Maker) -> Arguments:
        return {"x": m.tensor(2, 5, 80)[:, :, ::2], "y": m.tensor(2, 40, 5).mT, "gate": m.vector(2, 80, 1).mT[..., ::2]}

    yield Case(operation, "one row of x, y transposed", expanded)
    yield Case(operation, "strided numbers", sliced)
    for model, size in REAL:

        def real(m: Maker, width: int = model.width, tokens: int = size.tokens) -> Arguments:
            given = {"x": m.tensor(1, tokens, width), "y": m.tensor(1, tokens, width), "gate": m.vector(1, 1, width)}
            return given | ({"scale": m.vector(1, 1, width), "shift": m.vector(1, 1, width)} if fused else {})

        moved = (2 * HALF + written) * size.tokens * model.width
        yield Case(operation, f"{model.name} {size.name}", real, real=True, bytes=moved)


def gate_residual_cases() -> Iterator[Case]:
    """See `residual_cases`."""
    return residual_cases("gate_residual", HALF)


def gate_residual_modulate_cases() -> Iterator[Case]:
    """See `residual_cases`."""
    return residual_cases("gate_residual_modulate", 2 * HALF)


def gate_residual_modulate_fp8_cases() -> Iterator[Case]:
    """See `residual_cases`."""
    return residual_cases("gate_residual_modulate_fp8", HALF + 1)


def qk_norm_rope_cases() -> Iterator[Case]:
    """Every norm, pairing and kind of table; text before and behind; heads of a size that is no power of 2."""

    def arguments(
        m: Maker, qkv: torch.Tensor, heads: int, norm: str = "rms", table: str = "dense", pairing: str = "interleaved",
        skip: tuple[int, int] = (0, 0), grid: tuple[int, int, int] = (1, 1, 1),
    ) -> Arguments:  # fmt: skip
        width = qkv.shape[2] // 3
        size = width // heads
        gains = width if norm == "rms" else size
        given: Arguments = {"qkv": qkv, "heads": heads, "norm": norm, "pairing": pairing, "skip": skip}
        for name in ("q", "k"):
            given[f"{name}_weight"] = None if norm == "none" else m.gain(gains)
            given[f"{name}_bias"] = m.vector(gains) if norm == "layer_head" else None
        given["rope"] = None
        if table == "dense":
            given["rope"] = m.turns(qkv.shape[1] - sum(skip), size // 2)
        elif table == "axes":
            given["rope"] = m.axes(grid, size // 2)
        return given

    def small(m: Maker, rows: int, length: int, heads: int, size: int, more: Arguments) -> Arguments:
        return arguments(m, m.tensor(rows, length, 3 * heads * size), heads, **more)

    for rows, length, heads, head, more in (
        (2, 7, 3, 12, {}), (1, 24, 2, 12, {"table": "axes", "grid": (2, 3, 4)}),
        (2, 9, 3, 8, {"norm": "rms_head", "pairing": "half", "skip": (0, 2)}),
        (1, 11, 2, 20, {"norm": "layer_head", "table": "axes", "grid": (1, 2, 3), "skip": (5, 0)}),
        (2, 17, 1, 14, {"norm": "layer_head", "pairing": "half", "table": "axes", "grid": (2, 1, 5), "skip": (3, 4)}),
        (1, 5, 4, 16, {"norm": "none"}), (1, 5, 5, 6, {"norm": "rms", "table": "none"}),
        (1, 4, 2, 8, {"skip": (4, 0)}), (0, 6, 2, 12, {"table": "axes", "grid": (1, 2, 3)}),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, heads: int = heads, head: int = head,
            more: Arguments = more,
        ) -> Arguments:  # fmt: skip
            return small(m, rows, length, heads, head, more)

        described = " ".join(str(value) for value in more.values())
        yield Case("qk_norm_rope", f"{rows}x{length}x{heads}x{head} {described}", make)

    def transposed(m: Maker) -> Arguments:
        return arguments(m, m.tensor(5, 2, 72).transpose(0, 1), 2)

    def expanded(m: Maker) -> Arguments:
        return arguments(m, m.tensor(1, 5, 72).expand(2, -1, -1), 2)

    def sliced(m: Maker) -> Arguments:
        return arguments(m, m.tensor(2, 5, 144)[:, :, ::2], 2)

    yield Case("qk_norm_rope", "transposed", transposed)
    yield Case("qk_norm_rope", "one row", expanded)
    yield Case("qk_norm_rope", "strided numbers", sliced)
    for table in ("dense", "axes"):
        for model, size in REAL:

            def real(m: Maker, model: Transformer = model, size: Resolution = size, table: str = table) -> Arguments:
                return arguments(m, m.tensor(1, size.tokens, 3 * model.width), model.heads, table=table, grid=size.grid)

            moved = 4 * HALF * size.tokens * model.width
            yield Case("qk_norm_rope", f"{model.name} {size.name} {table}", real, real=True, bytes=moved)
    for name, heads, head, grid, more in (
        ("cogvideox-5b 480p", 48, 64, (13, 30, 45), {"norm": "layer_head", "skip": (226, 0)}),
        ("hunyuan 720p", 24, 128, (33, 45, 80), {"norm": "rms_head", "skip": (0, 256)}),
    ):
        tokens = math.prod(grid) + sum(more["skip"])  # type: ignore[arg-type]

        def other(
            m: Maker, tokens: int = tokens, heads: int = heads, head: int = head, grid: tuple[int, int, int] = grid,
            more: Arguments = more,
        ) -> Arguments:  # fmt: skip
            return arguments(m, m.tensor(1, tokens, 3 * heads * head), heads, table="axes", grid=grid, **more)

        yield Case("qk_norm_rope", name, other, real=True, bytes=4 * HALF * tokens * heads * head)


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


@dataclass(frozen=True)
class Decoder:
    """The convolutions of a published video decoder, at a size: channels in and out, level, kernel, where they occur.

    Level i has 2 ** i times the latents' height and width; `frames` are those of one latent frame, by level.
    """

    name: str
    latent: tuple[int, int]
    convolutions: tuple[tuple[int, int, int, tuple[int, int, int]], ...]
    frames: tuple[int, ...] = (1, 2, 4, 4)


CUBE, IN_TIME = (3, 3, 3), (3, 1, 1)
WAN_DECODER = (
    (16, 384, 0, CUBE), (384, 384, 0, CUBE), (384, 768, 0, IN_TIME),
    (192, 384, 1, CUBE), (384, 384, 1, CUBE), (384, 768, 1, IN_TIME),
    (192, 192, 2, CUBE), (96, 96, 3, CUBE), (96, 3, 3, CUBE),
)  # fmt: skip
WAN22_DECODER = (
    (48, 1024, 0, CUBE), (1024, 1024, 0, CUBE), (1024, 2048, 0, IN_TIME), (1024, 1024, 1, CUBE),
    (1024, 2048, 1, IN_TIME), (1024, 512, 2, CUBE), (512, 512, 2, CUBE), (512, 256, 3, CUBE), (256, 256, 3, CUBE),
    (256, 12, 3, CUBE),
)  # fmt: skip
DECODERS = (
    Decoder("wan-vae 480p", (60, 104), WAN_DECODER),
    Decoder("wan-vae 720p", (90, 160), WAN_DECODER),
    Decoder("wan-vae-2.2 704p", (44, 80), WAN22_DECODER),
)


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


def attention_cases() -> Iterator[Case]:
    """Tails of tiles on both sides; both head sizes; biases per sample and shared, some of whole tiles of -inf."""

    def biased(m: Maker, rows: int, keys: int, masked: int = 0) -> torch.Tensor:
        bias = m.tensor(rows, 1, 1, keys)
        bias[..., :masked] = -math.inf
        return bias

    for rows, length, keys, heads, head, biases, masked in (
        (1, 7, 5, 2, 64, 0, 0), (2, 130, 70, 1, 128, 2, 0), (1, 65, 129, 2, 128, 1, 64), (2, 64, 64, 1, 64, 1, 0),
        (0, 4, 4, 1, 64, 0, 0), (1, 1, 1, 3, 128, 1, 0),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, keys: int = keys, heads: int = heads, head: int = head,
            biases: int = biases, masked: int = masked,
        ) -> Arguments:  # fmt: skip
            k, v = m.tensor(rows, keys, heads, head), m.tensor(rows, keys, heads, head)
            bias = biased(m, biases, keys, masked) if biases else None
            return {"q": m.tensor(rows, length, heads, head), "k": k, "v": v, "bias": bias}

        yield Case("attention", f"{rows}x{length}x{keys} heads {heads}x{head} biases {biases} -inf {masked}", make)

    def views(m: Maker) -> Arguments:
        return dict(zip(("q", "k", "v"), m.tensor(2, 67, 3, 2, 64).unbind(2), strict=True))

    def transposed(m: Maker) -> Arguments:
        q, k, v = m.tensor(3, 1, 2, 33, 64).transpose(2, 3).expand(-1, 2, -1, -1, -1).unbind(0)
        return {"q": q, "k": k, "v": v, "bias": biased(m, 2, 33)}

    yield Case("attention", "views of one qkv", views)
    yield Case("attention", "transposed, one row for all", transposed)
    for model, size in REAL:
        for keys in (size.tokens, 64):  # itself; a prompt of 60 tokens and its folded padding

            def real(m: Maker, model: Transformer = model, tokens: int = size.tokens, keys: int = keys) -> Arguments:
                shape = (model.heads, model.width // model.heads)
                if keys == tokens:
                    return dict(zip(("q", "k", "v"), m.tensor(1, tokens, 3, *shape).unbind(2), strict=True))
                k, v = m.tensor(1, keys, *shape), m.tensor(1, keys, *shape)
                return {"q": m.tensor(1, tokens, *shape), "k": k, "v": v, "bias": biased(m, 1, keys)}

            name = f"{model.name} {size.name} over {'itself' if keys == size.tokens else 'text'}"
            moved, work = 2 * HALF * (size.tokens + keys) * model.width, 4 * size.tokens * keys * model.width
            yield Case("attention", name, real, real=True, bytes=moved, flops=work)


def attention_fp8_cases() -> Iterator[Case]:
    """Tails of tiles on both sides, more keys than one tile; both head sizes; keys far from zero."""

    def arguments(m: Maker, rows: int, length: int, keys: int, heads: int, head: int) -> Arguments:
        k = m.tensor(rows, keys, heads, head) + 4 * m.tensor(1, 1, heads, head)
        return {"q": m.tensor(rows, length, heads, head), "k": k, "v": m.tensor(rows, keys, heads, head)}

    for rows, length, keys, heads, head in (
        (1, 7, 5, 2, 64), (2, 130, 70, 1, 128), (1, 65, 129, 2, 128), (2, 64, 256, 1, 64), (0, 4, 4, 1, 64),
        (1, 1, 1, 3, 128),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, keys: int = keys, heads: int = heads, head: int = head
        ) -> Arguments:
            return arguments(m, rows, length, keys, heads, head)

        yield Case("attention_fp8", f"{rows}x{length}x{keys} heads {heads}x{head}", make)

    def views(m: Maker) -> Arguments:
        return dict(zip(("q", "k", "v"), m.tensor(2, 67, 3, 2, 64).unbind(2), strict=True))

    yield Case("attention_fp8", "views of one qkv", views)
    for model, size in REAL:

        def real(m: Maker, model: Transformer = model, tokens: int = size.tokens) -> Arguments:
            shape = (1, tokens, 3, model.heads, model.width // model.heads)
            return dict(zip(("q", "k", "v"), m.tensor(*shape).unbind(2), strict=True))

        moved, work = 4 * HALF * size.tokens * model.width, 4 * size.tokens**2 * model.width
        yield Case("attention_fp8", f"{model.name} {size.name}", real, real=True, bytes=moved, flops=work)


def mlp_cases() -> Iterator[Case]:
    """Widths that are no multiple of a tile; alone, with a plain residual, with gates per sample and per group."""

    def arguments(m: Maker, rows: int, length: int, width: int, inner: int, outs: int) -> Arguments:
        return {
            "x": m.tensor(rows, length, width),
            "w_in": m.tensor(inner, width, scale=width**-0.5), "b_in": m.tensor(inner),
            "w_out": m.tensor(outs, inner, scale=inner**-0.5), "b_out": m.tensor(outs),
        }  # fmt: skip

    for rows, length, width, inner, outs, groups, gates in (
        (1, 7, 33, 50, 20, None, 0), (2, 70, 64, 130, 96, None, 0), (0, 4, 16, 16, 16, None, 0),
        (1, 130, 48, 64, 136, None, 0), (1, 7, 33, 50, 20, 0, 0), (2, 70, 64, 130, 96, 2, 1),
        (2, 130, 48, 96, 130, 130, 2), (1, 4, 16, 16, 16, 1, 1),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, width: int = width, inner: int = inner, outs: int = outs,
            groups: int | None = groups, gates: int = gates,
        ) -> Arguments:  # fmt: skip
            given = arguments(m, rows, length, width, inner, outs)
            if groups is not None:
                given["residual"] = m.tensor(rows, length, outs)
                given["gate"] = m.vector(gates, groups, outs) if groups else None
            return given

        name = f"{rows}x{length}x{width} by {inner} to {outs}"
        yield Case("mlp", name if groups is None else f"{name} groups {groups} gates {gates}", make)

    def views(m: Maker) -> Arguments:
        given = arguments(m, 2, 9, 32, 48, 40)
        return given | {
            "x": m.tensor(9, 2, 32).transpose(0, 1), "w_in": m.tensor(32, 48).T, "w_out": m.tensor(40, 96)[:, ::2],
            "residual": m.tensor(1, 9, 40).expand(2, -1, -1), "gate": m.vector(2, 40, 3).mT,
        }  # fmt: skip

    yield Case("mlp", "views", views)
    for model, size in REAL:

        def real(m: Maker, model: Transformer = model, tokens: int = size.tokens) -> Arguments:
            given = arguments(m, 1, tokens, model.width, model.ffn, model.width)
            return given | {"residual": m.tensor(1, tokens, model.width), "gate": m.vector(1, 1, model.width)}

        moved = HALF * model.width * (3 * size.tokens + 2 * model.ffn)
        work = 4 * size.tokens * model.width * model.ffn
        yield Case("mlp", f"{model.name} {size.name}", real, real=True, bytes=moved, flops=work)


def quantise_rows_cases() -> Iterator[Case]:
    """Widths of one tile and of two; with GELU before it, as between the products of a feed-forward."""
    for tokens, width, gelu in ((7, 33, False), (5, 130, True), (3, 1, False), (0, 16, False)):

        def make(m: Maker, tokens: int = tokens, width: int = width, gelu: bool = gelu) -> Arguments:
            return {"x": m.tensor(tokens, width), "gelu": gelu}

        yield Case("quantise_rows", f"{tokens}x{width} gelu {gelu}", make)
    yield Case("quantise_rows", "strided numbers", lambda m: {"x": m.tensor(5, 80)[:, ::2]})
    for model, size in REAL:
        for gelu, width in ((False, model.width), (True, model.ffn)):

            def real(m: Maker, tokens: int = size.tokens, width: int = width, gelu: bool = gelu) -> Arguments:
                return {"x": m.tensor(tokens, width), "gelu": gelu}

            name = f"{model.name} {size.name} {width}{' gelu' if gelu else ''}"
            yield Case("quantise_rows", name, real, real=True, bytes=(HALF + 1) * size.tokens * width)


def linear_fp8_cases() -> Iterator[Case]:
    """Widths that are no multiple of a tile; with and without bias, GELU before it; transposed; in 8 bits already."""

    def arguments(m: Maker, rows: int, length: int, width: int, outs: int, gelu: bool, bias: bool) -> Arguments:
        return {
            "x": m.tensor(rows, length, width),
            "weight_fp8": m.tensor(outs, width, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn),
            "weight_scale": m.gain(outs).abs() * (0.01 * width**-0.5),
            "bias": m.tensor(outs) if bias else None,
            "gelu": gelu,
        }

    for rows, length, width, outs, gelu, bias in (
        (1, 7, 33, 50, False, True), (2, 70, 160, 130, False, False), (0, 4, 16, 16, False, True),
        (1, 130, 96, 136, True, True),
    ):  # fmt: skip

        def make(
            m: Maker, rows: int = rows, length: int = length, width: int = width, outs: int = outs, gelu: bool = gelu,
            bias: bool = bias,
        ) -> Arguments:  # fmt: skip
            return arguments(m, rows, length, width, outs, gelu, bias)

        yield Case("linear_fp8", f"{rows}x{length}x{width} to {outs} gelu {gelu} bias {bias}", make)

    def transposed(m: Maker) -> Arguments:
        return arguments(m, 2, 9, 32, 40, False, True) | {"x": m.tensor(9, 2, 32).transpose(0, 1)}

    def given(m: Maker) -> Arguments:
        made = arguments(m, 2, 9, 32, 40, False, True)
        codes = m.tensor(9, 2, 32, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn).transpose(0, 1)
        return made | {"x": codes, "x_scale": m.gain(9, 2).abs().T, "dtype": m.dtype}

    yield Case("linear_fp8", "transposed", transposed)
    yield Case("linear_fp8", "rows in 8 bits", given)
    for model, size in REAL:
        for gelu, (width, outs) in ((False, (model.width, model.ffn)), (True, (model.ffn, model.width))):

            def real(
                m: Maker, tokens: int = size.tokens, width: int = width, outs: int = outs, gelu: bool = gelu
            ) -> Arguments:
                return arguments(m, 1, tokens, width, outs, gelu, True)

            moved = HALF * size.tokens * (width + outs) + width * outs
            name = f"{model.name} {size.name} {width} to {outs}"
            work = 2 * size.tokens * width * outs
            yield Case("linear_fp8", name, real, real=True, bytes=moved, flops=work)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "modulate": modulate_cases,
    "modulate_fp8": modulate_fp8_cases,
    "gate_residual": gate_residual_cases,
    "gate_residual_modulate": gate_residual_modulate_cases,
    "gate_residual_modulate_fp8": gate_residual_modulate_fp8_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "norm_silu": norm_silu_cases,
    "causal_conv3d": causal_conv3d_cases,
    "attention": attention_cases,
    "attention_fp8": attention_fp8_cases,
    "mlp": mlp_cases,
    "quantise_rows": quantise_rows_cases,
    "linear_fp8": linear_fp8_cases,
}


def cases(operation: str | None = None, *, real: bool | None = None) -> list[Case]:
    """Return the cases of an operation (of all where None), the small or the real ones (both where None)."""
    names = [operation] if operation else list(CASES)
    return [case for name in names for case in CASES[name]() if real is None or case.real == real]
