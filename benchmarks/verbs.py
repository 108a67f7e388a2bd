"""python -m benchmarks verbs: what each verb does to the demo world, measured from pixels, over many prompts.

No human judges: steps at seams, given frames unchanged, the object's track, the ground's colour. A contact sheet per
verb is written to look at.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pixels

COLOURS = ("red", "blue", "yellow", "green", "purple", "orange", "white", "black")
SHAPES = ("ball", "cube", "pyramid", "star")
GROUNDS = ("green grass", "yellow sand", "white snow", "blue water")
MOTIONS = ("rolls left", "moves right", "rises", "falls")
CHANCE = 1.5  # the largest step at a seam that passes, in medians


@dataclass(frozen=True)
class Trial:
    """One prompt, its plain clip uint8 [F, H, W, 3], and how to make another request with the same settings."""

    prompt: str
    clip: np.ndarray
    make: Callable[..., np.ndarray]


Measures = dict[str, float]
Result = tuple[np.ndarray, Measures]


def animate(trial: Trial) -> Result:
    from runtime import Clip

    frames = trial.make(clips=(Clip(trial.clip[0]),))
    return frames, {"given unchanged": same(frames[:1], trial.clip[:1]), "seam": pixels.seam_ratio(frames, [1])}


def extend(trial: Trial) -> Result:
    from runtime import Clip

    frames, count = trial.make(clips=(Clip(trial.clip),), direction="forward"), len(trial.clip)
    before, after = pixels.velocity(frames[count - 9 : count]), pixels.velocity(frames[count - 1 : count + 8])
    return frames, {
        "given unchanged": same(frames[:count], trial.clip),
        "seam": pixels.seam_ratio(frames, [count]),
        "colour step": seam_colour(frames, [count]),
        "speed change, px per frame": float(np.linalg.norm(after - before)),
    }


def prepend(trial: Trial) -> Result:
    from runtime import Clip

    frames = trial.make(clips=(Clip(trial.clip),), direction="backward")
    seam = len(frames) - len(trial.clip)
    return frames, {
        "given unchanged": same(frames[seam:], trial.clip),
        "seam": pixels.seam_ratio(frames, [seam]),
        "colour step": seam_colour(frames, [seam]),
    }


def connect(trial: Trial) -> Result:
    from runtime import Clip

    head, tail = trial.clip[:9], trial.make(seed=1)[-8:]
    frames = trial.make(clips=(Clip(head), Clip(tail)), direction="between", num_frames=8)
    return frames, {
        "given unchanged": same(np.concatenate([frames[:9], frames[17:]]), np.concatenate([head, tail])),
        "seam": pixels.seam_ratio(frames, [9, 17]),
        "colour step": seam_colour(frames, [9, 17]),
    }


def loop(trial: Trial) -> Result:
    frames = trial.make(periodic=True)
    return frames, {"last to first": pixels.loop_ratio(frames)}


def loop_clip(trial: Trial) -> Result:
    from runtime import Clip

    frames, count = trial.make(clips=(Clip(trial.clip),), periodic=True), len(trial.clip)
    return frames, {
        "given unchanged": same(frames[:count], trial.clip),
        "seam": pixels.seam_ratio(frames, [count]),
        "last to first": pixels.loop_ratio(frames),
    }


def edit(trial: Trial) -> Result:
    from runtime import Clip

    frames = trial.make(clips=(Clip(trial.clip),), strength=0.5)
    small = 8
    kept = pixels.psnr(pixels.low_pass(frames, small), pixels.low_pass(trial.clip, small))
    return frames, {"low-pass kept, dB": kept}


def fill(trial: Trial) -> Result:
    from runtime import Clip

    clip = trial.clip
    frames = trial.make(clips=(Clip(clip[:7]), Clip(clip[12:], at=12)), num_frames=len(clip))
    return frames, {
        "given unchanged": same(np.delete(frames, range(7, 12), 0), np.delete(clip, range(7, 12), 0)),
        "seam": pixels.seam_ratio(frames, [7, 12]),
        "filled as it was, dB": pixels.psnr(frames[7:12], clip[7:12]),
    }


def finish(trial: Trial) -> Result:
    from runtime import Clip

    draft = trial.make(steps=5)
    frames = trial.make(clips=(Clip(draft),), strength=0.6)
    return frames, {"low-pass of the draft, dB": pixels.psnr(pixels.low_pass(frames, 4), pixels.low_pass(draft, 4))}


def long(trial: Trial) -> Result:
    frames = trial.make(num_frames=65, window=17)
    ground = pixels.ground(frames)
    return frames, {
        "seam": pixels.seam_ratio(frames, list(range(17, 65, 12))),
        "ground drift, levels": float(np.abs(ground[-8:].mean(0) - ground[:8].mean(0)).max()),
    }


VERBS: dict[str, Callable[[Trial], Result]] = {
    "animate": animate, "extend": extend, "extend backward": prepend, "connect": connect, "loop": loop,
    "loop a clip": loop_clip, "edit": edit, "fill": fill, "draft and finish": finish, "long": long,
}  # fmt: skip


def same(one: np.ndarray, other: np.ndarray) -> float:
    """Return 1 where frames are equal byte for byte, else 0."""
    return float(np.array_equal(one, other))


def seam_colour(frames: np.ndarray, seams: list[int]) -> float:
    """Return the largest step of the mean colour at seams, in medians of those elsewhere, of at least half a level."""
    found = pixels.colour_steps(frames)
    inside = np.delete(found, [place - 1 for place in seams])
    return float(max(found[place - 1] for place in seams) / max(np.median(inside), 0.5))


def prompts() -> Iterator[str]:
    """Yield prompts of the demo world, neighbours unlike each other."""
    every = list(product(COLOURS, SHAPES, GROUNDS, MOTIONS))
    for index in range(len(every)):
        colour, shape, ground, motion = every[index * 181 % len(every)]
        if colour not in ground:
            yield f"a {colour} {shape} {motion} over {ground}"


def add_command(commands: Any) -> None:
    """Add `verbs` to the benchmarks' command line."""
    parser = commands.add_parser("verbs", help="what each verb does, measured from pixels")
    parser.set_defaults(run=run)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=24, metavar="N", help="prompts per verb (default 24)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the model's own)")
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS), metavar="VERB")
    parser.add_argument("--sheets", type=Path, default=Path("out/verbs"), metavar="FOLDER", help="for contact sheets")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write the sheets."""
    import runtime
    from runtime.video import Video

    model = runtime.load(args.model)
    args.sheets.mkdir(parents=True, exist_ok=True)
    trials = [trial(model, prompt, args.steps) for prompt in islice(prompts(), args.prompts)]
    print(f"{model.spec.name}, known frames by {model.spec.conditioning}, {len(trials)} prompts per verb\n")
    print("| verb | measure | median | worst | passes |\n| --- | --- | ---: | ---: | ---: |")
    for name in args.verbs:
        results = [VERBS[name](each) for each in trials]
        for measure in results[0][1]:
            print(line(name, measure, [measures[measure] for _, measures in results]))
        picture = pixels.sheet([frames for frames, _ in results])
        height, width, _ = picture.shape
        still = Video(picture[None], fps=1, num_frames=1, height=height, width=width)
        still.save(args.sheets / f"{name.replace(' ', '-')}.png")
    print(f"\ncontact sheets: {args.sheets}")
    return 0


def trial(model: Any, prompt: str, steps: int | None) -> Trial:
    """Return a prompt with its plain clip."""
    import runtime

    def make(**asked: Any) -> np.ndarray:
        request = runtime.Request(**{"prompt": prompt, "seed": 7, "steps": steps, **asked})
        return runtime.generate(model, request).frames

    return Trial(prompt, make(), make)


def line(verb: str, measure: str, values: list[float]) -> str:
    """Return one row: median and worst of a measure, and how many pass where it has a bar."""
    seen = [value for value in values if not np.isnan(value)]
    if not seen:
        return f"| {verb} | {measure} | not seen | | |"
    higher_is_better = measure.endswith("dB") or measure == "given unchanged"
    worst = min(seen) if higher_is_better else max(seen)
    bars: dict[str, Callable[[float], bool]] = {
        "given unchanged": lambda v: v == 1,
        "seam": lambda v: v <= CHANCE,
        "colour step": lambda v: v <= CHANCE,
        "last to first": lambda v: v <= CHANCE,
        "low-pass of the draft, dB": lambda v: v >= 24,
    }
    passed = f"{sum(map(bars[measure], seen))} of {len(seen)}" if measure in bars else ""
    return f"| {verb} | {measure} | {statistics.median(seen):.2f} | {worst:.2f} | {passed} |"
