"""The arithmetic, bytes and memory of Wan's autoencoder: its layers walked once, chunk by chunk, without tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from runtime.models.costs import Operation, Work, attention, convolution, linear, sweep
from runtime.models.wan.vae import VAEConfig

KEPT_FRAMES = 2  # that a convolution with three taps in time remembers of its input
DISTINCT = 4  # chunks that differ in how many of their taps see only zeros: the first few

Cells = tuple[int, int]


class Walk:
    """Collects operations, kept frames and the largest number of live values while a network is walked."""

    def __init__(self, chunks: int, itemsize: int, published: bool) -> None:
        known = range(min(chunks, DISTINCT))
        self.chunks = [(i, 1 if i < known[-1] else chunks - known[-1]) for i in known]
        self.itemsize, self.published = itemsize, published
        self.operations: list[Operation] = []
        self.copies = 1  # of the part that is walked: tiles of one size
        self.several = chunks > 1
        self.kept = 0  # bytes in the history, of all tiles
        self.most = 0  # bytes that are live at once beside it

    def sizes(self, frames: int, skip_first: bool = False) -> Iterator[tuple[int, int, int]]:
        """Yield (how many chunks, frames of each, frames of the stream before it)."""
        for index, count in self.chunks:
            if index == 0 and not skip_first:
                yield count, 1, 0
            elif index:
                yield count, frames, (index - 1) * frames + (not skip_first)

    def causal(
        self, cells: Cells, frames: int, widths: tuple[int, int], taps: tuple[int, int], skip_first: bool = False
    ) -> None:
        """A convolution of taps (time, picture) to `frames` frames of `cells` per chunk, with its norm's sweep."""
        pixels = cells[0] * cells[1]
        for count, many, before in self.sizes(frames, skip_first):
            seen = taps[0] * many
            if not self.published:  # frames before the clip are zero, and skipped
                seen = sum(min(taps[0], before + j + 1) for j in range(many))
            made = convolution("convolution", many * pixels, taps[1] * seen / many, *widths, self.itemsize)
            self.operations.append(made.times(count * self.copies))
        if taps[0] > 1:
            self.kept += (KEPT_FRAMES if self.several else 1) * pixels * widths[0] * self.itemsize * self.copies

    def each(self, frames: int, operation: Operation, skip_first: bool = False) -> None:
        """An operation that grows with the frames, given for `frames` of them."""
        for count, many, _ in self.sizes(frames, skip_first):
            share = many / frames
            part = Operation(operation.kind, operation.flops * share, operation.bytes * share, operation.scores * share)
            self.operations.append(part.times(operation.count * count * self.copies))

    def norm(self, cells: Cells, frames: int, width: int) -> None:
        """A norm with SiLU over `frames` frames."""
        self.each(frames, sweep("norm_silu", 2 * frames * cells[0] * cells[1] * width, self.itemsize))

    def hold(self, *numbers: int) -> None:
        """So many values are live at once."""
        self.most = max(self.most, sum(numbers) * self.itemsize)

    def residual(self, cells: Cells, frames: int, widths: tuple[int, int], held: int = 0) -> None:
        """A residual block; `held` values are live around it."""
        inputs, outputs = widths
        count = frames * cells[0] * cells[1]
        self.norm(cells, frames, inputs)
        self.causal(cells, frames, (inputs, outputs), (3, 9))
        if inputs != outputs:
            self.each(frames, linear(count, inputs, outputs, self.itemsize))
        self.norm(cells, frames, outputs)
        self.causal(cells, frames, (outputs, outputs), (3, 9))
        self.hold(held, count * (inputs + max(inputs, outputs) + outputs))  # input, normed, between or shortcut

    def middle(self, cells: Cells, width: int) -> None:
        """Residual block, attention within the frame, residual block."""
        pixels = cells[0] * cells[1]
        self.residual(cells, 1, (width, width))
        self.norm(cells, 1, width)
        self.each(1, linear(pixels, width, 3 * width, self.itemsize))
        self.each(1, attention(pixels, pixels, 1, width, self.itemsize))
        self.each(1, linear(pixels, width, width, self.itemsize))
        self.hold(pixels * width * 8)
        self.residual(cells, 1, (width, width))

    def work(self, *lasting: int) -> Work:
        """Return what was collected; `lasting` bytes are live throughout."""
        return Work(tuple(self.operations), self.kept + self.most + sum(lasting))


def decoder(
    config: VAEConfig, latents: tuple[int, int, int], cuts: Sequence[Cells], itemsize: int, published: bool
) -> Work:
    """Decoding latents [T, H, W], the part behind the trunk in tiles of so many cells (height, width)."""
    walk = Walk(latents[0], itemsize, published)
    cells = (latents[1], latents[2])
    base = config.decoder_base_dim or config.base_dim
    widths = [base * multiple for multiple in config.dim_mult[::-1]]
    walk.each(1, linear(cells[0] * cells[1], config.z_dim, config.z_dim, itemsize))
    walk.causal(cells, 1, (config.z_dim, widths[0]), (3, 9))
    walk.middle(cells, widths[0])
    for cut, walk.copies in Counter(cuts).items():
        _up(walk, config, cut, widths)
    time, down, across = config.stride
    pixels = time * cells[0] * down * cells[1] * across * 3
    return walk.work(pixels * (8 if len(cuts) > 1 else 4), cells[0] * cells[1] * widths[0] * itemsize)


def _up(walk: Walk, config: VAEConfig, cells: Cells, widths: Sequence[int]) -> None:
    levels, frames, width = len(widths) - 1, 1, widths[0]
    for i, out in enumerate(widths):
        pixels = cells[0] * cells[1]
        inputs = [width, *[out] * config.num_res_blocks]
        given = frames * pixels * width
        apart = width != out or (config.is_residual and i < levels)  # else results take the input's memory
        for number, each in enumerate(inputs):
            walk.residual(cells, frames, (each, out), given if number and apart else 0)
        if i < levels:
            doubled = config.temperal_downsample[levels - 1 - i]
            out_width = out if config.is_residual else out // 2
            before = given * apart + frames * pixels * out
            if doubled and walk.several:
                walk.causal(cells, frames, (out, 2 * out), (3, 1), skip_first=True)
                frames *= 2
                before += 2 * frames * pixels * out
            taps, grid = (9, 4 * pixels) if walk.published else (16, pixels)
            walk.each(frames, convolution("upsample", frames * grid, taps, out, out_width, walk.itemsize))
            cells, width = (2 * cells[0], 2 * cells[1]), out_width
            walk.hold(before, 4 * frames * pixels * out_width)
        else:
            width = out
    walk.norm(cells, frames, width)
    walk.causal(cells, frames, (width, config.out_channels), (3, 9))


def encoder(
    config: VAEConfig, latents: tuple[int, int, int], cuts: Sequence[Cells], itemsize: int, published: bool
) -> Work:
    """Encoding the clip of latents [T, H, W], the part before the trunk in tiles of so many cells (height, width)."""
    walk = Walk(latents[0], itemsize, published)
    cells = (latents[1], latents[2])
    widths = [config.base_dim * multiple for multiple in config.dim_mult]
    for cut, walk.copies in Counter(cuts).items():
        _down(walk, config, cut, widths)
    walk.copies = 1
    walk.middle(cells, widths[-1])
    walk.norm(cells, 1, widths[-1])
    walk.causal(cells, 1, (widths[-1], 2 * config.z_dim), (3, 9))
    walk.each(1, linear(cells[0] * cells[1], 2 * config.z_dim, 2 * config.z_dim, itemsize))
    time, down, across = config.stride
    return walk.work(3 * time * cells[0] * down * cells[1] * across * 3 * 4)


def _down(walk: Walk, config: VAEConfig, cells: Cells, widths: Sequence[int]) -> None:
    levels, width = len(widths) - 1, config.base_dim
    frames = config.stride[0] if walk.several else 1
    cells = (cells[0] * 2**levels, cells[1] * 2**levels)
    walk.causal(cells, frames, (config.in_channels, width), (3, 9))
    for i, out in enumerate(widths):
        given = frames * cells[0] * cells[1] * width
        apart = width != out or config.is_residual
        for number, each in enumerate([width, *[out] * (config.num_res_blocks - 1)]):
            walk.residual(cells, frames, (each, out), given if number and apart else 0)
        width = out
        if i < levels:
            full = frames * cells[0] * cells[1] * out
            cells = (cells[0] // 2, cells[1] // 2)
            halved = convolution("convolution", frames * cells[0] * cells[1], 9, out, out, walk.itemsize)
            walk.each(frames, halved)
            walk.hold(given * apart, 2 * full, full // 4)
            if config.temperal_downsample[i]:
                frames = max(frames // 2, 1)
                _halve_frames(walk, cells, frames, out)


def _halve_frames(walk: Walk, cells: Cells, frames: int, width: int) -> None:
    """The convolution of stride 2 in time: it remembers one frame, so that no tap ever sees zeros."""
    pixels = cells[0] * cells[1]
    walk.each(frames, convolution("convolution", frames * pixels, 3, width, width, walk.itemsize), skip_first=True)
    walk.kept += pixels * width * walk.itemsize * walk.copies
