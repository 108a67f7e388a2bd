"""python -m benchmarks verbs: what each verb does to the demo world, measured from pixels, over many prompts.

No human judges. Prompts are held-out scenes of the world that the built-in model was trained on, so what is given is
drawn, and what was to come is known. Things, grounds and tracks are read by the rules that also score the model
(`tools/demo_model/score.py`); seams and loops by frame differences. A contact sheet per verb is written to look at,
and one of all. Each verb's measures are kept as it is done; `--resume` goes on behind an interruption.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import pixels
from benchmarks.machine import describe, keep, opened
from benchmarks.verbs_report import plain, save_overview, save_sheet, table
from runtime.cli.arguments import parse_size

if TYPE_CHECKING:
    from runtime import Model, Request
    from tools.demo_model.world import Scene

LENGTH = 17  # frames of a drawn clip
HEAD = 9  # those of them that an extension is given
EDIT = 0.8  # strength

Measures = dict[str, float]
Result = tuple[np.ndarray, Measures]


@dataclass(frozen=True)
class Trial:
    """One held-out scene, what its video shows in truth, and how to make requests of its caption."""

    model: Model
    scene: Scene
    seed: int
    width: int
    height: int
    steps: int

    @cached_property
    def prompt(self) -> str:
        return captioned(self.scene)

    @cached_property
    def truth(self) -> np.ndarray:
        """The scene as it is drawn, uint8 [F, H, W, 3]."""
        from tools.demo_model.evaluate import to_bytes
        from tools.demo_model.world import render

        return to_bytes(render(self.scene, LENGTH, self.height, self.width).frames)

    @cached_property
    def way(self) -> np.ndarray:
        """Where its things are in each frame, read from what is drawn: [F, 2], shares of the frame."""
        return track(self.truth)

    def make(self, **asked: Any) -> np.ndarray:
        """Return the frames of a request, its settings those of the trial where `asked` says nothing else."""
        import runtime

        common = {"prompt": self.prompt, "seed": self.seed, "steps": self.steps, "fps": 8.0}
        size = {} if "clips" in asked else {"width": self.width, "height": self.height}
        return runtime.generate(self.model, runtime.Request(**{**common, **size, **asked})).frames


def captioned(scene: Scene) -> str:
    """Return a scene's caption as the model knows captions best."""
    from tools.demo_model.captions import caption

    return caption(scene, "descriptive")


def text(trial: Trial) -> Result:
    frames = trial.make()
    return frames, things(trial.scene, frames, moving=True)


def image(trial: Trial) -> Result:
    frames = trial.make(num_frames=1)
    return frames, things(trial.scene, frames)


def animate(trial: Trial) -> Result:
    from runtime import Clip

    frames = trial.make(clips=(Clip(trial.truth[0]),))
    return frames, {
        "given unchanged": same(frames[:1], trial.truth[:1]),
        **seams(frames, [1]),
        **things(trial.scene, frames, moving=True),
    }


def extend(trial: Trial) -> Result:
    from runtime import Clip

    given = trial.truth[:HEAD]
    frames = trial.make(clips=(Clip(given),), direction="forward", num_frames=LENGTH - HEAD)
    return frames, {
        "given unchanged": same(frames[:HEAD], given),
        **seams(frames, [HEAD]),
        **things(trial.scene, frames[HEAD:]),
        **motion(trial, frames, slice(HEAD, LENGTH)),
    }


def prepend(trial: Trial) -> Result:
    from runtime import Clip

    seam = LENGTH - HEAD
    frames = trial.make(clips=(Clip(trial.truth[seam:]),), direction="backward", num_frames=seam)
    return frames, {
        "given unchanged": same(frames[seam:], trial.truth[seam:]),
        **seams(frames, [seam]),
        **things(trial.scene, frames[:seam]),
        **motion(trial, frames, slice(0, seam)),
    }


def connect(trial: Trial) -> Result:
    from runtime import Clip

    head, tail = trial.truth[:5], trial.truth[12:]
    frames = trial.make(clips=(Clip(head), Clip(tail)), direction="between", num_frames=7)
    return frames, {
        "given unchanged": same(np.concatenate([frames[:5], frames[12:]]), np.concatenate([head, tail])),
        **seams(frames, [5, 12]),
        **things(trial.scene, frames[5:12]),
        **motion(trial, frames, slice(5, 12)),
    }


def loop(trial: Trial) -> Result:
    frames = trial.make(periodic=True)
    return frames, {"last to first": pixels.loop_ratio(frames), **things(trial.scene, frames)}


def loop_clip(trial: Trial) -> Result:
    from runtime import Clip

    given = trial.truth[:HEAD]
    frames = trial.make(clips=(Clip(given),), periodic=True)
    return frames, {
        "given unchanged": same(frames[:HEAD], given),
        **seams(frames, [HEAD]),
        "last to first": pixels.loop_ratio(frames),
    }


def edit(trial: Trial) -> Result:
    """Ask for another time of day."""
    from runtime import Clip

    wanted = another_time(trial.scene)
    frames = trial.make(clips=(Clip(trial.truth),), strength=EDIT, prompt=captioned(wanted))
    read = things(wanted, frames, moving=True)
    return frames, {**read, "time of day as asked": judged(wanted, frames)["time"]}


def fill(trial: Trial) -> Result:
    from runtime import Clip

    clip, gap = trial.truth, slice(7, 12)
    frames = trial.make(clips=(Clip(clip[:7]), Clip(clip[12:], at=12)), num_frames=LENGTH)
    return frames, {
        "given unchanged": same(np.delete(frames, gap, 0), np.delete(clip, gap, 0)),
        **seams(frames, [7, 12]),
        **motion(trial, frames, gap),
        "as it was drawn, dB": pixels.psnr(frames[gap], clip[gap]),
    }


def keyframes(trial: Trial) -> Result:
    """Pictures of the first, the middle and the last frame."""
    from runtime import Clip

    places = [0, LENGTH // 2, LENGTH - 1]
    clips = tuple(Clip(trial.truth[place], at=place if place < LENGTH - 1 else "end") for place in places)
    frames = trial.make(clips=clips, num_frames=LENGTH)
    return frames, {
        "given unchanged": same(frames[places], trial.truth[places]),
        **seams(frames, [1, places[1], places[1] + 1, places[2]]),
        **things(trial.scene, frames, moving=True),
        **motion(trial, frames, slice(0, LENGTH)),
    }


def storyboard(trial: Trial) -> Result:
    """Two cards: the scene, then the same thing at another time of day, which begins with a picture of it."""
    from runtime import Clip
    from runtime.storyboard import Card

    later = another_time(trial.scene)
    picture = replace(trial, scene=later).truth[0]
    cards = Card(0, 2, trial.prompt), Card(2, 4, captioned(later), Clip(picture))
    frames = trial.make(storyboard=cards, prompt="", width=trial.width, height=trial.height)
    return frames, {
        "as long as its cards": len(frames) == 32,
        "given unchanged": same(frames[16], picture),
        **things(trial.scene, frames[:13]),
        "time of day as on the second card": judged(later, frames[16:])["time"],
    }


def another_time(scene: Scene) -> Scene:
    """Return a scene at the next time of day."""
    from tools.demo_model.world import SKIES

    times = list(SKIES)
    return replace(scene, time=times[(times.index(scene.time) + 1) % len(times)])


def finish(trial: Trial) -> Result:
    """A draft at half the model's own size, and its final video at that size."""
    import runtime
    from runtime.clips import fit_frame
    from runtime.pipeline import final_request

    model = trial.model
    whole = runtime.Request(prompt=trial.prompt, seed=trial.seed, steps=trial.steps).resolved(model.spec)
    assert whole.width and whole.height
    draft = whole.drafted(model.spec)
    rough_seconds, whole_seconds = (min(seconds_of(model, each) for _ in range(2)) for each in (draft, whole))
    final = final_request(model, draft, whole.width, whole.height, steps=trial.steps)
    rough = np.stack([fit_frame(frame, whole.width, whole.height, "crop") for frame in final.clips[0].video])
    frames = runtime.generate(model, final).frames
    like = pixels.psnr(pixels.low_pass(frames, 8), pixels.low_pass(rough, 8))
    return frames, {
        "low-pass of the draft, dB": like,
        "draft, share of the seconds": rough_seconds / whole_seconds,
        **things(trial.scene, frames, moving=True),
    }


def seconds_of(model: Model, request: Request) -> float:
    """Return the seconds that a request takes, decoding included."""
    import runtime

    began = time.perf_counter()
    assert runtime.generate(model, request).frames.size
    return time.perf_counter() - began


def long(trial: Trial) -> Result:
    """Three windows of the model's own length."""
    frames = trial.make(num_frames=41, window=LENGTH, overlap=5)
    return frames, {
        **seams(frames, [17, 29]),
        "ground drift, levels": pixels.ground_drift(frames),
        **things(trial.scene, frames),
    }


VERBS: dict[str, Callable[[Trial], Result]] = {
    "text": text, "image": image, "animate": animate, "keyframes": keyframes, "extend": extend,
    "extend backward": prepend, "connect": connect, "loop": loop, "loop a clip": loop_clip, "edit": edit,
    "fill": fill, "storyboard": storyboard, "draft and finish": finish, "long": long,
}  # fmt: skip


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether frames are equal byte for byte."""
    return np.array_equal(one, other)


def seams(frames: np.ndarray, places: list[int]) -> Measures:
    """Return the largest step into a frame of `places`, of the frame and of its mean colour, in medians elsewhere."""
    return {
        "step at the seam": pixels.seam_ratio(pixels.steps(frames), places),
        "colour step at the seam": pixels.seam_ratio(pixels.colour_steps(frames), places, least=0.5),
    }


def judged(scene: Scene, frames: np.ndarray) -> dict[str, bool]:
    """Return what of a scene is right in frames, by the rules of the model's score."""
    from tools.demo_model.score import judge, read

    return judge(scene, read(frames))


def things(scene: Scene, frames: np.ndarray, *, moving: bool = False) -> Measures:
    """Return which attributes of a scene frames show; with `moving` the direction too."""
    found = judged(scene, frames)
    names = ["colour", "shape", "background", *(["direction"] if moving else [])]
    return {f"{name} right": found[name] for name in names}


def track(frames: np.ndarray) -> np.ndarray:
    """Return where the things are in each frame [F, 2], shares of the frame; NaN where none is seen."""
    from tools.demo_model.score import read

    return read(frames).track[:, :2]


def motion(trial: Trial, frames: np.ndarray, made: slice) -> Measures:
    """Return by how much made frames' motion differs from what the world shows there; NaN where nothing is seen."""
    sides = np.array([trial.width, trial.height])
    found, drawn = track(frames)[made] * sides, trial.way[made] * sides
    one, other = pixels.velocity(found), pixels.velocity(drawn)
    speed, was = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    turned = np.degrees(np.arccos(np.clip(one @ other / max(speed * was, 1e-9), -1, 1)))
    off = np.linalg.norm(found - drawn, axis=1)
    return {
        "direction off, degrees": float(turned),
        "speed, of the drawn one": speed / max(was, 1e-9),
        "place off, % of the width": float(np.nanmean(off) / trial.width * 100) if not np.isnan(off).all() else np.nan,
    }


def add_command(commands: Any) -> None:
    """Add `verbs` to the benchmarks' command line."""
    parser = commands.add_parser("verbs", help="what each verb does, measured from pixels")
    parser.set_defaults(run=run)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=24, metavar="N", help="prompts per verb (default 24)")
    parser.add_argument("--size", default="96x64", metavar="WIDTHxHEIGHT", help="of clips and results (default 96x64)")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="denoising steps (default 12)")
    parser.add_argument(
        "--verbs", nargs="+", choices=VERBS, default=list(VERBS), metavar="VERB", help=f"of: {', '.join(VERBS)}"
    )
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: as many as PyTorch takes)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no verb after so long")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with the verbs that this file lacks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="measures (default: benchmarks/results/<device>/"
                        "<date>-<commit>.json); table and sheet of all verbs lie beside it")  # fmt: skip
    parser.add_argument("--sheets", type=Path, default=Path("out/verbs"), metavar="FOLDER", help="a sheet per verb")


def trials(model: Model, count: int, width: int, height: int, steps: int) -> list[Trial]:
    """Return held-out scenes in clear weather whose things move along a line before a camera that stands still."""
    from tools.demo_model.evaluate import scenes

    lines = ("left", "right", "rise", "fall")
    found = [s for s in scenes(8 * count) if s.motion in lines and (s.camera, s.weather) == ("still", "clear")]
    return [Trial(model, scene, seed, width, height, steps) for seed, scene in enumerate(found[:count])]


def run(args: argparse.Namespace) -> int:
    """Measure verb after verb, keep each, print the table, write the sheets; 130 where it was interrupted."""
    import runtime

    torch.set_num_threads(args.threads or torch.get_num_threads())
    began, model = time.monotonic(), runtime.load(args.model)
    width, height = parse_size(args.size)
    asked = {"weights": model.fingerprint, "prompts": args.prompts, "size": args.size, "steps": args.steps}
    record, file = opened("verbs", asked, describe(model.device), args.resume, args.json)
    record |= {"model": model.spec.name, "conditioning": model.spec.conditioning}
    done = {row["verb"] for row in record["rows"]}
    wanted = [name for name in args.verbs if name not in done]
    scenes, status = trials(model, args.prompts, width, height, args.steps), 0
    try:
        for name in wanted:
            if args.budget is not None and time.monotonic() - began > args.budget:
                print("out of time; go on with --resume", file=sys.stderr)
                break
            record["rows"].append(row(name, scenes, args.sheets))
            keep(record, file)
            took = [each["seconds"] for each in record["rows"]]
            left = (len(args.verbs) - len(took)) * sum(took) / len(took)
            print(f"{name}: {took[-1]:.0f} s; about {max(left, 0):.0f} s to go", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is kept, go on with --resume {file}", file=sys.stderr)
        status = 130
    print(table(record))
    if record["rows"]:
        file.with_suffix(".md").write_text(table(record) + "\n", encoding="utf-8")
        sheets = {each["verb"]: sheet_file(args.sheets, each["verb"]) for each in record["rows"]}
        overview = save_overview(sheets, args.prompts, file.with_suffix(".png"))
        print(f"\nmeasures: {file}\nsheet: {overview}\nsheets per verb: {args.sheets}", file=sys.stderr)
    return status


def row(name: str, scenes: Sequence[Trial], folder: Path) -> dict[str, Any]:
    """Return what a verb did to each scene, and write its sheet."""
    began, results = time.monotonic(), [VERBS[name](each) for each in scenes]
    save_sheet([frames for frames, _ in results], sheet_file(folder, name))
    return {
        "verb": name,
        "seconds": round(time.monotonic() - began, 2),
        "measures": [plain(measures) for _, measures in results],
    }


def sheet_file(folder: Path, name: str) -> Path:
    """Return the file of a verb's sheet."""
    return folder / f"{name.replace(' ', '-')}.png"
