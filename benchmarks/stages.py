"""The stages of a request, timed: whole request, one step, decoding, encoding, text; and the memory they add."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import runtime
from benchmarks import alternatives, quality, random_model, sides
from benchmarks.machine import describe, installed, keep, results_file
from benchmarks.measure import Refused, alternate, check_equal, check_psnr, fresh_process, median_ratio, peak_growth
from benchmarks.report import table
from benchmarks.sides import Case, Ours, Side
from runtime.model import choose_device, locate
from runtime.models import open_checkpoint
from runtime.request import Request
from runtime.weights import shapes

# How many samples a stage gets for each one of the whole request: short ones scatter more and cost less.
STAGES = {"request": 1, "step": 4, "decode": 2, "decode_bfloat16": 2, "encode": 2, "text": 4}
MEMORY = ("request", "decode", "decode_bfloat16")
AUTOENCODER = {"decode", "decode_bfloat16", "encode"}  # stages that need no more than this
NAMES = [name for name in STAGES if name != "decode_bfloat16"]  # which comes with decode
OVERRIDES = ("width", "height", "num_frames", "steps", "guidance")


@dataclass(frozen=True)
class Settings:
    """What holds for all models of one run."""

    device: torch.device
    threads: int
    repeats: int
    only: tuple[str, ...]


def set_up(settings: Settings) -> None:
    """Apply the settings to this process."""
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)


def add_command(commands: Any) -> None:
    """Add `stages` to the command line."""
    parser = commands.add_parser("stages", help="a request and its stages, alone or beside diffusers")
    parser.set_defaults(run=run)
    parser.add_argument("--against", choices=["diffusers"], help="measure it in turns with this runtime")
    parser.add_argument("--model", help="demo, random, vae (random, of Wan 2.1's size), a folder or a published name; "
                        "default: demo and random, or demo and vae for decode and encode alone")  # fmt: skip
    parser.add_argument("--only", type=_stages, default=tuple(STAGES), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--repeats", type=_count, default=9, help="samples of the whole request (default 9); "
                        "of step and text 4 times as many, of decode and encode twice, and half of memory")  # fmt: skip
    parser.add_argument("--quality", action="store_true", help="instead: what each quality costs and keeps, beside "
                        "plain TeaCache and EasyCache at the same speed")  # fmt: skip
    parser.add_argument(
        "--alternatives", action="store_true",
        help="with --quality: guidance in an interval, its row reused, first-block reuse, beside ours at their cost",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=_count, default=32, help="with --quality: videos of each setting (default 32)"
    )
    parser.add_argument("--threads", type=_count, help="threads on the CPU (default: as many as PyTorch takes)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    parser.add_argument("--width", type=_count, help="pixels, instead of the model's default; so the next four")
    parser.add_argument("--height", type=_count)
    parser.add_argument("--frames", type=_count, dest="num_frames")
    parser.add_argument("--steps", type=_count)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--json", type=Path, help="file of results (default: benchmarks/results/<device>/"
                        "<date>-<commit>.json)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Measure, write the results as JSON and print the table; Refused where the sides' results differ."""
    if args.quality:
        measure_quality(args)
        return
    compared: list[type[Side]] = [Ours, *sides.rival(args.against)]
    if args.model in ("random", "vae", None) and installed("diffusers") is None:
        raise ValueError("the random model is written by diffusers, which is not installed; take --model demo")
    threads = args.threads or torch.get_num_threads()
    settings = Settings(choose_device(args.device), threads, args.repeats, args.only)
    set_up(settings)
    machine = describe(settings.device)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        os.environ["DIT_RUNTIME_CACHE"] = scratch  # the user's own cache is neither read nor filled
        models = [measure(case, compared, settings) for case in cases(args, Path(scratch))]
    record = {
        "benchmark": "stages",
        "machine": machine,
        "dtype": "float32",
        "repeats": args.repeats,
        "sides": [side.name for side in compared],
        "models": models,
    }
    file = args.json or results_file(machine)
    keep(record, file)
    _say(f"samples: {file}")
    print(table(record))


def measure_quality(args: argparse.Namespace) -> None:
    """Measure the qualities of one model, calibrated or not, by default the built-in one."""
    threads = args.threads or torch.get_num_threads()
    set_up(Settings(choose_device(args.device), threads, args.prompts, args.only))
    model = runtime.load(args.model or "demo", device=args.device)
    asked = Request(prompt="as the take says", seed=0, **{key: getattr(args, key) for key in OVERRIDES})
    if args.alternatives:
        print(alternatives.run(model, asked.resolved(model.spec), args.prompts, _say))
        return
    quality.run(args, model, asked.resolved(model.spec), _say)


def cases(args: argparse.Namespace, scratch: Path) -> Iterator[Case]:
    """Yield the models that are asked for, each with its request."""
    usual = ("demo", "vae" if set(args.only) <= AUTOENCODER else "random")
    for name in (args.model,) if args.model else usual:
        written = name in random_model.KINDS
        folder = scratch / name if written else locate(name)
        if written:
            _say(f"{name}: writing the checkpoint")
            random_model.write(folder, name)
        spec = open_checkpoint(folder).spec
        chosen = {key: getattr(args, key) for key in OVERRIDES}
        yield Case(folder, spec, Request(prompt="as the take says", seed=7, **chosen).resolved(spec))


def measure(case: Case, compared: list[type[Side]], settings: Settings) -> dict[str, Any]:
    """Return everything measured of one model; Refused where the sides' results differ."""
    takes = itertools.count(1)  # a number is used once: each take brings new prompts
    found: dict[str, Any] = {
        "name": case.spec.name,
        "parameters": parameters(case.folder),
        "request": {key: getattr(case.request, key) for key in (*OVERRIDES, "guidance_2", "shift", "sampler", "seed")},
        "text_length": case.spec.text_length,
        **timings(case, compared, settings, takes),
        "memory": {},
    }
    torch.cuda.empty_cache()
    for stage in (stage for stage in MEMORY if stage in settings.only):
        _say(f"{case.spec.name}: memory of {stage}")
        found["memory"][stage] = {side.name: [] for side in compared}
        for take in itertools.islice(takes, (settings.repeats + 1) // 2):
            for side in compared:
                found["memory"][stage][side.name].append(fresh_process(memory, side, case, settings, stage, take))
    return found


def timings(case: Case, compared: list[type[Side]], settings: Settings, takes: Iterator[int]) -> dict[str, Any]:
    """Return the seconds of each stage, on whose result the sides must agree first; bfloat16 with its PSNR."""
    name = case.spec.name
    _say(f"{name}: loading")
    loaded = [side(case, settings.device) for side in compared]
    agreed = warm_up("request", loaded, next(takes)) if "request" in settings.only else None
    if agreed is not None:
        _say(f"{name}: largest difference of frames {agreed:g} of 255")
    stages: dict[str, Any] = {}
    for stage in settings.only:
        _say(f"{name}: {stage}")
        agreement: dict[str, float | None]
        if stage == "decode_bfloat16":
            try:
                agreement = {"psnr": check_psnr(Ours.bfloat16_psnr(loaded[0]))}  # type: ignore[arg-type]
            except Refused as refused:  # no speed of what is too coarse; the other rows stand
                _say(f"{name}: {stage} is left out: {refused}")
                continue
        else:
            agreement = {"difference": agreed if stage == "request" else warm_up(stage, loaded, next(takes))}
        numbers = list(itertools.islice(takes, settings.repeats * STAGES[stage]))
        seconds = alternate([getattr(side, stage) for side in loaded], numbers)
        stages[stage] = {
            **agreement,
            "seconds": dict(zip((side.name for side in compared), seconds, strict=True)),
            "median": {side.name: statistics.median(each) for side, each in zip(compared, seconds, strict=True)},
            "ratio": median_ratio(*seconds) if len(compared) > 1 else None,
        }
    return {"difference": agreed, "stages": stages}


def warm_up(stage: str, loaded: list[Side], take: int) -> float | None:
    """Run a stage once on each side, unmeasured, and return how far the results are apart (None for one side)."""
    results = [getattr(side, stage)(take) for side in loaded]
    if len(results) == 1:
        return None
    ours, theirs = results
    if stage == "text":  # theirs is padded with zeros, ours is not padded
        theirs = [b[: len(a)] for a, b in zip(ours, theirs, strict=True)]
    return check_equal(f"result of {stage}", ours, theirs)


def memory(side: type[Side], case: Case, settings: Settings, stage: str, take: int) -> dict[str, int] | None:
    """Return what one run of a stage adds to the memory of a process that has only loaded the model."""
    set_up(settings)
    loaded = side(case, settings.device)
    for network in loaded.networks:  # weights that are mapped from a file become resident when they are first read
        for parameter in network.parameters():
            parameter.sum()
    return peak_growth(lambda: getattr(loaded, stage)(take), settings.device)


def parameters(folder: Path) -> dict[str, int]:
    """Return the number of parameters per network, as they are on disk."""
    return {
        part.name: sum(math.prod(shape) for file in part.files for shape, _ in shapes(file).values())
        for part in open_checkpoint(folder).components
    }


def _stages(given: str) -> tuple[str, ...]:
    names = tuple(given.replace("decode", "decode,decode_bfloat16").split(","))
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: legal are {', '.join(NAMES)}, joined by commas")
    return names


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given}: legal is a whole number of at least 1")
    return int(given)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
