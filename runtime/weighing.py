"""One request weighed on one machine: its work per stage, what fits, what is fastest, and the nearest that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from runtime.denoising import BATCHED_TOKENS
from runtime.machine import SLACK, Machine
from runtime.model import DTYPES, vae_dtype
from runtime.models.costs import Costs, Operation, Shape, Work
from runtime.models.spec import ModelSpec
from runtime.models.tiles import finer
from runtime.offload import Offload, choices
from runtime.prediction import GIB, STAGES, Prediction, counted
from runtime.request import Request

EIGHT_BITS = (8, 9)  # the compute capability from which there are products in 8 bits
Tile = tuple[int, int] | None  # (height, width) in pixels; None: the whole frame


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What holds besides the request: dtype's name and size, the budget in bytes, and what the user fixed."""

    dtype: str
    itemsize: int
    memory: int
    engine: str | None = None  # None: the planner chooses
    attention: str = "sdpa"
    offload: Offload | None = None  # None: the planner chooses
    tile: Tile = None  # None: the planner chooses
    text_tokens: tuple[int, ...] | None = None  # of each prompt; None: as many as the model takes
    text_known: bool = False  # the prompts' embeddings are in the cache, so that no encoder is loaded
    computed: int | None = None  # steps that the network is asked at; None: all
    encodes: bool = False  # known frames are encoded before the steps
    windowed: bool = False  # the request is one of several windows
    fp8: bool = (
        False  # the transformer's large layers are in 8 bits; their bytes are foreseen, their seconds on an ideal GPU
    )


class Job:
    """One resolved request on one machine, ready to be weighed."""

    def __init__(self, spec: ModelSpec, costs: Costs, request: Request, machine: Machine, setting: Setting) -> None:
        assert request.num_frames and request.height and request.width and request.steps is not None
        self.spec, self.costs, self.machine, self.setting = spec, costs, machine, setting
        self.width, self.height, self.steps = request.width, request.height, request.steps
        self.canvas = spec.canvas(self.height, self.width)
        self.computed = setting.computed or request.steps
        self.weights = costs.transformer.in_fp8() if setting.fp8 else costs.transformer
        self.frames = min(request.num_frames, request.window or request.num_frames)  # made at once
        self.latents = spec.latent_shape(self.frames, self.height, self.width)[1:]
        self.tokens = math.prod(n // p for n, p in zip(self.latents, spec.patch, strict=True))
        self.rows = 2 if max(request.guidance or 0.0, request.guidance_2 or 0.0) > 1 else 1
        self.batched = self.rows if self.tokens <= BATCHED_TOKENS else 1  # prompts in one pass
        self.experts = 1 if spec.boundary is None else 2
        self.published = machine.basis == "ideal"
        self._live: dict[Tile, dict[str, int]] = {}
        self._seconds: dict[Tile, dict[str, float]] = {}
        given = setting.text_tokens
        self.texts = (spec.text_length,) * self.rows if given is None or self.published else given[-self.rows :]

    def shape(self, rows: int, *, full: bool = False) -> Shape:
        """The shape of a pass over so many prompts; `full` text is padded, else its padding is folded into one."""
        text = self.spec.text_length if full else min(max(self.texts) + 1, self.spec.text_length)
        return Shape(latents=self.latents, text=text, rows=rows, itemsize=self.setting.itemsize)

    def text(self) -> Work:
        """All prompts."""
        if self.setting.text_known:
            return Work((), 0)
        works = [self.costs.text(tokens, self.setting.itemsize, published=self.published) for tokens in self.texts]
        return Work(tuple(op for work in works for op in work.operations), max(work.live for work in works))

    def step(self) -> Work:
        """One step: every prompt through one transformer."""
        if self.published:
            return _repeated(self.in_8_bits(self.costs.forward(self.shape(1, full=True), published=True)), self.rows)
        return _repeated(self.costs.forward(self.shape(self.batched)), self.rows // self.batched)

    def in_8_bits(self, forward: Work) -> Work:
        """One prompt's pass, half of the products spared that an ideal GPU takes in 8 bits, which is twice as fast."""
        if not self.setting.fp8 or self.machine.capability < EIGHT_BITS:
            return forward
        weights, _ = self.costs.transformer.may_be_fp8
        narrow = 2.0 * weights * self.costs.transformer.blocks * self.tokens
        return Work((*forward.operations, Operation("linear", -narrow / 2)), forward.live)

    def denoise(self) -> Work:
        """All steps that are computed, and what is projected before them."""
        steps = _repeated(self.step(), self.computed)
        if self.published:
            return steps
        projected = self.costs.project(self.shape(self.rows))
        return Work(
            (*steps.operations, *_repeated(projected, self.experts).operations), max(steps.live, projected.live)
        )

    def works(self, tile: Tile) -> dict[str, Work]:
        """Each stage's work."""
        clip = (self.latents, tile, self.vae_itemsize)
        return {
            "text": self.text(),
            "step": self.step(),
            "denoise": self.denoise(),
            "decode": self.costs.decode(*clip, published=self.published),
            "encode": self.costs.encode(*clip, published=self.published),
        }

    @property
    def vae_itemsize(self) -> int:
        """Bytes per number in the autoencoder."""
        device = torch.device("cpu" if self.machine.capability == (0, 0) else "cuda")
        return vae_dtype(device, DTYPES[self.setting.dtype]).itemsize

    def seconds(self, offload: Offload, tile: Tile) -> dict[str, float]:
        """Seconds of each stage and of the request; weights come while others compute, and cost what is not hidden."""
        size, weights = self.setting.itemsize, self.weights
        found = dict(self._plain_seconds(tile))
        if offload.text != "resident" and not self.setting.text_known:
            found["text"] += self.machine.transfer(self.costs.text_encoder.bytes(size))
        rest = found["denoise"] - self.computed * found["step"]
        coming = self.machine.transfer(offload.coming_bytes(weights, size)) * (self.rows // self.batched)
        found["step"] = max(found["step"], coming)
        found["denoise"] = rest + self.computed * found["step"]
        if offload.blocks is not None and self.experts > 1:  # each expert's blocks that stay come once
            staying = self.machine.transfer(min(offload.blocks, weights.blocks) * weights.block_bytes(size))
            found["denoise"] += self.experts * max(staying + coming - found["step"], 0.0)
        found["total"] = found["text"] + found["denoise"] + found["decode"] + found["encode"] * self.setting.encodes
        return found

    def _plain_seconds(self, tile: Tile) -> dict[str, float]:
        """Seconds of each stage where all weights are there."""
        if tile not in self._seconds:
            works = self.works(tile)
            self._seconds[tile] = {stage: self.machine.seconds(work, stage) for stage, work in works.items()}
        return self._seconds[tile]

    def peaks(self, offload: Offload, tile: Tile) -> dict[str, int]:
        """Peak memory of each stage in bytes."""
        size = self.setting.itemsize
        transformer = offload.transformer_bytes(self.weights, self.experts, size)
        always = transformer + self.costs.vae.bytes(self.vae_itemsize)
        text = 0 if self.setting.text_known else offload.text_bytes(self.costs.text_encoder, size)
        after = always + (text if offload.text == "resident" else 0)
        live = self.live(tile)
        return {
            stage: self.machine.resident(stage) + (always + text if stage == "text" else after) + live[stage]
            for stage in STAGES
        }

    def most(self, offload: Offload, tile: Tile) -> int:
        """The highest peak of the stages that are run, with some slack where there is no allocator's."""
        peaks = self.peaks(offload, tile)
        most = max(peak for stage, peak in peaks.items() if stage != "encode" or self.setting.encodes)
        return most if self.published else int(most * (1 + SLACK))

    def live(self, tile: Tile) -> dict[str, int]:
        """Bytes that each stage holds at once beside weights."""
        if tile not in self._live:
            clip, parked = (self.latents, tile, self.vae_itemsize), self.machine.capability != (0, 0)
            denoise = self.costs.forward(self.shape(self.batched)).live
            denoise += self.experts * self.costs.project(self.shape(self.rows)).live
            self._live[tile] = {
                "text": max(self.costs.text(tokens, self.setting.itemsize).live for tokens in self.texts),
                "step": denoise,
                "denoise": denoise,
                "decode": self.costs.decode(*clip, parked=parked).live,
                "encode": self.costs.encode(*clip, parked=parked).live,
            }
        return self._live[tile]


def _repeated(work: Work, count: float) -> Work:
    return Work(tuple(each.times(count) for each in work.operations), work.live)


def predict(spec: ModelSpec, costs: Costs, request: Request, machine: Machine, setting: Setting) -> Prediction:
    """Return what a resolved request takes, with the fastest choices that fit into the memory.

    Raises ValueError with the nearest request that fits where none does.
    """
    job = Job(spec, costs, request, machine, setting)
    found = fit(job)
    if found is None:
        raise ValueError(refusal(job, request))
    offload, tile = found
    works = job.works(tile)
    return Prediction(
        model=spec.name,
        machine=machine.name,
        basis=machine.basis,
        dtype=setting.dtype,
        width=job.width,
        height=job.height,
        canvas=job.canvas[::-1],
        frames=job.frames,
        steps=job.steps,
        guided=job.rows > 1,
        tokens=job.tokens,
        flops=count_flops(job, published=True),
        executed=count_flops(job, published=False),
        bytes={stage: work.bytes for stage, work in works.items()},
        seconds=job.seconds(offload, tile),
        peak_bytes=job.peaks(offload, tile),
        bound={stage: machine.bound(work, stage) for stage, work in works.items()},
        weights_bytes={
            "text_encoder": costs.text_encoder.bytes(setting.itemsize),
            "transformer": job.experts * job.weights.bytes(setting.itemsize),
            "vae": costs.vae.bytes(job.vae_itemsize),
        },
        memory=setting.memory,
        choices=describe(job, offload, tile),
        encoded=setting.encodes,
        notes=notes_of(job),
    )


def notes_of(job: Job) -> list[str]:
    """Return what the seconds of layers in 8 bits are: an assumption, or not foreseen."""
    if not job.setting.fp8:
        return []
    if job.published and job.machine.capability >= EIGHT_BITS:
        return ["linear layers in 8 bits are counted at twice the rate of 16 bits, which was not measured here"]
    return ["seconds are those of layers in 16 bits; what those in 8 take here is not foreseen"]


def fit(job: Job) -> tuple[Offload, Tile] | None:
    """Return the fastest way to hold the weights, and tiles, that keep the budget; None where none does.

    Of equally fast ones, the first: what stays on the device, and whole frames.
    """
    fitting = [
        (offload, tile)
        for tile in tile_choices(job)
        for offload in ways(job)
        if job.most(offload, tile) <= job.setting.memory
    ]
    return min(fitting, key=lambda way: job.seconds(*way)["total"], default=None)


def ways(job: Job) -> list[Offload]:
    """Return the ways to hold the weights: the user's alone, or all; in 8 bits no block comes and goes."""
    if job.setting.offload is not None:
        return [job.setting.offload]
    return [way for way in choices(job.weights, job.experts) if way.blocks is None or not job.setting.fp8]


def tile_choices(job: Job) -> list[Tile]:
    """Return the tiles (height, width) in pixels to try: the user's alone, or whole frames and then ever finer ones."""
    if job.setting.tile is not None:
        return [job.setting.tile]
    return [None, *finer(*job.canvas, job.costs.tile_of)]


def count_flops(job: Job, *, published: bool) -> dict[str, float]:
    """FLOPs of one prompt, one pass, all steps, decoding, encoding, and the whole request."""
    costs, tokens = job.costs, job.spec.text_length if published else max(job.texts)
    found = {
        "text": costs.text(tokens, 2).flops,
        "forward": costs.forward(job.shape(1, full=published), published=published).flops,
        "decode": costs.decode(job.latents, None, 2, published=published).flops,
        "encode": costs.encode(job.latents, None, 2, published=published).flops,
    }
    texts = found["text"] * job.rows if published else job.text().flops
    if published:
        found["denoise"] = job.rows * job.steps * found["forward"]
    else:
        passes = costs.forward(job.shape(job.batched)).flops * (job.rows // job.batched)
        projected = costs.project(job.shape(job.rows)).flops * job.experts
        found["denoise"] = projected + job.computed * passes
    found["total"] = texts + found["denoise"] + found["decode"] + found["encode"] * job.setting.encodes
    return found


def describe(job: Job, offload: Offload, tile: Tile) -> dict[str, Any]:
    """Return the choices by name."""
    blocks = job.costs.transformer.blocks
    transformer = "resident"
    if offload.blocks is not None:
        transformer = "swapped" if offload.blocks >= blocks else "streamed"
    replayed = job.machine.capability != (0, 0) and offload.blocks is None  # a GPU, and weights that stay in place
    return {
        "engine": job.setting.engine or ("cuda_graph" if replayed else "eager"),
        "attention": job.setting.attention,
        "offload": {
            "text_encoder": offload.text,
            "transformer": transformer,
            "blocks": offload.blocks,
        },
        "tiles": tile,
        "batched_guidance": job.batched > 1,
    }


def refusal(job: Job, request: Request) -> str:
    """Say what does not fit, and the nearest that does."""
    least = min(job.most(offload, tile) for offload in ways(job)[-1:] for tile in tile_choices(job))
    at_once = " at once" if job.setting.windowed else ""
    given = f"{job.width}x{job.height} with {counted(job.frames, 'frame')}{at_once} of {job.spec.name}"
    has = f"{job.setting.memory / GIB:.2f} GiB"
    remedies = [f"--{name} {text}" for name, text in nearest(job, request).items()]
    remedies.append(f"--memory {math.ceil(least / GIB * 100) / 100:.2f}GiB or more on a device that has it")
    return (
        f"{given} take at least {least / GIB:.2f} GiB on {job.machine.name}, and {has} may be used; "
        f"legal is what fits: take {', or '.join(remedies)}"
    )


def nearest(job: Job, request: Request) -> dict[str, str]:
    """Return the most frames that fit at this size, and the largest size of this shape with these frames."""

    def fits(**changes: Any) -> bool:
        other = Job(job.spec, job.costs, replace(request, **changes), job.machine, job.setting)
        return fit(other) is not None

    found = {}
    stride = job.spec.stride[0] * job.spec.patch[0]
    if (count := _last(lambda n: fits(num_frames=1 + n * stride), (job.frames - 1) // stride)) is not None:
        found["window" if job.setting.windowed else "frames"] = str(1 + count * stride)
    down, across = job.spec.size_multiple
    rows = job.canvas[0] // down

    def size(n: int) -> tuple[int, int]:
        return max(round(job.canvas[1] * (n + 1) / rows / across), 1) * across, (n + 1) * down

    def size_fits(n: int) -> bool:
        width, height = size(n)
        return fits(width=width, height=height)

    if (count := _last(size_fits, rows - 1)) is not None:
        found["size"] = "{}x{}".format(*size(count))
    return found


def _last(holds: Callable[[int], bool], stop: int) -> int | None:
    """Return the largest n below `stop` for which a falling condition holds; None where it does not for 0."""
    if stop < 1 or not holds(0):
        return None
    low, high = 0, stop
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
