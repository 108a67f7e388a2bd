"""What a request will take, told before it runs: FLOPs, bytes, peak memory and seconds per stage; and what to choose.

Nothing of the weights is read. Seconds on a GPU by name are ideal: published arithmetic and traffic at the device's
peaks. On this machine they come from its calibration and from what this runtime executes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from runtime.calibration import local
from runtime.denoising import BATCHED_TOKENS
from runtime.kernels.attention import Call, choose
from runtime.machine import GPUS, Machine
from runtime.model import Model, choose_device, choose_dtype, locate
from runtime.models import open_checkpoint, published, published_names
from runtime.models.costs import Costs, Shape, Work
from runtime.models.spec import ModelSpec
from runtime.offload import Offload, choices
from runtime.prediction import GIB, STAGES, Prediction
from runtime.request import Request

PARTS = (1, 2, 4, 8)  # how finely a frame is cut for the autoencoder
WORD_TOKENS = 1.4  # text tokens per word, where a prompt has not been cut into tokens yet
Tile = tuple[int, int] | None  # (height, width) in pixels; None: the whole frame

VAE_ITEMSIZE = 4  # the autoencoder computes in float32, as published


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What holds besides the request: dtype's name and size, the budget in bytes, and what the user fixed."""

    dtype: str
    itemsize: int
    memory: int
    engine: str = "eager"
    attention: str = "sdpa"
    offload: Offload | None = None  # None: the planner chooses
    tile: Tile = None  # None: the planner chooses
    text_tokens: tuple[int, ...] | None = None  # of each prompt; None: as many as the model takes


def plan_request(
    name: str,
    *,
    gpu: str | None = None,
    memory: str | None = None,
    dtype: str = "auto",
    tile: Tile = None,
    **asked: Any,
) -> Prediction:
    """Predict a request, `asked` as in Request, for a model by name or folder, on a GPU by name or on this machine.

    A published name in lower case needs nothing on disk. Raises ValueError for unknown names and what cannot fit.
    """
    spec, costs = find_model(name)
    request = Request(prompt="as long as may be", seed=0, **asked).resolved(spec)
    device = choose_device("auto" if gpu is None else "cpu") if gpu in (None, "cpu") else None
    if device is not None:
        kind = choose_dtype(dtype, device)
        here = local(device, kind)
        assert here is not None  # it is measured where it was not
        machine: Machine = here
    elif gpu in GPUS:
        kind, machine = choose_dtype("bfloat16" if dtype == "auto" else dtype, torch.device("cpu")), GPUS[gpu]
    else:
        raise ValueError(f"gpu is {gpu!r}; legal: {', '.join(GPUS)}, cpu")
    setting = Setting(
        dtype=str(kind).removeprefix("torch."),
        itemsize=kind.itemsize,
        memory=machine.memory if memory is None else parse_bytes(memory),
        attention=attention_core(machine, spec, costs, request, kind),
        tile=tile,
    )
    return predict(spec, costs, request, machine, setting)


def foresee(model: Model, request: Request, *, measure: bool = False) -> Prediction | None:
    """Predict a resolved request on a loaded model; None where its device has not been calibrated.

    `measure` calibrates it then. Raises ValueError where the request does not fit into the model's memory budget.
    """
    machine = local(model.device, model.dtype, measure=measure)
    if machine is None:
        return None
    texts = (request.negative_prompt, request.prompt)
    setting = Setting(
        dtype=str(model.dtype).removeprefix("torch."),
        itemsize=model.dtype.itemsize,
        memory=model.memory or machine.memory,
        engine=model.engine,
        attention=attention_core(machine, model.spec, model.costs, request, model.dtype),
        offload=model.offload,
        text_tokens=tuple(min(round(WORD_TOKENS * len(text.split())) + 1, model.spec.text_length) for text in texts),
    )
    return predict(model.spec, model.costs, request, machine, setting)


def find_model(name: str) -> tuple[ModelSpec, Costs]:
    """Return facts and formulas of a model: on disk or in the cache, else by its published name alone."""
    try:
        checkpoint = open_checkpoint(locate(name))
    except FileNotFoundError:
        found = published(name)
        if found is None:
            raise FileNotFoundError(
                f"there is no model {name!r} on disk, and it is no published name; legal without weights: "
                f"{', '.join(published_names())}"
            ) from None
        return found
    return checkpoint.spec, checkpoint.costs()


def attention_core(machine: Machine, spec: ModelSpec, costs: Costs, request: Request, dtype: torch.dtype) -> str:
    """Return the core that attention among the video tokens takes there."""
    if machine.capability == (0, 0):
        return "sdpa"
    heads, size = costs.heads
    assert request.num_frames and request.height and request.width
    latents = spec.latent_shape(request.num_frames, request.height, request.width)[1:]
    length = math.prod(n // p for n, p in zip(latents, spec.patch, strict=True))
    call = Call(1, length, length, heads, size, dtype, False, machine.capability)
    return choose(call, f"nvidia-{machine.name}")


class Job:
    """One resolved request on one machine, ready to be weighed."""

    def __init__(self, spec: ModelSpec, costs: Costs, request: Request, machine: Machine, setting: Setting) -> None:
        assert request.num_frames and request.height and request.width and request.steps is not None
        self.spec, self.costs, self.machine, self.setting = spec, costs, machine, setting
        self.width, self.height, self.frames, self.steps = (
            request.width, request.height, request.num_frames, request.steps,
        )  # fmt: skip
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
        works = [self.costs.text(tokens, self.setting.itemsize) for tokens in self.texts]
        return Work(tuple(op for work in works for op in work.operations), max(work.live for work in works))

    def step(self) -> Work:
        """One step: every prompt through one transformer."""
        if self.published:
            return _repeated(self.costs.forward(self.shape(1, full=True), published=True), self.rows)
        return _repeated(self.costs.forward(self.shape(self.batched)), self.rows // self.batched)

    def denoise(self) -> Work:
        """All steps, and what is projected before them."""
        steps = _repeated(self.step(), self.steps)
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
        """Bytes per number in the autoencoder; ideal times and bytes are those of 16 bits."""
        return self.setting.itemsize if self.published else VAE_ITEMSIZE

    def seconds(self, offload: Offload, tile: Tile) -> dict[str, float]:
        """Seconds of each stage and of the request; weights come while others compute, and cost what is not hidden."""
        size, weights = self.setting.itemsize, self.costs.transformer
        found = dict(self._plain_seconds(tile))
        if offload.text != "resident":
            found["text"] += self.machine.transfer(self.costs.text_encoder.bytes(size))
        rest = found["denoise"] - self.steps * found["step"]
        coming = self.machine.transfer(offload.coming_bytes(weights, size)) * (self.rows // self.batched)
        found["step"] = max(found["step"], coming)
        found["denoise"] = rest + self.steps * found["step"]
        if offload.blocks is not None and self.experts > 1:  # each expert's blocks that stay come once
            staying = self.machine.transfer(min(offload.blocks, weights.blocks) * weights.block_bytes(size))
            found["denoise"] += self.experts * max(staying + coming - found["step"], 0.0)
        found["total"] = found["text"] + found["denoise"] + found["decode"]
        return found

    def _plain_seconds(self, tile: Tile) -> dict[str, float]:
        """Seconds of each stage where all weights are there."""
        if tile not in self._seconds:
            self._seconds[tile] = {stage: self.machine.seconds(work) for stage, work in self.works(tile).items()}
        return self._seconds[tile]

    def peaks(self, offload: Offload, tile: Tile) -> dict[str, int]:
        """Peak memory of each stage in bytes."""
        size = self.setting.itemsize
        transformer = offload.transformer_bytes(self.costs.transformer, self.experts, size)
        always = transformer + self.costs.vae.bytes(VAE_ITEMSIZE)
        text = offload.text_bytes(self.costs.text_encoder, size)
        after = always + (text if offload.text == "resident" else 0)
        live = self.live(tile)
        return {
            stage: self.machine.resident(stage) + (always + text if stage == "text" else after) + live[stage]
            for stage in STAGES
        }

    def most(self, offload: Offload, tile: Tile) -> int:
        """The highest peak of a request without a clip to encode."""
        return max(peak for stage, peak in self.peaks(offload, tile).items() if stage != "encode")

    def live(self, tile: Tile) -> dict[str, int]:
        """Bytes that each stage holds at once beside weights."""
        if tile not in self._live:
            clip = (self.latents, tile, VAE_ITEMSIZE)
            denoise = self.costs.forward(self.shape(self.batched)).live
            denoise += self.experts * self.costs.project(self.shape(self.rows)).live
            self._live[tile] = {
                "text": max(self.costs.text(tokens, self.setting.itemsize).live for tokens in self.texts),
                "step": denoise,
                "denoise": denoise,
                "decode": self.costs.decode(*clip).live,
                "encode": self.costs.encode(*clip).live,
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
        frames=job.frames,
        steps=job.steps,
        guided=job.rows > 1,
        tokens=job.tokens,
        flops=count_flops(job, published=True),
        executed=count_flops(job, published=False),
        bytes={stage: work.bytes for stage, work in works.items()},
        seconds=job.seconds(offload, tile),
        peak_bytes=job.peaks(offload, tile),
        bound={stage: machine.bound(work) for stage, work in works.items()},
        weights_bytes={
            "text_encoder": costs.text_encoder.bytes(setting.itemsize),
            "transformer": job.experts * costs.transformer.bytes(setting.itemsize),
            "vae": costs.vae.bytes(VAE_ITEMSIZE),
        },
        memory=setting.memory,
        choices=describe(job, offload, tile),
    )


def fit(job: Job) -> tuple[Offload, Tile] | None:
    """Return the fastest way to hold the weights, and tiles, that keep the budget; None where none does.

    Of equally fast ones, the first: what stays on the device, and whole frames.
    """
    ways = choices(job.costs.transformer, job.experts) if job.setting.offload is None else [job.setting.offload]
    fitting = [
        (offload, tile)
        for tile in tile_choices(job)
        for offload in ways
        if job.most(offload, tile) <= job.setting.memory
    ]
    return min(fitting, key=lambda way: job.seconds(*way)["total"], default=None)


def tile_choices(job: Job) -> list[Tile]:
    """Return the tiles (height, width) in pixels to try: the user's alone, or whole frames and then ever finer ones."""
    if job.setting.tile is not None:
        return [job.setting.tile]
    tiles: list[Tile] = [None]
    last = job.height * job.width
    for parts in PARTS[1:]:
        tile = job.costs.tile_of(job.height, job.width, parts)
        if tile[0] * tile[1] < 0.8 * last:  # else halo eats what cutting saves
            tiles.append(tile)
            last = tile[0] * tile[1]
    return tiles


def count_flops(job: Job, *, published: bool) -> dict[str, float]:
    """FLOPs of one prompt, one pass, decoding, encoding, and the whole request."""
    costs, tokens = job.costs, job.spec.text_length if published else max(job.texts)
    found = {
        "text": costs.text(tokens, 2).flops,
        "forward": costs.forward(job.shape(1, full=published), published=published).flops,
        "decode": costs.decode(job.latents, None, 2, published=published).flops,
        "encode": costs.encode(job.latents, None, 2, published=published).flops,
    }
    if published:
        found["total"] = job.rows * (found["text"] + job.steps * found["forward"]) + found["decode"]
    else:
        passes = costs.forward(job.shape(job.batched)).flops * (job.rows // job.batched)
        projected = costs.project(job.shape(job.rows)).flops * job.experts
        found["total"] = job.text().flops + projected + job.steps * passes + found["decode"]
    return found


def describe(job: Job, offload: Offload, tile: Tile) -> dict[str, Any]:
    """Return the choices by name."""
    blocks = job.costs.transformer.blocks
    transformer = "resident"
    if offload.blocks is not None:
        transformer = "swapped" if offload.blocks >= blocks else "streamed"
    return {
        "engine": job.setting.engine,
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
    least = min(
        job.most(offload, tile)
        for offload in choices(job.costs.transformer, job.experts)[-1:]
        for tile in tile_choices(job)
    )
    given = f"{job.width}x{job.height} with {job.frames} frames of {job.spec.name}"
    has = f"{job.setting.memory / GIB:.2f} GiB"
    ways = [f"--{name} {text}" for name, text in nearest(job, request).items()]
    ways.append(f"--memory {math.ceil(least / GIB * 100) / 100:.2f}GiB or more on a device that has it")
    return (
        f"{given} take at least {least / GIB:.2f} GiB on {job.machine.name}, and {has} may be used; "
        f"legal is what fits: take {', or '.join(ways)}"
    )


def nearest(job: Job, request: Request) -> dict[str, str]:
    """Return the most frames that fit at this size, and the largest size of this shape with these frames."""

    def fits(**changes: Any) -> bool:
        other = Job(job.spec, job.costs, replace(request, **changes), job.machine, job.setting)
        return fit(other) is not None

    found = {}
    stride = job.spec.stride[0] * job.spec.patch[0]
    if (count := _last(lambda n: fits(num_frames=1 + n * stride), (job.frames - 1) // stride)) is not None:
        found["frames"] = str(1 + count * stride)
    down, across = job.spec.size_multiple
    rows = job.height // down

    def size(n: int) -> tuple[int, int]:
        return max(round(job.width * (n + 1) / rows / across), 1) * across, (n + 1) * down

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


def parse_bytes(text: str) -> int:
    """Return bytes of a text such as 24GiB, 800MiB, 12GB or 12 (GiB); ValueError for anything else."""
    units = {"": GIB, "gib": GIB, "mib": 2**20, "gb": 10**9, "mb": 10**6, "g": GIB, "m": 2**20}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or float(match[1]) <= 0:
        raise ValueError(f"memory is {text!r}; legal: a number with GiB, MiB, GB or MB, such as 24GiB")
    return int(float(match[1]) * units[match[2]])
