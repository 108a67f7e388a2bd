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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import runtime
from benchmarks import sides, true_size
from benchmarks.compiled import Compiled, compiled_parts, laid_out
from benchmarks.machine import describe, keep, results_file, told
from benchmarks.measure import PSNR_LIMIT, alternate
from benchmarks.profiled import Profile, floors, profiled
from benchmarks.sides import Case, Diffusers, Ours
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
SECONDS = 15.0  # for the samples of a part, all versions together
COMPILING = 60.0  # seconds that must be left for torch.compile to begin
METHOD = (
    "Random weights of the published sizes, bfloat16, versions in turns. A step asks both prompts; a decode ends with "
    "bytes in the host's memory. Apart: steps relative, frames in dB."
)
FP8, ATTENTION_TOO = "ours, fp8", "ours, fp8, attention too"
TILED, COMPILED = "ours, in tiles", "diffusers, compiled"
LENGTHS = (17, 81, 321)  # frames of the clips whose decodes' memory is compared
STEPS = 50  # of the schedule that the step is taken from


@dataclass(frozen=True)
class Part:
    """One stage of a published model at a published size; bars in seconds, of 16 bits and of 8, None for none."""

    name: str
    model: str
    stage: str  # step or decode
    width: int
    height: int
    frames: int = 81
    bar: float | None = None
    fp8_bar: float | None = None


PARTS = {
    part.name: part
    for part in (
        Part("step-1.3b-480p", "wan2.1-t2v-1.3b", "step", 832, 480, bar=0.85),
        Part("decode-480p", "wan2.1-t2v-1.3b", "decode", 832, 480, bar=0.9),
        Part("decode-720p", "wan2.1-t2v-1.3b", "decode", 1280, 720, bar=2.0),
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
    """Yield what is measured of each part of one model, both sides loaded once."""
    ours: Ours | None = None
    theirs: Diffusers | None = None
    for part in parts:
        if time.monotonic() > end:
            return
        say(f"{part.name}: loading")
        case = case_of(part, folder)
        found: dict[str, Any] = {"name": part.name, "floor": floor_of(part, device), "skipped": {}}
        found["bars"] = {"16 bits": part.bar, FP8: part.fp8_bar, ATTENTION_TOO: part.fp8_bar, TILED: None}
        if ours is None:
            ours = Ours(case, device)
            rivals = sides.rival(args.against)
            theirs = Diffusers(case, device, ours) if rivals else None
        at_case(ours, case)
        if theirs is not None:
            at_case(theirs, case)
        compiled = None if theirs is None else Compiled(compiled_parts(part.stage, theirs)[1])
        calls: dict[str, Version] = {}
        with tried(found, "all"):
            calls = ready(versions(part, ours, theirs, compiled, found), part, found)
            found |= timed(calls, part.stage, end)
        yield found  # what follows may take longer than there is time
        if args.profile and time.monotonic() < end:
            with tried(found, "profile"):
                say(f"{part.name}: profile")
                call = {"step": ours.step, "decode": decode_rounded(ours)}[part.stage]
                found["profile"] = vars(profiled(lambda call=call: call(0)))  # type: ignore[misc]
                found["floors"] = floors_of(part, ours, device)
            yield found
        if theirs is not None and compiled is not None and calls:
            if time.monotonic() + COMPILING < end:
                rival: Version = (theirs.step if part.stage == "step" else theirs.decode, compiled.on)
                with tried(found, COMPILED):
                    if added := ready({COMPILED: rival}, part, found):
                        found |= timed(calls | added, part.stage, end)
            else:
                found["skipped"][COMPILED] = "too little time was left"
            yield found
        if part.stage == "decode" and time.monotonic() + COMPILING < end:
            with tried(found, "beside float32"):
                say(f"{part.name}: beside float32")
                with torch.inference_mode():
                    found["psnr"] = ours.bfloat16_psnr()
            yield found
            if device.type == "cuda" and time.monotonic() < end:
                with tried(found, "memory"):
                    say(f"{part.name}: memory of {LENGTHS} frames")
                    found["peaks"] = {count: decode_peak(ours, count) for count in LENGTHS}
            yield found
        gc.collect()
        torch.cuda.empty_cache()


def case_of(part: Part, folder: Path) -> Case:
    """Return what is asked of a folder's model for a part."""
    spec = open_checkpoint(folder).spec
    asked = Request(prompt="as the take says", seed=7, width=part.width, height=part.height, num_frames=part.frames,
                    steps=STEPS).resolved(spec)  # fmt: skip
    return Case(folder, spec, asked, "bfloat16", "eager", random=True)


def at_case(side: Ours | Diffusers, case: Case) -> None:
    """Let a loaded side work at another size of the same model."""
    side.case = case
    side.latents = case.inputs()[0]
    for name in ("denoiser", "step_inputs", "_step"):
        side.__dict__.pop(name, None)


def gpu_of(device: torch.device) -> Gpu | None:
    """Return the peaks of a known GPU."""
    return peaks_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def floor_of(part: Part, device: torch.device) -> float | None:
    """Return the least seconds by the planner's arithmetic and traffic at a known GPU's peaks."""
    if (gpu := gpu_of(device)) is None:
        return None
    planned = plan_request(part.model, gpu=gpu.name, width=part.width, height=part.height, num_frames=part.frames)
    return planned.seconds[part.stage]


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
    part: Part, ours: Ours, theirs: Diffusers | None, compiled: Compiled | None, found: dict[str, Any]
) -> dict[str, Version]:
    """Return the versions by name, but for the compiled one."""
    nothing = lambda: None  # noqa: E731
    calls: dict[str, Version] = {}
    if part.stage == "step":
        calls |= {f"ours, {engine}": (ours.by(engine).step, nothing) for engine in ("eager", "cuda_graph")}
        with tried(found, FP8):  # on a smaller GPU there is no room for both
            made: list[dict[str, nn.Module]] = [{} for _ in ours.model.transformers]
            calls[FP8] = (in_fp8(ours, weighty, made).step, nothing)
            calls[ATTENTION_TOO] = (in_fp8(ours, candidates, made).step, nothing)
    else:
        calls["ours"] = (decode_rounded(ours), nothing)
        tile = next(finer(*ours.case.spec.canvas(part.height, part.width), ours.model.vae.tile_of), None)
        if tile is not None:
            calls[TILED] = (decode_rounded(ours, tile), nothing)
    if theirs is not None and compiled is not None:
        with torch.no_grad():
            laid_out(compiled_parts(part.stage, theirs)[0], part.stage)
        calls["diffusers"] = (theirs.step if part.stage == "step" else theirs.decode, compiled.off)
    return calls


def ready(calls: dict[str, Version], part: Part, found: dict[str, Any]) -> dict[str, Version]:
    """Return those that run, after two calls each: the first compiles kernels, the second records a graph."""
    kept = {}
    for name, (call, before) in calls.items():
        with tried(found, name):
            say(f"{part.name}: {name}")
            for _ in range(2):
                before()
                call(0)
            kept[name] = call, before
    return kept


def timed(calls: dict[str, Version], stage: str, end: float) -> dict[str, Any]:
    """Return seconds of each version, taken in turns, and how far their results are from the first one's."""
    results: dict[str, np.ndarray] = {}
    began = time.monotonic()
    for name, (call, before) in calls.items():
        before()
        result = call(0)
        results[name] = (result if isinstance(result, np.ndarray) else result.float().cpu().numpy()).astype(np.float32)
    once = time.monotonic() - began
    seconds_left = min(SECONDS, max(end - time.monotonic(), 0.0))
    takes = range(max(SAMPLES[0], min(SAMPLES[1], int(seconds_left / max(once, 1e-6)))))

    def prepared(call: Call, before: Callable[[], None]) -> Call:
        def sample(take: int) -> Any:
            before()
            return call(take)

        return sample

    seconds = alternate([prepared(*each) for each in calls.values()], list(takes))
    first = next(iter(results.values()), None)
    return {
        "seconds": dict(zip(calls, seconds, strict=True)),
        "difference": {name: apart(first, each, stage) for name, each in results.items() if first is not None},
    }


def apart(a: np.ndarray, b: np.ndarray, stage: str) -> float:
    """Return how far two results are apart: of a step relative to its size, of frames in dB (PSNR)."""
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


@contextmanager
def tried(found: dict[str, Any], name: str) -> Iterator[None]:
    """Let the rest go on where something fails, and tell why it did."""
    try:
        yield
    except Exception as error:  # of a library, a compiler, or the device's memory
        found["skipped"][name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        gc.collect()
        torch.cuda.empty_cache()


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown: a row per version, then the profiles."""
    lines = [
        f"**{told(record['machine'])}**", "",
        "| what | by | median | runs | of the floor | bar | apart from ours |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]  # fmt: skip
    for found in record["parts"]:
        lines += rows(found)
    if record["left_out"]:
        lines += ["", f"Left out when the time was up: {', '.join(record['left_out'])}."]
    lines += ["", METHOD]
    for found in record["parts"]:
        if "profile" in found:
            shown = Profile(**found["profile"]).table(found["floor"], found.get("floors", {}))
            lines += ["", f"**{found['name']}, profiled**", "", shown]
    return "\n".join(lines)


def rows(found: dict[str, Any]) -> list[str]:
    """Return the lines of one part."""
    lines = []
    medians = {name: statistics.median(samples) for name, samples in found.get("seconds", {}).items()}
    sixteen = [name for name in medians if name.startswith("ours") and name not in found["bars"]]
    best = min(sixteen, key=medians.__getitem__, default=None)
    for name, seconds in medians.items():
        share = f"{found['floor'] / seconds:.0%}" if found["floor"] else "-"
        bar = found["bars"].get("16 bits" if name == best else name)
        bar = "" if bar is None else f"{bar:g} s: {'met' if seconds <= bar else 'missed'}"
        apart = f"{found['difference'][name]:.3g}"
        count = len(found["seconds"][name])
        lines.append(f"| {found['name']} | {name} | {seconds:.3f} s | {count} | {share} | {bar} | {apart} |")
    if "psnr" in found:
        met = "met" if found["psnr"] >= PSNR_LIMIT else "missed"
        lines.append(
            f"| {found['name']} | ours beside float32 | {found['psnr']:.1f} dB | 1 | | {PSNR_LIMIT:g} dB: {met} | |"
        )
    if "peaks" in found:
        peaks = list(found["peaks"].values())
        met = "met" if max(peaks) <= 1.05 * min(peaks) else "missed"
        lengths, sizes = ", ".join(map(str, found["peaks"])), ", ".join(f"{peak / 2**30:.2f}" for peak in peaks)
        what = f"ours, memory of {lengths} frames"
        lines.append(f"| {found['name']} | {what} | {sizes} GiB | 1 | | within 5 %: {met} | |")
    return lines + [f"| {found['name']} | {name} | left out: {why} | | | | |" for name, why in found["skipped"].items()]


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)


def _parts(given: str) -> tuple[str, ...]:
    names = tuple(given.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: legal are {', '.join(PARTS)}, joined by commas")
    return names
