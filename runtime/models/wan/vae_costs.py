"""The arithmetic, bytes and memory of Wan's autoencoder: its layers walked once, chunk by chunk, without tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from runtime.models.costs import Operation, Work, attention, convolution, linear, sweep
from runtime.models.wan.vae import FRAMES_PER_TILE
from runtime.models.wan.vae_config import VAEConfig
from runtime.models.wan.vae_networks import WHOLE_LEVELS

KEPT_FRAMES = 2  # that a convolution with three taps in time remembers of its input
DISTINCT = 4  # chunks that differ in how many of their taps see only zeros: the first few

Cells = tuple[int, int]


class Walk:
    """Collects operations, kept frames and the largest number of live values while a network is walked."""

    def __init__(self, chunks: int, itemsize: int, published: bool) -> None:
        known = range(min(chunks, DISTINCT))
        self.chunks = [(i, 1 if i < known[-1] else chunks - known[-1]) for i in known]
        self.itemsize, self.published = itemsize, published
        self.ranges: dict[str, list[Operation]] = {}
        self.range = ""  # that operations are counted in
        self.copies = 1  # of the part that is walked: tiles of one size
        self.several = chunks > 1
        self.single = 1  # frames that are remembered of a clip's only chunk
        self.kept = 0  # bytes in the history, of all tiles
        self.most = 0  # bytes that are live at once beside it

    def sizes(self, frames: int, skip_first: bool = False) -> Iterator[tuple[int, int, int]]:
        """Yield (how many chunks, frames of each, frames of the stream before it)."""
        for index, count in self.chunks:
            if index == 0 and not skip_first:
                yield count, 1, 0
            elif index:
                yield count, frames, (index - 1) * frames + (not skip_first)

    def add(self, operation: Operation) -> None:
        """Count an operation."""
        self.ranges.setdefault(self.range, []).append(operation)

    def causal(
        self, cells: Cells, frames: int, widths: tuple[int, int], taps: tuple[int, int], skip_first: bool = False
    ) -> None:
        """A convolution of taps (time, picture) to `frames` frames of `cells` per chunk, and what it remembers."""
        pixels = cells[0] * cells[1]
        for count, many, before in self.sizes(frames, skip_first):
            seen = taps[0] * many
            if not self.published:  # frames before the clip are zero, and skipped
                seen = sum(min(taps[0], before + j + 1) for j in range(many))
            made = convolution("convolution", many * pixels, taps[1] * seen / many, *widths, self.itemsize)
            self.add(made.times(count * self.copies))
            if not self.published:
                self.add(sweep("pass", 2 * KEPT_FRAMES * pixels * widths[0], self.itemsize, count * self.copies))
        if taps[0] > 1:
            self.kept += (
                (KEPT_FRAMES if self.several else self.single) * pixels * widths[0] * self.itemsize * self.copies
            )

    def each(self, frames: int, operation: Operation, skip_first: bool = False) -> None:
        """An operation that grows with the frames, given for `frames` of them."""
        for count, many, _ in self.sizes(frames, skip_first):
            self.add(operation.share(many / frames).times(count * self.copies))

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

    def over(self, cuts: Sequence[Cells], parked: bool) -> Iterator[Cells]:
        """Yield each size of tiles, with `copies` as many as there are; of parked histories one alone takes memory."""
        others, largest = self.kept, 0
        for cut, self.copies in Counter(cuts).items():
            yield cut
            largest = max(largest, (self.kept - others) // self.copies)
            if parked and len(cuts) > 1:
                self.kept = others
            else:
                others, largest = self.kept, 0
        self.copies = 1
        self.kept += largest

    def work(self, *lasting: int) -> Work:
        """Return what was collected; `lasting` bytes are live throughout."""
        return Work(tuple(chain.from_iterable(self.ranges.values())), self.kept + self.most + sum(lasting))


def decoder(
    config: VAEConfig, latents: tuple[int, int, int], cuts: Sequence[Cells], itemsize: int, published: bool,
    parked: bool,
) -> tuple[Work, dict[str, list[Operation]]]:  # fmt: skip
    """Decoding latents [T, H, W], the part behind the trunk in tiles of so many cells (height, width); by range too."""
    walk = Walk(latents[0], itemsize, published)
    walk.single = 0  # the last chunk leaves nothing to be remembered
    cells = (latents[1], latents[2])
    base = config.decoder_base_dim or config.base_dim
    widths = [base * multiple for multiple in config.dim_mult[::-1]]
    levels = range(len(widths))
    walk.each(1, linear(cells[0] * cells[1], config.z_dim, config.z_dim, itemsize))
    walk.range = "decode/middle"
    walk.causal(cells, 1, (config.z_dim, widths[0]), (3, 9))
    walk.middle(cells, widths[0])
    grown, frames, width = _up(walk, config, levels[:WHOLE_LEVELS], (cells, 1, widths[0]))
    scale = grown[0] // cells[0]
    for cut in walk.over(cuts, parked):
        _up(walk, config, levels[WHOLE_LEVELS:], ((cut[0] * scale, cut[1] * scale), frames, width))
    time, down, across = config.stride
    pixels = time * cells[0] * down * cells[1] * across * 3
    waiting = FRAMES_PER_TILE if parked and len(cuts) > 1 else 1
    trunk = waiting * frames * grown[0] * grown[1] * width * itemsize
    return walk.work(pixels * (8 if len(cuts) > 1 and not parked else 4), trunk), walk.ranges


def _up(walk: Walk, config: VAEConfig, levels: Sequence[int], given: tuple[Cells, int, int]) -> tuple[Cells, int, int]:
    """Walk some levels of the decoder from (cells, frames, width) on; return what the next level is given."""
    cells, frames, width = given
    base = config.decoder_base_dim or config.base_dim
    last = len(config.dim_mult) - 1
    for i in levels:
        out = base * config.dim_mult[last - i]
        pixels = cells[0] * cells[1]
        inputs = [width, *[out] * config.num_res_blocks]
        taken = frames * pixels * width
        walk.range = f"decode/up_{i}"
        apart = width != out or (config.is_residual and i < last)  # else results take the input's memory
        for number, each in enumerate(inputs):
            walk.residual(cells, frames, (each, out), taken if number and apart else 0)
        width = out
        if i < last:
            doubled = config.temperal_downsample[last - 1 - i]
            width = out if config.is_residual else out // 2
            walk.range = f"decode/up_{i}/upsample"
            before = taken * apart + frames * pixels * out
            if doubled and walk.several:
                walk.causal(cells, frames, (out, 2 * out), (3, 1), skip_first=True)
                frames *= 2
                before += 2 * frames * pixels * out
            taps, grid = (9, 4 * pixels) if walk.published else (16, pixels)
            walk.each(frames, convolution("upsample", frames * grid, taps, out, width, walk.itemsize))
            cells = (2 * cells[0], 2 * cells[1])
            walk.hold(before, 4 * frames * pixels * width)
        else:
            walk.range = "decode/head"
            walk.norm(cells, frames, width)
            walk.causal(cells, frames, (width, config.out_channels), (3, 9))
    return cells, frames, width


def encoder(
    config: VAEConfig, latents: tuple[int, int, int], cuts: Sequence[Cells], itemsize: int, published: bool,
    parked: bool,
) -> Work:  # fmt: skip
    """Encoding the clip of latents [T, H, W], the part before the trunk in tiles of so many cells (height, width)."""
    walk = Walk(latents[0], itemsize, published)
    cells = (latents[1], latents[2])
    widths = [config.base_dim * multiple for multiple in config.dim_mult]
    levels = range(len(widths))
    scale, frames = 2 ** levels[-1], config.stride[0] if walk.several else 1
    grown, left, width = cells, frames, config.base_dim
    for cut in walk.over(cuts, parked):
        pixels = (cut[0] * scale, cut[1] * scale)
        walk.causal(pixels, frames, (config.in_channels, config.base_dim), (3, 9))
        made, left, width = _down(walk, config, levels[:-WHOLE_LEVELS], (pixels, frames, config.base_dim))
        grown = (cells[0] * made[0] // cut[0], cells[1] * made[1] // cut[1])
    _down(walk, config, levels[-WHOLE_LEVELS:], (grown, left, width))
    walk.middle(cells, widths[-1])
    walk.norm(cells, 1, widths[-1])
    walk.causal(cells, 1, (widths[-1], 2 * config.z_dim), (3, 9))
    walk.each(1, linear(cells[0] * cells[1], 2 * config.z_dim, 2 * config.z_dim, itemsize))
    time, down, across = config.stride
    waiting = FRAMES_PER_TILE if parked and len(cuts) > 1 else 1
    return walk.work((2 + waiting) * time * cells[0] * down * cells[1] * across * 3 * 4)


def _down(
    walk: Walk, config: VAEConfig, levels: Sequence[int], given: tuple[Cells, int, int]
) -> tuple[Cells, int, int]:
    """Walk some levels of the encoder from (pixels, frames, width) on; return what the next level is given."""
    cells, frames, width = given
    for i in levels:
        out = config.base_dim * config.dim_mult[i]
        taken = frames * cells[0] * cells[1] * width
        apart = width != out or config.is_residual
        for number, each in enumerate([width, *[out] * (config.num_res_blocks - 1)]):
            walk.residual(cells, frames, (each, out), taken if number and apart else 0)
        width = out
        if i < len(config.dim_mult) - 1:
            full = frames * cells[0] * cells[1] * out
            cells = (cells[0] // 2, cells[1] // 2)
            halved = convolution("convolution", frames * cells[0] * cells[1], 9, out, out, walk.itemsize)
            walk.each(frames, halved)
            walk.hold(taken * apart, 2 * full, full // 4)
            if config.temperal_downsample[i]:
                frames = max(frames // 2, 1)
                _halve_frames(walk, cells, frames, out)
    return cells, frames, width


def _halve_frames(walk: Walk, cells: Cells, frames: int, width: int) -> None:
    """The convolution of stride 2 in time: it remembers one frame, so that no tap ever sees zeros."""
    pixels = cells[0] * cells[1]
    walk.each(frames, convolution("convolution", frames * pixels, 3, width, width, walk.itemsize), skip_first=True)
    walk.kept += pixels * width * walk.itemsize * walk.copies
