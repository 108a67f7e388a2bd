"""Published models at their true size with random weights, on a GPU: a guided step and a decode, beside their floor.

Ours and diffusers, eager and compiled, are timed in turns in one process; then one more run of ours goes under
PyTorch's profiler: time per range, gaps, top kernels. What cannot be run is told with its reason; the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import runtime
from benchmarks import savings, sides, true_size
from benchmarks.compiled import Compiled, compiled_parts, laid_out
from benchmarks.machine import describe, keep, results_file
from benchmarks.measure import alternate
from benchmarks.profiled import floors, profiled
from benchmarks.published_report import sixteen_bits, table
from benchmarks.sides import Case, Diffusers, Ours, at_case
from runtime.machine import Gpu, peaks_of
from runtime.model import choose_device
from runtime.models import open_checkpoint
from runtime.models.costs import Shape
from runtime.models.spec import Transformer
from runtime.models.tiles import finer
from runtime.planner import plan_request
from runtime.precision import candidates, to_fp8, weighty
from runtime.request import Request

Call = Callable[[int], Any]
Version = tuple[Call, Callable[[], None]]  # and what is to be done before each call
SAMPLES = (2, 7)  # fewest and most of a version
SECONDS = 10.0  # for the samples of a part, all versions together
COMPILING = 60.0  # seconds that must be left for torch.compile to begin
FP8, ATTENTION_TOO = "ours, fp8", "ours, fp8, attention too"
TILED, COMPILED = "ours, in tiles", "diffusers, compiled"
QUALITIES = "qualities"  # a stage: whole requests of each quality
STEPS = 50  # of the schedule that the step is taken from


@dataclass(frozen=True)
class Part:
    """One stage of a published model at a published size; bars in seconds, of 16 bits and of 8, None for none."""

    name: str
    model: str
    stage: str  # step, decode or qualities
    width: int
    height: int
    frames: int = 81
    bar: float | None = None
    fp8_bar: float | None = None
    lengths: tuple[int, ...] = ()  # frames of the clips whose decodes' memory is compared; of the first what is kept


PARTS = {
    part.name: part
    for part in (
        Part("step-1.3b-480p", "wan2.1-t2v-1.3b", "step", 832, 480, bar=0.85),
        Part("decode-480p", "wan2.1-t2v-1.3b", "decode", 832, 480, bar=0.9, lengths=(17, 81, 321)),
        Part("decode-720p", "wan2.1-t2v-1.3b", "decode", 1280, 720, bar=2.0),
        Part("qualities-1.3b-480p", "wan2.1-t2v-1.3b", QUALITIES, 832, 480),
        Part("step-14b-480p", "wan2.1-t2v-14b", "step", 832, 480, bar=5.0, fp8_bar=3.9),
        Part("step-5b-704p", "wan2.2-ti2v-5b", "step", 1280, 704, 121),
    )
}


def add_command(commands: Any) -> None:
    """Add `published` to the command line."""
    parser = commands.add_parser("published", help="steps and decodes of published models at their true size, on a GPU")
    parser.set_defaults(run=run)
    parser.add_argument("--only", type=_parts, default=tuple(PARTS), help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--against", choices=["diffusers"], help="measure it in turns, eager and compiled")
    parser.add_argument("--profile", action="store_true", help="one more run of ours, profiled")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing more begins")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, cpu")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of a file of results")
    parser.add_argument("--json", type=Path, help="file of results")


def run(args: argparse.Namespace) -> None:
    """Measure part after part, write the results after each, print the table."""
    if args.show:
        print(table(json.loads(args.show.read_text(encoding="utf-8"))))
        return
    end = time.monotonic() + args.budget
    device = choose_device(args.device)
    machine = describe(device)
    file = args.json or results_file(machine)
    record: dict[str, Any] = {"benchmark": "published", "machine": machine, "parts": [], "left_out": []}
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        os.environ["DIT_RUNTIME_CACHE"] = str(Path(scratch) / "cache")  # the user's own is neither read nor filled
        chosen = [PARTS[name] for name in args.only]
        for model, group in itertools.groupby(chosen, key=lambda part: part.model):
            folder = Path(scratch) / model
            true_size.write_configs(folder, model)
            for found in measured(list(group), folder, device, args, end):
                if found not in record["parts"]:
                    record["parts"].append(found)
                keep(record, file)
    done = {found["name"] for found in record["parts"]}
    record["left_out"] = [part.name for part in chosen if part.name not in done]
    keep(record, file)
    print(f"{table(record)}\n\n{file}")


def measured(
    parts: Sequence[Part], folder: Path, device: torch.device, args: argparse.Namespace, end: float
) -> Iterator[dict[str, Any]]:
    """Yield what is measured of each part of one model, both sides loaded once; what it adds later is yielded again.

    What must be compiled comes last: nobody knows beforehand how long a compiler takes, and the time may end there.
    """
    ours: Ours | None = None
    theirs: Diffusers | None = None
    done: list[tuple[Part, dict[str, Any]]] = []
    for part in parts:
        if time.monotonic() > end:
            break
        say(f"{part.name}: loading")
        case = case_of(part, folder)
        found: dict[str, Any] = {"name": part.name, "floor": floor_of(part, device), "skipped": {}}
        found["bars"] = {"16 bits": part.bar, FP8: part.fp8_bar, ATTENTION_TOO: part.fp8_bar, TILED: None}
        if ours is None:
            ours = Ours(case, device)
            rivals = sides.rival(args.against)
            theirs = Diffusers(case, device, ours) if rivals else None
        at_case(ours, case)
        with tried(found, "all"):
            if part.stage == QUALITIES:
                found |= savings.measured(ours.by("cuda_graph"), say)
            else:
                calls, results = ready(versions(part, ours, theirs, found), part, found)
                found |= timed(calls, results, part.stage, end)
                done.append((part, found))
        yield found
        if part.stage != QUALITIES:
            yield from (found for _ in aside(part, ours, args, found, end))
        give_back()
    for part, found in done:
        if theirs is not None and ours is not None:
            if time.monotonic() + COMPILING < end:
                beside_compiled(part, ours, theirs, found, end)
            else:
                found["skipped"][COMPILED] = "too little time was left"
            yield found


def aside(part: Part, ours: Ours, args: argparse.Namespace, found: dict[str, Any], end: float) -> Iterator[None]:
    """Measure of our side alone where its time goes, and of a decode how near it is and what memory it takes."""
    if args.profile and time.monotonic() < end:
        with tried(found, "profile"):
            say(f"{part.name}: profile")
            call = {"step": ours.step, "decode": decode_rounded(ours)}[part.stage]
            found["profile"] = vars(profiled(lambda: call(0)))
            found["floors"] = floors_of(part, ours, ours.device)
        yield
    if part.lengths and time.monotonic() < end:
        with tried(found, "beside float32"):
            say(f"{part.name}: beside float32")
            with torch.inference_mode():  # of a short clip: float32 has no matrix units
                found["psnr"] = ours.bfloat16_psnr(1 + (part.lengths[0] - 1) // ours.case.spec.stride[0])
        yield
        if ours.device.type == "cuda" and time.monotonic() < end:
            with tried(found, "memory"):
                say(f"{part.name}: memory of {part.lengths} frames")
                found["peaks"] = {count: decode_peak(ours, count) for count in part.lengths}
        yield


def beside_compiled(part: Part, ours: Ours, theirs: Diffusers, found: dict[str, Any], end: float) -> None:
    """Measure diffusers compiled, in turns with diffusers as written and the fastest of ours, whose numbers are new."""
    case = case_of(part, ours.case.folder)
    at_case(ours, case)
    medians = {name: statistics.median(found["seconds"][name]) for name in sixteen_bits(found)}
    with tried(found, COMPILED):
        compiled = Compiled(compiled_parts(part.stage, theirs)[1])
        best = min(medians, key=medians.__getitem__)
        calls = versions(part, ours, theirs, found, {best, Diffusers.name})
        plain = calls.get(Diffusers.name, (theirs.step if part.stage == "step" else theirs.decode, None))[0]
        calls |= {Diffusers.name: (plain, compiled.off), COMPILED: (plain, compiled.on)}
        calls, results = ready(calls, part, found)
        if COMPILED in calls:
            for key, values in timed(calls, results, part.stage, end).items():
                found[key] |= values
        compiled.off()
    give_back()


def case_of(part: Part, folder: Path) -> Case:
    """Return what is asked of a folder's model for a part."""
    spec = open_checkpoint(folder).spec
    asked = Request(prompt="as the take says", seed=7, width=part.width, height=part.height, num_frames=part.frames,
                    steps=STEPS).resolved(spec)  # fmt: skip
    return Case(folder, spec, asked, "bfloat16", "eager", random=True)


def gpu_of(device: torch.device) -> Gpu | None:
    """Return the peaks of a known GPU."""
    return peaks_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def floor_of(part: Part, device: torch.device) -> float | None:
    """Return the least seconds by the planner's arithmetic and traffic at a known GPU's peaks."""
    if (gpu := gpu_of(device)) is None:
        return None
    size: dict[str, Any] = {"width": part.width, "height": part.height, "num_frames": part.frames}
    if part.stage == QUALITIES:
        return plan_request(part.model, gpu=gpu.name, steps=savings.calibrated().setting.steps, **size).seconds["total"]
    return plan_request(part.model, gpu=gpu.name, **size).seconds[part.stage]


def floors_of(part: Part, ours: Ours, device: torch.device) -> dict[str, float]:
    """Return the least seconds of what a part's profile shows; empty for a GPU that is not known."""
    if (gpu := gpu_of(device)) is None:
        return {}
    latents = ours.case.shape[1:]
    if part.stage == "decode":
        return floors(gpu, ours.model.costs.decode_ranges(latents, torch.bfloat16.itemsize))
    rows, keys = ours.step_inputs[2].experts[0].keys[0].shape[:2]
    return floors(gpu, ours.model.costs.ranges(Shape(latents=latents, text=keys, rows=rows)))


def versions(
    part: Part, ours: Ours, theirs: Diffusers | None, found: dict[str, Any], wanted: Collection[str] | None = None
) -> dict[str, Version]:
    """Return the versions by name (None: all), but for the compiled one."""
    makers: dict[str, Callable[[], Call]] = {}
    if part.stage == "step":
        makers |= {f"ours, {engine}": partial(engine_step, ours, engine) for engine in ("eager", "cuda_graph")}
        made: list[dict[str, nn.Module]] = [{} for _ in ours.model.transformers]
        makers[FP8] = lambda: in_fp8(ours, weighty, made).step
        makers[ATTENTION_TOO] = lambda: in_fp8(ours, candidates, made).step
    else:
        makers["ours"] = lambda: decode_rounded(ours)
        tile = next(finer(*ours.case.spec.canvas(part.height, part.width), ours.model.vae.tile_of), None)
        if tile is not None:
            makers[TILED] = lambda: decode_rounded(ours, tile)
    if theirs is not None:
        at_case(theirs, ours.case)
        with torch.no_grad():
            laid_out(compiled_parts(part.stage, theirs)[0], part.stage)
        makers[Diffusers.name] = lambda: theirs.step if part.stage == "step" else theirs.decode
    calls: dict[str, Version] = {}
    for name, make in makers.items():
        if wanted is None or name in wanted:
            with tried(found, name):  # on a smaller GPU there is no room for 8 bits beside 16
                calls[name] = (make(), lambda: None)
    return calls


def engine_step(ours: Ours, engine: str) -> Call:
    """Return a step by an engine."""
    return ours.by(engine).step


def ready(
    calls: dict[str, Version], part: Part, found: dict[str, Any]
) -> tuple[dict[str, Version], dict[str, tuple[Any, float]]]:
    """Return those that run, after two calls each, and (result, seconds) of the second: the first compiles kernels,
    the second records a graph."""
    kept, results = {}, {}
    for name, (call, before) in calls.items():
        with tried(found, name):
            say(f"{part.name}: {name}")
            for _ in range(2):
                before()
                began = time.monotonic()
                result = call(0)
                result = result if isinstance(result, np.ndarray) else result.float().cpu().numpy()
                results[name] = result, time.monotonic() - began
            kept[name] = call, before
    return kept, results


def timed(
    calls: dict[str, Version], results: dict[str, tuple[Any, float]], stage: str, end: float
) -> dict[str, dict[str, Any]]:
    """Return seconds of each version, taken in turns, and how far their results are from the first one's."""
    once = sum(results[name][1] for name in calls)
    seconds_left = min(SECONDS, max(end - time.monotonic(), 0.0))
    takes = range(max(SAMPLES[0], min(SAMPLES[1], int(seconds_left / max(once, 1e-6)))))

    def prepared(call: Call, before: Callable[[], None]) -> Call:
        def sample(take: int) -> Any:
            before()
            return call(take)

        return sample

    seconds = alternate([prepared(*each) for each in calls.values()], list(takes))
    first = next((results[name][0] for name in calls), np.empty(0))
    return {
        "seconds": dict(zip(calls, seconds, strict=True)),
        "difference": {name: apart(first, results[name][0], stage) for name in calls},
    }


def apart(a: np.ndarray, b: np.ndarray, stage: str) -> float:
    """Return how far two results are apart: of a step relative to its size, of frames in dB (PSNR)."""
    a, b = (each.astype(np.float32) for each in (a, b))
    error = float(np.sqrt(np.mean((a - b) ** 2)))
    if stage == "step":
        return error / float(np.sqrt(np.mean(a**2)))
    return 20 * math.log10(255 / error) if error else math.inf


def in_fp8(side: Ours, layers: Callable[[Transformer], Sequence[str]], made: Sequence[dict[str, nn.Module]]) -> Ours:
    """Return the same with some layers of each transformer in 8 bits; `made` shares those that were quantised."""
    other = side.by("cuda_graph")
    pairs = zip(other.model.transformers, made, strict=True)
    other.model.transformers = tuple(to_fp8(network, layers(network), own) for network, own in pairs)
    return other


def decode_rounded(side: Ours, tile: tuple[int, int] | None = None) -> Call:
    """Return the decode in bfloat16, in tiles where a tile is given."""
    return lambda take: side.decode_bfloat16(take, tile)


def decode_peak(side: Ours, frames: int) -> int:
    """Return the bytes that a decode of so many frames takes of the GPU beside what was there."""
    asked = side.case.request
    assert asked.height and asked.width
    latents = torch.randn(1, *side.case.spec.latent_shape(frames, asked.height, asked.width))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(side.device)
    before = torch.cuda.memory_allocated(side.device)
    for _ in runtime.decode(side.model, latents, dtype="bfloat16"):
        pass
    return torch.cuda.max_memory_allocated(side.device) - before


def give_back() -> None:
    """Return what nothing uses any more to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def tried(found: dict[str, Any], name: str) -> Iterator[None]:
    """Let the rest go on where something fails, and tell why it did."""
    try:
        yield
    except Exception as error:  # of a library, a compiler, or the device's memory
        found["skipped"][name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        give_back()


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)


def _parts(given: str) -> tuple[str, ...]:
    names = tuple(given.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: legal are {', '.join(PARTS)}, joined by commas")
    return names
