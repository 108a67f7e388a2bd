"""A quality -> what is given up for it, steps and bits, by what was measured of the model; nothing on a guess.

`python -m runtime calibrate` (runtime/rungs.py) measures; this file reads what it wrote and chooses. The planner's
calibration of the machine, runtime/calibration.py, is another thing: it measures seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime import precision
from runtime.caches import EXACT, Line, Moments, Savings, Skips
from runtime.engines.store import cache_root
from runtime.model import Model
from runtime.receipt import Receipt
from runtime.request import Request
from runtime.samplers import Past

FILE = "quality.json"
FORMAT = 1

# What holds for a model that was not calibrated, by its number of steps: after the first part of them, of the rest
# every other is computed, and the last. On the built-in model that keeps 54 to 59 dB with 18 to 20 of 25 steps computed
# (7 videos at its own size); what another keeps nobody has measured, so the floor is far below.
TABLE_FLOOR = 32.0
TABLE_STEPS = 16  # fewer are too far apart to be predicted without having looked
TABLE_COMPUTED = 0.4
TABLE_ERROR = 0.1  # of a velocity's size; a prediction that is worse stops the skipping


class Unusable(Exception):
    """A calibration file that is damaged or of another format."""


@dataclass(frozen=True)
class Setting:
    """What a calibration holds for: the same model, size, schedule and guidance."""

    weights: str
    width: int
    height: int
    frames: int
    steps: int
    shift: float
    sampler: str
    guidance: float
    guidance_2: float | None
    sigmas: tuple[float, ...] | None = None  # where they were given
    boundary: float | None = None  # between two experts

    @classmethod
    def of(cls, model: Model, request: Request) -> Setting:
        """Return the setting of a resolved request."""
        assert request.width and request.height and request.num_frames and request.steps and request.sampler
        assert request.shift is not None and request.guidance is not None
        second = None if request.guidance_2 is None else float(request.guidance_2)
        height, width = model.spec.canvas(request.height, request.width)
        return cls(
            model.fingerprint, width, height, request.num_frames, request.steps, float(request.shift),
            request.sampler, float(request.guidance), second, request.sigmas, request.boundary,
        )  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """One way to save, and what it was measured to do on prompts and seeds of its own.

    `floor` is what 95 % of videos keep, `psnr` and `ssim` are means; seconds are of a whole request, and those of the
    exact one stand beside them in the calibration.
    """

    computed: tuple[int, ...]  # steps that the network is asked at
    order: int  # velocities that a prediction uses
    floor: float  # dB
    psnr: float  # dB
    ssim: float
    seconds: float
    bound: float  # the guard's: times the expected error
    fp8: int = 0  # so many layers are in 8 bits, the first ones of the calibration's ranking

    def estimate(self, ratio: float) -> float:
        """Return the PSNR in dB to expect where predictions were `ratio` times as wrong as expected."""
        return self.psnr - 20 * float(np.log10(max(ratio, 1.0)))


@dataclass(frozen=True)
class Calibrated:
    """What was measured of one setting: moments of its trajectories, and rungs from the fastest to the finest."""

    setting: Setting
    moments: tuple[tuple[float, ...], ...]  # [steps, steps], see caches.Moments
    rungs: tuple[Rung, ...]
    exact_seconds: float
    device: str
    dtype: str
    prompts: int  # whose trajectories were seen
    held_out: int  # others, on which the rungs were measured
    created: str
    ranking: tuple[tuple[str, float], ...] = ()  # (layer, dB that a step keeps with it alone in 8 bits), best first
    fp8: tuple[Rung, ...] = ()  # what more and more of these layers cost with all steps computed

    def savings(self, rung: Rung, model: Model) -> Savings:
        """Return a rung's way to save on a loaded model; of layers in 8 bits only those that it was loaded with, where
        others would gain nothing: fewer keep no less."""
        layers = first_layers(self.ranking, rung.fp8)
        if model.memory is not None or not precision.gains(model.device):
            layers &= model.narrow_layers
        if len(rung.computed) == self.setting.steps:
            return Savings(None, layers)
        moments = Moments(np.array(self.moments), rung.order)
        return Savings(Skips(frozenset(rung.computed), moments, rung.order, rung.bound), layers)

    def usable(self, model: Model) -> list[Rung]:
        """Return the rungs that a loaded model can take, the fastest first: layers in 8 bits, which are held beside the
        full ones, need a device that gains by them, an engine that runs them, weights that stay, and no budget of
        memory; weights in 8 bits alone need all that have weights so."""
        if model.precision == "fp8":
            both = (*self.rungs, *self.fp8)
            return [rung for rung in both if model.narrow_layers <= first_layers(self.ranking, rung.fp8)]
        able = precision.gains(model.device) and model.engine in precision.ENGINES and model.offload.blocks is None
        able = able and model.memory is None and {name for name, _ in self.ranking} <= set(model.fp8_layers)
        return [rung for rung in self.rungs if able or not rung.fp8]


def first_layers(ranking: Sequence[tuple[str, float]], count: int) -> frozenset[str]:
    """Return the names of the first layers of a ranking."""
    return frozenset(name for name, _ in ranking[:count])


@dataclass(frozen=True)
class Choice:
    """What is done for a request's quality; `said` goes on the receipt."""

    savings: Savings
    said: dict[str, Any]
    notes: tuple[str, ...] = ()
    rung: Rung | None = None


def check(model: Model, request: Request) -> None:
    """Raise ValueError for a request to be made exactly by a model whose weights are in 8 bits alone."""
    if model.precision == "fp8" and request.quality == "exact":
        raise ValueError(
            "quality is 'exact', and the model was loaded with its weights in 8 bits, which is not exact; ask for "
            "another: --quality high, fast or a floor in dB, or load it with --precision full"
        )


def choose(model: Model, request: Request, sigmas: torch.Tensor, *, plain: bool) -> Choice | None:
    """Return what to save on a schedule `sigmas` [steps + 1] of a resolved request; None where it asks for exact.

    `plain` tells that each step is taken once, from noise, with nothing turned; else nothing is saved. A budget that
    nothing is known to keep runs exact, and says so; weights that are in 8 bits alone compute every step then.
    """
    if request.quality == "exact":
        return None
    basis, made = "exact", "made exactly"
    if model.precision == "fp8":
        basis, made = model.precision, "made with all steps, its weights in 8 bits"
    said = {"asked": request.quality, "floor": request.floor, "basis": basis, "steps": len(sigmas) - 1}
    if not plain:
        return Choice(EXACT, said, (f"quality {request.quality}: this task is {made}; steps are not skipped in it",))
    known, notes = find(model, Setting.of(model, request))
    if known is not None and request.task == "text":
        said |= {"calibrated": known.created, "device": known.device, "dtype": known.dtype}
        rungs = known.usable(model)
        rung = next((rung for rung in rungs if rung.floor >= request.floor), None)
        if rung is None:
            best = f"the best is calibrated to {max(rung.floor for rung in rungs):.1f}" if rungs else "none is measured"
            return Choice(EXACT, said, (*notes, (
                f"quality {request.quality}: no way to save time keeps {request.floor:g} dB ({best}); the video is "
                f"{made}"
            )))  # fmt: skip
        notes = (*notes, *foreign(known, rung, model))
        return Choice(known.savings(rung, model), said | {"basis": "calibrated", "rung": measured(rung)}, notes, rung)
    if request.sigmas is not None:
        return Choice(EXACT, said, (*notes, (
            f"quality {request.quality}: the schedule is of {len(sigmas) - 1} given levels, too far apart for one step "
            f"to be predicted from another; the video is {made}"
        )))  # fmt: skip
    if request.floor > TABLE_FLOOR or len(sigmas) - 1 < TABLE_STEPS:
        return Choice(EXACT, said, (*notes, (
            f"quality {request.quality}: the model was not calibrated for this request, and without that no more than "
            f"{TABLE_FLOOR:g} dB and no fewer than {TABLE_STEPS} steps are dared; the video is {made}. Calibrate it "
            "with: python -m runtime calibrate"
        )))  # fmt: skip
    note = (
        f"quality {request.quality}: the model was not calibrated for this request; a built-in table for any model "
        "skips few steps, and its floor was not measured here. Calibrate it with: python -m runtime calibrate"
    )
    skips = table(sigmas.tolist(), request.boundary)
    return Choice(Savings(skips), said | {"basis": "table"}, (*notes, note))


def foreign(known: Calibrated, rung: Rung, model: Model) -> tuple[str, ...]:
    """Return a note where layers in 8 bits were not measured on this device with products in 8 bits."""
    if not rung.fp8 or known.device == device_name(model.device) != "cpu":
        return ()
    simulated = ", simulated," if known.device == "cpu" else ""
    return (f"what layers in 8 bits keep was measured on {known.device}{simulated} and not on a GPU of this kind",)


def computed_steps(model: Model, request: Request) -> int | None:
    """Return how many steps of a resolved request are computed where each is taken once, from noise; None: all."""
    if request.quality == "exact":
        return None
    choice = choose(model, request, request.schedule(model.spec), plain=True)
    return None if choice is None or choice.savings.skips is None else len(choice.savings.skips.computed)


def account(receipt: Receipt, choice: Choice, past: Past | None) -> None:
    """Put on the receipt what became of a choice in one window, at whose end sampling remembered `past`."""
    receipt.notes += [note for note in choice.notes if note not in receipt.notes]
    said = receipt.quality = receipt.quality or choice.said | {"windows": []}
    steps = choice.said["steps"]
    window: dict[str, Any] = {"computed": steps}
    right = f"calibrated to keep {choice.rung.floor:.1f} dB" if choice.rung else "by the table for any model"
    lines = []
    if choice.savings.skips is not None and past is not None:
        ratio = (past.ratios / past.checks) ** 0.5 if past.checks else 1.0
        window = {"computed": past.count, "forced": past.forced, "error_ratio": ratio}
        lines.append(f"{steps - past.count} of {steps} steps predicted, {right}")
    if choice.rung is not None:
        window["estimated_psnr"] = choice.rung.estimate(window.get("error_ratio", 1.0))
    if choice.savings.fp8:
        lines.append(f"{len(choice.savings.fp8)} layers in fp8, {right}")
    receipt.approximations += [line for line in lines if line not in receipt.approximations]
    said["windows"].append(window)


def told(said: dict[str, Any]) -> str:
    """Return what a receipt says of quality in one line."""
    parts = [f"{said['asked']}, {said['basis']}"]
    if said.get("windows"):
        parts.append(f"{sum(w['computed'] for w in said['windows'])} of {said['steps'] * len(said['windows'])} steps")
    if estimates := [w["estimated_psnr"] for w in said.get("windows", ()) if "estimated_psnr" in w]:
        parts.append(f"estimated {min(estimates):.1f} dB")
    if "measured" in said:
        likeness = said["measured"]["frame_ssim"]
        parts.append(f"measured {said['measured']['psnr']:.1f} dB, SSIM {sum(likeness) / len(likeness):.4f}")
    return ", ".join(parts)


def measured(rung: Rung) -> dict[str, Any]:
    """Return what a receipt says of a rung."""
    return {name: value for name, value in asdict(rung).items() if name not in ("computed", "order")}


def table(sigmas: list[float], boundary: float | None) -> Skips:
    """Return the conservative way to skip steps of a schedule, for any model; an expert's first two are computed."""
    steps = len(sigmas) - 1
    first = round(TABLE_COMPUTED * steps)
    computed = {*range(first), *range(first, steps, 2), steps - 1}
    if boundary is not None:
        turn = next((k for k in range(steps) if sigmas[k] < boundary), steps)
        computed |= {turn, turn + 1}
    return Skips(frozenset(computed), Line(sigmas, TABLE_ERROR), order=2, bound=1.0)


def files(model: Model) -> tuple[Path, Path]:
    """Return where a model's calibrations may lie: beside it, and in the store."""
    name = model.fingerprint.replace(":", "-")
    return model.checkpoint.folder / FILE, cache_root() / "quality" / f"{name}.json"


def find(model: Model, setting: Setting) -> tuple[Calibrated | None, tuple[str, ...]]:
    """Return the calibration of a setting, of this device and the newest where there are more, and warnings of files
    that are ignored. One of another device tells the same of steps; its layers in 8 bits count where they gain time."""
    found: list[Calibrated] = []
    notes: list[str] = []
    for file in files(model):
        try:
            found += [entry for entry in read(file) if entry.setting == setting]
        except Unusable as error:
            notes.append(str(error))
    here = device_name(model.device)
    return max(found, key=lambda entry: (entry.device == here, entry.created), default=None), tuple(notes)


def device_name(device: torch.device) -> str:
    """Return what a calibration calls a device: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def read(file: Path) -> list[Calibrated]:
    """Return the calibrations in a file, none where there is no file; Unusable where it is damaged."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        if given["format"] != FORMAT:
            raise ValueError(f"its format is {given['format']!r}, and {FORMAT} is read")
        return [entry_of(entry) for entry in given["calibrations"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Unusable(f"the calibration {file} is ignored: it is damaged or of another version ({reason})") from error


def entry_of(given: dict[str, Any]) -> Calibrated:
    """Return a calibration of its JSON; ValueError, KeyError or TypeError where that does not hold together."""
    setting = Setting(**given["setting"])
    if setting.sigmas is not None:
        setting = replace(setting, sigmas=tuple(setting.sigmas))
    moments = np.array(given["moments"], dtype=float)
    if moments.shape != (setting.steps, setting.steps) or not np.isfinite(moments).all():
        raise ValueError(f"the moments of {setting.steps} steps have shape {list(moments.shape)} or are not finite")
    rungs, fp8 = (
        tuple(Rung(**rung | {"computed": tuple(rung["computed"])}) for rung in found)
        for found in (given["rungs"], given.get("fp8", ()))
    )
    ranking = tuple((str(name), float(decibel)) for name, decibel in given.get("ranking", ()))
    for rung in (*rungs, *fp8):
        numbers = rung.floor, rung.psnr, rung.ssim, rung.seconds, rung.bound
        if not np.isfinite(np.array(numbers, dtype=float)).all() or rung.order not in (1, 2):
            raise ValueError(f"a rung has the numbers {numbers} and the order {rung.order}")
        if not all(isinstance(step, int) and 0 <= step < setting.steps for step in rung.computed) or not rung.computed:
            raise ValueError(f"a rung computes the steps {list(rung.computed)} of {setting.steps}")
        if not 0 <= rung.fp8 <= len(ranking):
            raise ValueError(f"a rung has {rung.fp8} layers in 8 bits, and {len(ranking)} are ranked")
    rest = {name: given[name] for name in ("exact_seconds", "device", "dtype", "prompts", "held_out", "created")}
    return Calibrated(setting, tuple(map(tuple, moments.tolist())), rungs, **rest, ranking=ranking, fp8=fp8)


def write(model: Model, entry: Calibrated) -> Path:
    """Keep a calibration beside the model, or in the store where that cannot be written; return the file.

    An older one of the same setting and device is replaced.
    """
    beside, stored = files(model)
    for file in (beside, stored):
        try:
            key = entry.setting, entry.device
            others = [old for old in read(file) if (old.setting, old.device) != key]
        except Unusable:
            others = []
        rows = [json.dumps(asdict(each)) for each in (*others, entry)]
        text = f'{{"format": {FORMAT}, "calibrations": [\n' + ",\n".join(map(spread, rows)) + "\n]}\n"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f".{file.name}.unfinished")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(file)
        except OSError:
            if file == stored:
                raise
        else:
            return file
    raise AssertionError("unreachable")


def spread(row: str) -> str:
    """Return a calibration's JSON with a line for each part, so that it can be read."""
    for mark in ('"setting"', '"moments"', '"rungs"', '"exact_seconds"', '"ranking"', '"fp8": ['):
        row = row.replace(mark, f"\n {mark}")
    return row.replace('{"computed"', '\n  {"computed"').replace("], [", "],\n  [")
