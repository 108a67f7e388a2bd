"""python -m tools.demo_model train | score | framing | ladder: trains the built-in checkpoint, reads what it shows."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser(
        "train", help="train a checkpoint from nothing; the same command goes on with a stopped run"
    )
    train.add_argument("--out", type=Path, required=True, help="folder for states, logs and the checkpoint")
    train.add_argument(
        "--size", choices=("smoke", "cpu", "gpu"), default="cpu", help="a minute | CPU hours | one GPU, 20 minutes"
    )
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--squares", action="store_true", help="the DiT on square crops alone, to compare the framing")
    train.add_argument("--threads", type=int, help="CPU threads")
    score = verbs.add_parser("score", help="generate for held-out prompts and read the videos by fixed rules")
    score.add_argument("--model", default="demo")
    score.add_argument("--prompts", type=int, default=128)
    score.add_argument("--size", default=None, help="WxH; the checkpoint's default where absent")
    score.add_argument("--style", choices=("terse", "plain", "descriptive"), default="descriptive")
    score.add_argument("--steps", type=int, default=25)
    score.add_argument("--guidance", type=float)
    score.add_argument(
        "--rows", nargs="+", metavar="ROW", default=["renders", "reconstructions", "text"],
        help="what to read: renders reconstructions text animation extension (the last two: from given frames)",
    )  # fmt: skip
    score.add_argument("--sheet", type=Path, help="write a contact sheet (png)")
    score.add_argument("--json", type=Path, help="write the numbers")
    framed = verbs.add_parser("framing", help="how often things are whole in wide and tall videos")
    framed.add_argument("--model", action="append", required=True, help="a checkpoint; may be repeated")
    framed.add_argument("--prompts", type=int, default=48)
    rungs = verbs.add_parser("ladder", help="what checkpoints of more and more training show of the same prompts")
    rungs.add_argument("--model", action="append", required=True, help="a checkpoint; may be repeated")
    rungs.add_argument("--prompts", type=int, default=32)
    rungs.add_argument("--out", type=Path, required=True, help="folder for ladder.json and ladder.png")
    given = parser.parse_args()
    if given.verb == "train":
        from tools.demo_model.recipe import RECIPES, SQUARES, make

        if given.threads:
            torch.set_num_threads(given.threads)
        recipe = RECIPES[given.size]
        recipe = replace(recipe, buckets=SQUARES) if given.squares else recipe
        print(make(given.out, recipe, seed=given.seed, say=lambda line: print(line, flush=True)))
        return
    from tools.demo_model.evaluate import evaluate, framing, ladder

    if given.verb == "framing":
        for model in given.model:
            rows = framing(model, given.prompts).items()
            print(f"{model}: whole in " + ", ".join(f"{n}/{given.prompts} at {size}" for size, n in rows))
        return

    if given.verb == "ladder":
        report(ladder(given.model, given.prompts, given.out))
        return
    found = evaluate(
        given.model, given.prompts, size=given.size, style=given.style, steps=given.steps, guidance=given.guidance,
        rows=given.rows, sheet=given.sheet,
    )  # fmt: skip
    report(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def report(found: dict[str, dict[str, tuple[int, int]]]) -> None:
    """Print a line per row: how many were right, of how many."""
    for row, numbers in found.items():
        told = (f"{k} {right}/{of} ({100 * right / of:.0f} %)" for k, (right, of) in numbers.items() if of)
        print(f"{row:14s} " + "  ".join(told))


if __name__ == "__main__":
    main()
