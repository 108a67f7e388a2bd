"""What a request will take, told before it runs: FLOPs, bytes, peak memory and seconds per stage; and what to choose.

Nothing of the weights is read. Seconds on a GPU by name are ideal: published arithmetic and traffic at the device's
peaks. On this machine they come from its calibration and from what this runtime executes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import torch

from runtime.budget import computed_steps
from runtime.calibration import Effort, compare, local
from runtime.denoising import RESAMPLE
from runtime.kernels.attention import Call, choose
from runtime.kernels.tuning import slug
from runtime.machine import GPUS, Machine
from runtime.model import Loading, Model, choose_device, choose_dtype, load, locate
from runtime.models import open_checkpoint, published, published_names
from runtime.models.costs import Costs
from runtime.models.spec import ModelSpec
from runtime.offload import Offload
from runtime.prediction import GIB, Prediction, summed
from runtime.receipt import Receipt
from runtime.request import Request
from runtime.tasks import Plan, Window, plan_task
from runtime.text import embeddings_known
from runtime.weighing import Setting, Tile, predict

LONG = 0.5  # seconds of steps from which what only a process's first request pays is no large part of them
WORD_TOKENS = 1.4  # text tokens per word, where a prompt has not been cut into tokens yet
UNLIMITED = 2**62  # bytes


class Terms(TypedDict):
    """What a window's prediction is told of the whole request: fields of Setting."""

    encodes: bool
    windowed: bool


def plan_request(
    name: str,
    *,
    gpu: str | None = None,
    memory: str | None = None,
    dtype: str = "auto",
    tile: Tile = None,
    precision: str = "full",
    anew: bool = False,
    **asked: Any,
) -> Prediction:
    """Predict a request, `asked` as in Request, for a model by name or folder, on a GPU by name or on this machine.

    A published name in lower case needs nothing on disk. This machine is calibrated where it was not, or `anew`. Raises
    ValueError for unknown names and what cannot fit.
    """
    spec, costs = find_model(name)
    # Which picture or clip a model goes on from makes no difference to what that takes.
    free = replace(spec, conditioning="blend") if spec.conditioning == "channels" else spec
    request = Request(prompt="as long as may be", seed=0, **asked).resolved(free)
    device = choose_device("auto" if gpu is None else "cpu") if gpu in (None, "cpu") else None
    if device is not None:
        kind = choose_dtype(dtype, device)
        here = local(device, kind, "anew" if anew else "whole")
        assert here is not None  # it is measured where it was not
        machine: Machine = here
    elif anew:
        raise ValueError(f"this machine is to be measured anew, and gpu is {gpu!r}; legal: no gpu, or cpu")
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
        fp8=precision == "fp8",
    )

    def once(alone: Request, terms: Terms) -> Prediction:
        return predict(spec, costs, alone, machine, replace(setting, **terms))

    return over_windows(spec, request, plan_task(request, free), once)


def foresee(model: Model, request: Request, plan: Plan, effort: Effort = "none") -> Prediction | None:
    """Predict a resolved request and its plan on a loaded model; None where its device has not been calibrated.

    `effort` says how it is calibrated then. Raises ValueError where the request does not fit into the model's memory
    budget.
    """
    machine = local(model.device, model.dtype, effort)
    if machine is None:
        return None

    def once(alone: Request, terms: Terms) -> Prediction:
        setting = setting_of(model.spec, model.costs, alone, machine, model.dtype, model.engine)
        setting = replace(
            setting, memory=model.memory or UNLIMITED, offload=model.offload, tile=model.tile, **terms,
            text_known=embeddings_known(model, alone), computed=computed_steps(model, alone),
            fp8=model.precision == "fp8",
        )  # fmt: skip
        found = predict(model.spec, model.costs, alone, machine, setting)
        return found if model.memory else replace(found, memory=machine.memory)

    return over_windows(model.spec, request, plan, once)


def over_windows(
    spec: ModelSpec, request: Request, plan: Plan, once: Callable[[Request, Terms], Prediction]
) -> Prediction:
    """Return the prediction of a plan: FLOPs, traffic and seconds of all windows, memory of the largest.

    `once` predicts the request of one window, and is told whether known frames are encoded for any, and whether there
    are others.
    """
    alike: dict[tuple[Any, ...], Prediction] = {}
    texts = set[str]()
    parts: list[tuple[Prediction, dict[str, float]]] = []
    shares = [encoded_share(spec, window) for window in plan.windows]
    terms: Terms = {"encodes": any(shares), "windowed": len(plan.windows) > 1}
    for window, encoded in zip(plan.windows, shares, strict=True):
        prompt = request.prompt if window.prompt is None else window.prompt
        frames = 1 + (window.shape[1] - 1) * spec.stride[0]
        exact = window.start < 1 or window.periodic or (encoded > 0 and spec.conditioning == "blend")
        kind = window.shape, prompt, exact
        if kind not in alike:
            alone = replace(request, storyboard=(), prompt=prompt, num_frames=frames, window=frames)
            alike[kind] = once(replace(alone, quality="exact") if exact else alone, terms)
        times = {"text": float(prompt not in texts), "denoise": passes_share(spec, request, window), "decode": 1.0}
        parts.append((alike[kind], times | {"encode": encoded if terms["encodes"] else 1.0}))
        texts.add(prompt)
    return summed(parts, plan.num_frames)


def passes_share(spec: ModelSpec, request: Request, window: Window) -> float:
    """Return how many times all steps of a request are taken in a window: those above its start are left out, and
    where known frames are blended in, each but the last is repeated."""
    assert request.steps is not None
    steps = len(request.schedule(spec, window.start)) - 1
    firm = window.tail > 0 or any(given.hold == 1 for given in window.given)
    rounds = (request.resample or RESAMPLE) if firm and spec.conditioning == "blend" else 1
    return (rounds * (steps - 1) + 1) / request.steps


def encoded_share(spec: ModelSpec, window: Window) -> float:
    """Return how much of a window's frames is encoded before it is sampled; all where channels tell of them."""
    if spec.conditioning in ("channels", "control"):
        return 1.0
    frames = 1 + (window.shape[1] - 1) * spec.stride[0]
    return min((sum(given.count for given in window.given) + window.tail) / frames, 1.0)


def learn(model: Model, receipt: Receipt) -> None:
    """Hold what the steps of a plain request took against what was foreseen of them, where both count the same.

    A note in the receipt says so where that drops the machine's calibration.
    """
    steps, foreseen = receipt.stages.get("denoise/step"), receipt.predicted
    if foreseen is None or steps is None or receipt.approximations or model.engine != "eager":
        return
    seconds = foreseen["seconds"]["denoise"]
    whole = steps.calls == receipt.request["steps"]  # not resumed
    if whole and seconds >= LONG and compare(model.device, model.dtype, receipt.stages["denoise"].seconds / seconds):
        receipt.notes.append("the last requests all took otherwise than foreseen; this machine will be measured anew")


def load_within(name: str, request: Request, *, memory: str, **how: Unpack[Loading]) -> Model:
    """Load a model so that a request, and all smaller ones, keep a budget of memory such as "12GiB".

    `how` is what `load` takes; the planner chooses which weights stay on the device, unless `offload` says it. Raises
    ValueError with the nearest request that fits where this one does not; larger ones are refused by `generate`.
    """
    place = choose_device(how.get("device", "auto"))
    kind = choose_dtype(how.get("dtype", "auto"), place)
    checkpoint = open_checkpoint(locate(name))
    spec, costs = checkpoint.spec, checkpoint.costs()
    machine = local(place, kind)
    assert machine is not None  # it is measured where it was not
    resolved, budget = request.resolved(spec), parse_bytes(memory)

    def once(alone: Request, terms: Terms) -> Prediction:
        setting = setting_of(spec, costs, alone, machine, kind, how.get("engine", "eager"))
        setting = replace(
            setting, memory=budget, offload=how.get("offload"), fp8=how.get("precision") == "fp8", **terms
        )
        return predict(spec, costs, alone, machine, setting)

    found = over_windows(spec, resolved, plan_task(resolved, spec), once).choices
    how["offload"] = Offload(found["offload"]["text_encoder"], found["offload"]["blocks"])
    model = load(name, **how)
    return replace(model, memory=budget, tile=found["tiles"])


def setting_of(
    spec: ModelSpec, costs: Costs, request: Request, machine: Machine, dtype: torch.dtype, engine: str
) -> Setting:
    """Return what holds for a request on this machine; its prompts' tokens are guessed from their words."""
    words = (len(text.split()) for text in (request.negative_prompt, request.prompt))
    return Setting(
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        memory=machine.memory,
        engine=engine,
        attention=attention_core(machine, spec, costs, request, dtype),
        text_tokens=tuple(min(round(WORD_TOKENS * count) + 1, spec.text_length) for count in words),
    )


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
    return choose(call, slug(machine.name))


def parse_bytes(text: str) -> int:
    """Return bytes of a text such as 24GiB, 800MiB, 12GB or 12 (GiB); ValueError for anything else."""
    units = {"": GIB, "gib": GIB, "mib": 2**20, "gb": 10**9, "mb": 10**6, "g": GIB, "m": 2**20}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or float(match[1]) <= 0:
        raise ValueError(f"memory is {text!r}; legal: a number with GiB, MiB, GB or MB, such as 24GiB")
    return int(float(match[1]) * units[match[2]])
