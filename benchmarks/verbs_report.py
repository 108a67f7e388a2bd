"""What `python -m benchmarks verbs` tells: a table of measures, a sheet of frames per verb, and one of all verbs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks import pixels

EVEN = 1.5  # the largest step at a seam that passes, in medians inside
STEERED = 45.0  # degrees by which a direction may differ and is kept
COLUMNS = 8  # frames of a clip that a sheet shows
LABEL = 96  # pixels for the name of a verb
COLOURS = 255  # of the sheet of all verbs, which is kept

Measures = Mapping[str, float | bool | None]  # None: nothing was seen to measure

BARS: dict[str, Callable[[float], bool]] = {
    "step at the seam": lambda v: v <= EVEN,
    "colour step at the seam": lambda v: v <= EVEN,
    "last to first": lambda v: v <= EVEN,
    "low-pass of the draft, dB": lambda v: v >= 24,
    "draft, share of the seconds": lambda v: v <= 0.2,
    "direction off, degrees": lambda v: v <= STEERED,
    "speed, of the drawn one": lambda v: 0.5 <= v <= 1.5,
    "ground drift, levels": lambda v: v <= 8,
}


def table(record: Mapping[str, Any]) -> str:
    """Return all rows of a record as a table."""
    about, machine = record["asked"], record["machine"]
    head = (
        f"{record['model']}, known frames by {record['conditioning']}, {about['prompts']} held-out prompts per verb, "
        f"{about['size']}, {about['steps']} steps; {machine['name']}, {machine['threads']} threads, commit "
        f"{machine['commit']}, {sum(row['seconds'] for row in record['rows']):.0f} s in all"
    )
    lines = [head, "", "| verb | measure | median | worst | passes |", "| --- | --- | ---: | ---: | ---: |"]
    for row in record["rows"]:
        for measure in row["measures"][0]:
            lines.append(line(row["verb"], measure, [each[measure] for each in row["measures"]]))
    return "\n".join(lines)


def line(verb: str, measure: str, values: Sequence[float | bool | None]) -> str:
    """Return one row: median and worst of a measure, and how many pass where it has a bar; unseen ones do not pass."""
    seen = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in values):
        return f"| {verb} | {measure} | | | {sum(map(bool, values))} of {len(values)} |"
    if not seen:
        return f"| {verb} | {measure} | not seen | | |"
    worst = min(seen) if measure.endswith("dB") else max(seen)
    passed = f"{sum(map(BARS[measure], seen))} of {len(values)}" if measure in BARS else ""
    return f"| {verb} | {measure} | {statistics.median(seen):.2f} | {worst:.2f} | {passed} |"


def plain(measures: Mapping[str, float | bool]) -> Measures:
    """Return measures as JSON has them: None for what is no number."""
    return {name: bool(v) if isinstance(v, bool | np.bool_) else number(v) for name, v in measures.items()}


def number(value: float) -> float | None:
    """Return a number rounded to ten thousandths; None for NaN, and as much as JSON holds for infinity."""
    return None if math.isnan(value) else round(min(float(value), 1e9), 4)


def save_sheet(clips: Sequence[np.ndarray], file: Path) -> Path:
    """Write a PNG with a row per clip, from its first frame to its last."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.sheet(clips, COLUMNS)).save(file)
    return file


def save_overview(sheets: Mapping[str, Path], prompts: int, file: Path) -> Path:
    """Write a PNG with the first clip of each verb, from the sheets that are there, in few colours."""
    rows = []
    for verb, path in sheets.items():
        if path.is_file():
            with Image.open(path) as sheet:
                rows.append((verb, sheet.convert("RGB").crop((0, 0, sheet.width, sheet.height // prompts))))
    width = min(row.width for _, row in rows)
    scaled = [(verb, row.resize((width, round(row.height * width / row.width)))) for verb, row in rows]
    whole = Image.new("RGB", (LABEL + width, sum(row.height for _, row in scaled)), "white")
    draw, top = ImageDraw.Draw(whole), 0
    for verb, row in scaled:
        draw.text((4, top + row.height // 2 - 6), verb, fill="black")
        whole.paste(row, (LABEL, top))
        top += row.height
    whole.quantize(COLOURS).save(file, optimize=True)
    return file
