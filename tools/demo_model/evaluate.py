"""Generates for held-out prompts with this runtime and reads the videos; what the model card's numbers come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from tools.demo_model.captions import caption, held_out_scene
from tools.demo_model.score import judge, read, table, whole
from tools.demo_model.world import Scene, render

SEED = 20261122
ROWS = ("renders", "reconstructions", "text", "animation", "extension")


def scenes(count: int) -> list[Scene]:
    """Return the held-out scenes that every score is measured on."""
    rng = np.random.default_rng(SEED)
    return [held_out_scene(rng) for _ in range(count)]


def evaluate(
    model_name: str, prompts: int, *, size: str | None = None, style: str = "descriptive", steps: int = 25,
    guidance: float | None = None, rows: Sequence[str] = ROWS[:3], sheet: Path | None = None,
) -> dict[str, dict[str, tuple[int, int]]]:  # fmt: skip
    """Return per row of ROWS how many prompts were shown right, per attribute."""
    if unknown := set(rows) - set(ROWS):
        raise ValueError(f"rows {sorted(unknown)} are not known; choose from {', '.join(ROWS)}")
    model = runtime.load(model_name)
    own = model.spec.defaults
    width, height = (int(n) for n in size.split("x")) if size else (own.width, own.height)
    judged: dict[str, list[dict[str, bool]]] = {row: [] for row in rows}
    shown, quality = [], []
    for number, scene in enumerate(scenes(prompts)):
        truth = to_bytes(render(scene, own.num_frames, height, width).frames)
        if "renders" in rows:
            judged["renders"].append(judge(scene, read(truth)))
        if "reconstructions" in rows:
            again = runtime.decode(model, runtime.encode(model, truth)).frames
            quality.append(10 * np.log10(255**2 / np.mean((again.astype(float) - truth) ** 2)))
            judged["reconstructions"].append(judge(scene, read(again)))
        if "text" not in rows:
            continue
        request = runtime.Request(
            prompt=caption(scene, style), width=width, height=height, seed=number, steps=steps, guidance=guidance
        )
        frames = runtime.generate(model, request).frames
        judged["text"].append(judge(scene, read(frames)))
        if len(shown) < 16:
            shown.append(np.concatenate([frames[i] for i in np.linspace(0, len(frames) - 1, 5).astype(int)], 1))
    if {"animation", "extension"} & set(rows):
        judged |= known_frames(model, scenes(prompts), width, height, steps)
    if sheet is not None and shown:
        from PIL import Image

        half = (len(shown) + 1) // 2
        blank = np.zeros_like(shown[0])
        columns = [np.concatenate(([*shown, blank])[i : i + half], 0) for i in (0, half)]
        Image.fromarray(np.concatenate(columns, 1)).save(sheet)
    found: dict[str, Any] = {name: table(rows_) for name, rows_ in judged.items()}
    if quality:
        print(f"reconstructions: {np.mean(quality):.1f} dB on average, {min(quality):.1f} at least")
    return found


def known_frames(
    model: runtime.Model, asked: list[Scene], width: int, height: int, steps: int
) -> dict[str, list[dict[str, bool]]]:
    """Return what is shown where a clip's beginning is given: its first frame (animation), its first half (extension).

    Only frames that the model made are read for things; for the motion the whole clip is.
    """
    judged: dict[str, list[dict[str, bool]]] = {"animation": [], "extension": []}
    for number, scene in enumerate(asked):
        truth = to_bytes(render(scene, 17, height, width).frames)
        common = {
            "prompt": caption(scene, "descriptive"),
            "width": width,
            "height": height,
            "seed": number,
            "steps": steps,
        }
        first = runtime.Request(**common, num_frames=17, clips=(runtime.Clip(truth[:1]),))
        half = runtime.Request(
            **common, num_frames=8, window=17, overlap=9, direction="forward", clips=(runtime.Clip(truth[:9]),)
        )
        for name, request, made in (("animation", first, 1), ("extension", half, 9)):
            frames = runtime.generate(model, request).frames
            things, whole = judge(scene, read(frames[made:])), judge(scene, read(frames))
            judged[name].append(
                {k: whole[k] if k in ("motion", "direction", "camera") else v for k, v in things.items()}
            )
    return judged


def framing(
    model_name: str, prompts: int, sizes: tuple[tuple[int, int], ...] = ((160, 96), (96, 160))
) -> dict[str, int]:
    """Return per size (width, height) how many clips show things whole in their middle frame.

    The report on Sora compares training at native sizes with training on square crops by this.
    """
    model = runtime.load(model_name)
    found = {}
    for width, height in sizes:
        shown = 0
        for number, scene in enumerate(s for s in scenes(4 * prompts) if s.camera == "still"):
            if number == prompts:
                break
            request = runtime.Request(prompt=caption(scene, "descriptive"), width=width, height=height, seed=number)
            shown += whole(runtime.generate(model, request).frames)
        found[f"{width}x{height}"] = shown
    return found


def ladder(model_names: Sequence[str], prompts: int, folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Return per model what it shows of the same prompts, as `evaluate`'s row "text"; write ladder.json and ladder.png.

    The sheet has a row per prompt (at most 8) and per model a frame of the first half and one of the last quarter.
    """
    from PIL import Image

    found: dict[str, dict[str, tuple[int, int]]] = {}
    rows: list[list[np.ndarray]] = [[] for _ in range(min(prompts, 8))]
    for name in model_names:
        model = runtime.load(name)
        judged = []
        for number, scene in enumerate(scenes(prompts)):
            frames = runtime.generate(model, runtime.Request(prompt=caption(scene, "descriptive"), seed=number)).frames
            judged.append(judge(scene, read(frames)))
            if number < len(rows):
                rows[number] += [frames[len(frames) // 3], frames[len(frames) * 4 // 5]]
        found[Path(name).name] = table(judged)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ladder.json").write_text(json.dumps(found, indent=1) + "\n")
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    Image.fromarray(sheet).quantize(200).save(folder / "ladder.png", optimize=True)
    return found


def to_bytes(frames: Any) -> np.ndarray:
    """Return uint8 frames [F, H, W, 3] of frames [F, 3, H, W] in [0, 1]."""
    return (frames.permute(0, 2, 3, 1) * 255).round().byte().numpy()
