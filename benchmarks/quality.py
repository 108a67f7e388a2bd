"""python -m benchmarks stages --quality: what each quality costs and keeps, beside plain caches at the same speed.

All settings take turns on each prompt, and every video is compared with the exact one of its seed. The plain caches run
in our own sampler, with thresholds found beforehand, on other prompts, so that they ask the network no less than ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import runtime
from benchmarks.machine import describe, results_file
from benchmarks.rivals import EasyCache, TeaCache, polynomial
from benchmarks.scatter import scatter
from runtime.decoding import decode
from runtime.denoising import BATCHED_TOKENS, prepare_context
from runtime.fidelity import frame_ssim, psnr
from runtime.guidance import guided
from runtime.latents import draw_noise
from runtime.model import Model
from runtime.models.spec import Denoiser
from runtime.request import Request
from runtime.samplers import make_sampler, start
from runtime.schedules import make_schedule
from runtime.text import encode_prompt

OURS: tuple[str | float, ...] = ("high", "fast", 38.0, 30.0)
MATCHED = ("high", "fast")  # beside which the others are set
SOUGHT = 6  # halvings of the range that a rival's threshold is sought in
TUNED = 3  # prompts that it is sought on
TUNING_SEED, SEED = 8000, 5000  # a prompt's seed is this and its place


@dataclass(frozen=True)
class Take:
    """One video: its frames, seconds from prompt to them, and how often the network was asked."""

    frames: np.ndarray
    seconds: float
    asked: float


Maker = Callable[[Request], Take]


def ours(model: Model, quality: str | float, request: Request) -> Take:
    """Make a request by the public function."""
    began = time.perf_counter()
    video = runtime.generate(model, replace(request, quality=quality))
    frames = video.frames
    seconds = time.perf_counter() - began
    assert video.receipt is not None and request.steps
    said = video.receipt.quality
    return Take(frames, seconds, request.steps if said is None else said["windows"][0]["computed"])


def plain(model: Model, wrap: Callable[[], Any], steps: int, request: Request) -> Take:
    """Make a request in `steps` steps with a cache around the network's rows, before guidance; `wrap` makes a new one.

    The cache counts in `asked` how often it asked the network.
    """
    began = time.perf_counter()
    assert request.shift is not None and request.seed is not None and request.sampler is not None
    shape = shape_of(model, request)
    tokens = int(np.prod([n // p for n, p in zip(shape[1:], model.spec.patch, strict=True)]))
    sigmas = make_schedule(model.spec.schedule, steps, request.shift)
    sampler = make_sampler(request.sampler, model.spec.sampler_options)
    cache = wrap()
    denoiser: Denoiser = guided(cache, float(request.guidance or 0.0), batched=tokens <= BATCHED_TOKENS)
    with torch.inference_mode():
        context = prepare_context(model, encode_prompt(model, request)[0], shape)
        state = start(draw_noise(shape, request.seed).to(model.device))
        for step in range(steps):
            state = sampler(state, denoiser(state.x, sigmas[step : step + 1], context), sigmas.tolist())
    frames = decode(model, state.x.clone().cpu(), tile=model.tile).frames
    return Take(frames, time.perf_counter() - began, cache.asked)


def shape_of(model: Model, request: Request) -> tuple[int, int, int, int]:
    """Return [C, T, H, W] of a resolved request's latents."""
    assert request.num_frames and request.height and request.width
    return model.spec.latent_shape(request.num_frames, request.height, request.width)


def matched(make: Callable[[float], Maker], least: float, requests: Sequence[Request]) -> float:
    """Return the largest threshold found with which a rival asks the network at least `least` times on average."""
    low, high = 0.0, 1.0
    while asked(make(high), requests) >= least and high < 1e4:
        low, high = high, high * 4
    for _ in range(SOUGHT):
        middle = (low + high) / 2
        low, high = (middle, high) if asked(make(middle), requests) >= least else (low, middle)
    return low


def asked(make: Maker, requests: Sequence[Request]) -> float:
    """Return how often the network is asked, on average."""
    return statistics.mean(make(request).asked for request in requests)


def makers(model: Model, tuning: Sequence[Request], say: Callable[[str], None]) -> dict[str, Maker]:
    """Return all that is measured, by its name: ours, and for each of MATCHED the others at the same speed."""
    found: dict[str, Maker] = {"exact": partial(ours, model, "exact")}
    found |= {named(quality): partial(ours, model, quality) for quality in OURS}
    steps = tuning[0].steps
    assert steps is not None
    fit = polynomial(model, tuning[0])
    kinds: dict[str, Callable[[float], Callable[[], Any]]] = {
        "TeaCache": lambda limit: lambda: TeaCache(model, steps, limit, fit),
        "EasyCache": lambda limit: lambda: EasyCache(model, steps, limit),
    }
    for quality in MATCHED:
        count = asked(found[quality], tuning)
        for name, kind in kinds.items():

            def make(limit: float, kind: Any = kind) -> Maker:
                return partial(plain, model, kind(limit), steps)

            limit = matched(make, count, tuning)
            say(f"{name} beside {quality}: threshold {limit:.4g}")
            found[f"{name} beside {quality}"] = make(limit)
        fewer = max(2, round(count))
        uncached = partial(EasyCache, model, fewer, 0.0)  # a threshold that nothing is below
        found[f"{fewer} steps beside {quality}"] = partial(plain, model, uncached, fewer)
    return found


def named(quality: str | float) -> str:
    """Return a quality as the table names it."""
    return quality if isinstance(quality, str) else f"{quality:g} dB"


def run(args: argparse.Namespace, model: Model, request: Request, say: Callable[[str], None]) -> None:
    """Measure, write every sample as JSON and a picture beside it, and print the table."""
    prompts = held_out_prompts(args.prompts + TUNED)
    requests = [
        replace(request, prompt=prompt, seed=(SEED if i >= TUNED else TUNING_SEED) + i)
        for i, prompt in enumerate(prompts)
    ]
    all_makers = makers(model, requests[:TUNED], say)
    samples: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "asked": [], "psnr": [], "ssim": []} for name in all_makers
    }
    for number, asked_for in enumerate(requests[TUNED:], 1):
        say(f"video {number} of {args.prompts}")
        exact: np.ndarray | None = None
        for name, make in all_makers.items():
            take = make(asked_for)
            exact = take.frames if exact is None else exact
            row = samples[name]
            row["seconds"].append(take.seconds)
            row["asked"].append(take.asked)
            row["psnr"].append(psnr(take.frames, exact))
            row["ssim"].append(float(np.mean(frame_ssim(take.frames, exact))))
    machine = describe(model.device)
    record = {"benchmark": "quality", "machine": machine, "model": model.spec.name, "weights": model.fingerprint,
              "request": {k: getattr(request, k) for k in ("width", "height", "num_frames", "steps", "guidance")},
              "samples": samples}  # fmt: skip
    file: Path = args.json or results_file(machine)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    picture = file.with_suffix(".svg")
    picture.write_text(scatter(dots(samples)), encoding="utf-8")
    say(f"samples: {file}, picture: {picture}")
    print(table(record))


def held_out_prompts(count: int) -> list[str]:
    """Return prompts of the demo world whose scenes no training saw, and no calibration."""
    from tools.demo_model.captions import STYLES, caption, held_out_scene

    rng = np.random.default_rng(2026)
    return [caption(held_out_scene(rng), STYLES[i % len(STYLES)], rng) for i in range(count)]


def speed(samples: dict[str, dict[str, list[float]]], name: str) -> float:
    """Return how many times faster than exact, the median over the pairs."""
    pairs = zip(samples["exact"]["seconds"], samples[name]["seconds"], strict=True)
    return statistics.median(exact / own for exact, own in pairs)


def dots(samples: dict[str, dict[str, list[float]]]) -> list[tuple[str, float, float]]:
    """Return (name, times faster, dB that 95 % keep) of each setting."""
    return [(name, speed(samples, name), kept(found["psnr"])) for name, found in samples.items() if name != "exact"]


def kept(decibel: Sequence[float]) -> float:
    """Return the dB that 95 % of the videos keep."""
    return float(np.quantile(decibel, 0.05, method="lower"))


def table(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    machine, asked_for, samples = record["machine"], record["request"], record["samples"]
    count = len(samples["exact"]["seconds"])
    lines = [
        f"**{machine['name']}, {machine['threads']} threads, torch {machine['versions']['torch']}, commit "
        f"{machine['commit']}**",
        "",
        f"{record['model']}: {asked_for['width']}x{asked_for['height']}, {asked_for['num_frames']} frames, "
        f"{asked_for['steps']} steps, guidance {asked_for['guidance']:g}; {count} prompts and seeds that no "
        "calibration saw, each against its own exact video",
        "",
        "| | network steps | faster | 95 % keep | mean | SSIM |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in samples.items():
        steps = statistics.mean(found["asked"])
        cells = [name, f"{steps:.1f}", f"{speed(samples, name):.2f}x"]
        if name != "exact":
            cells += [f"{kept(found['psnr']):.1f} dB", f"{statistics.mean(found['psnr']):.1f} dB"]
            cells.append(f"{statistics.mean(found['ssim']):.4f}")
        else:
            cells += ["equal"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
