"""Results -> a Markdown table, ready for the README."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.measure import median_ratio

LABELS = {
    "request": "whole request",
    "step": "one guided step",
    "decode": "VAE decode",
    "decode_bfloat16": "VAE decode, ours in bfloat16",
    "encode": "VAE encode",
    "text": "text encoding",
}
NETWORKS = {"transformer": "DiT", "transformer_2": "second DiT", "vae": "VAE", "text_encoder": "text encoder"}


def table(record: dict[str, Any]) -> str:
    """Return the record of `stages` as Markdown: the machine, then a table per model, then how it was measured."""
    machine, names = record["machine"], record["sides"]
    packages = [f"{name} {machine['versions'][name]}" for name in ("torch", "diffusers") if name in machine["versions"]]
    threads = ", ".join(counted(machine[key], key) for key in ("logical_cores", "threads"))
    where = ", ".join([machine["name"], threads, *packages, record["dtype"], f"commit {machine['commit']}"])
    parts = [f"**{where}**"]
    for model in record["models"]:
        parts += [heading(model), "\n".join(rows(model, names))]
    return "\n\n".join([*parts, method(names, machine["device"])])


def heading(model: dict[str, Any]) -> str:
    """Return what the model is, what was asked of it, and whether the sides agreed."""
    request = model["request"]
    sizes = ", ".join(f"{NETWORKS.get(name, name)} {count / 1e6:.2f} M" for name, count in model["parameters"].items())
    asked = f"{request['width']}x{request['height']}, {request['num_frames']} frames, {request['steps']} steps"
    text = f"{model['name']} ({sizes}): {asked}, guidance {request['guidance']:g}"
    if model["difference"] is not None:
        text += f"; largest difference of the frames {model['difference']:g} of 255"
    return text


def counted(number: int, what: str) -> str:
    """Return "1 thread", "2 threads"."""
    what = what.replace("_", " ")
    return f"{number} {what if number != 1 else what.removesuffix('s')}"


def rows(model: dict[str, Any], names: list[str]) -> list[str]:
    """Return the lines of one model's table."""
    compared = len(names) > 1
    lines = [_row(["", *names, *(["ratio"] if compared else [])]), _row(["---", *["---:"] * (len(names) + compared)])]
    for stage, found in model["stages"].items():
        cells = durations([found["seconds"][name] for name in names])
        label = LABELS[stage] + (f" ({found['psnr']:.1f} dB)" if "psnr" in found else "")
        lines.append(_row([label, *cells, *([f"{found['ratio']:.2f}"] if compared else [])]))
    for stage, found in model["memory"].items():
        if None in found[names[0]]:
            continue
        grown = [[run["growth"] / 2**20 for run in found[name]] for name in names]
        cells = [f"{statistics.median(n):.0f} MiB ({min(n):.0f} to {max(n):.0f})" for n in grown]
        ratio = [f"{median_ratio(*grown):.2f}" if all(grown[0]) else "-"] if compared else []
        lines.append(_row([f"peak memory added, {LABELS[stage]}", *cells, *ratio]))
    return lines


def durations(seconds: list[list[float]]) -> list[str]:
    """Return "median (least to most)" of each side, all in one unit: ms where one of them is below a second."""
    short = min(map(statistics.median, seconds)) < 1
    unit, scale = ("ms", 1e3) if short else ("s", 1.0)

    def number(value: float) -> str:
        return f"{value * scale:.{0 if value * scale >= 100 else 1 if short else 2}f}"

    return [f"{number(statistics.median(n))} {unit} ({number(min(n))} to {number(max(n))})" for n in seconds]


def method(names: list[str], device: str) -> str:
    """Return how to read the numbers."""
    kind = "allocated device memory" if device == "cuda" else "resident memory"
    text = (
        "Median (least to most). Every whole request and every text encoding has a prompt and a negative prompt not "
        "seen before, so the text cache never helps; a request ends with uint8 frames in memory. Memory is the highest "
        f"{kind} in the first run after loading, less what it was just before, each in a new process."
    )
    if len(names) == 1:
        return text
    ours, theirs = names
    return f"{text} Both sides take turns in one process; ratio is the median over the pairs of {theirs} / {ours}."


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
