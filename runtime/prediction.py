"""A prediction: what a request will take, as data, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

STAGES = ("text", "step", "denoise", "decode", "encode")
GIB = 2**30


@dataclass(frozen=True)
class Prediction:
    """What one request takes on one machine; stages are text, step, denoise, decode and encode.

    `flops` counts the published arithmetic: `text` of one prompt of full length, `forward` of one pass for one
    prompt, `denoise`, `decode` and `encode` of the clip, `total` of the request. `executed` counts the same as this
    runtime runs it. `seconds` and `peak_bytes` are those of the whole stage; `tokens`, `step` and `peak_bytes` of one
    window where there are several. What is known is encoded first where `encoded`; else `encode` is what it would take.
    """

    model: str
    machine: str
    basis: str  # "ideal" or "measured", as of the machine
    dtype: str
    width: int
    height: int
    canvas: tuple[int, int]  # (width, height) in pixels that it is made at, which all the rest is of
    frames: int
    steps: int
    guided: bool
    tokens: int
    flops: dict[str, float]
    executed: dict[str, float]
    bytes: dict[str, float]
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    bound: dict[str, str]
    weights_bytes: dict[str, int]
    memory: int
    choices: dict[str, Any]
    encoded: bool = False
    windows: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def most(self) -> int:
        """The highest peak of the stages that are run, in bytes."""
        return max(peak for stage, peak in self.peak_bytes.items() if stage != "encode" or self.encoded)

    def of_texts(self, field: str) -> float:
        """What of the total of `flops` or `executed` goes to encoding all prompts."""
        counted = getattr(self, field)
        return counted["total"] - counted["denoise"] - counted["decode"] - (counted["encode"] if self.encoded else 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


def summed(parts: Sequence[tuple[Prediction, Mapping[str, float]]], frames: int) -> Prediction:
    """Return the prediction of a request of so many frames: of its windows, each with how many times its stages text,
    denoise, decode and encode are run."""
    largest = max((each for each, _ in parts), key=lambda each: (each.tokens, each.most))
    encoded = largest.encoded

    def added(field: str, stages: Sequence[str]) -> dict[str, float]:
        return {stage: sum(times[stage] * getattr(each, field)[stage] for each, times in parts) for stage in stages}

    def flops_of(field: str) -> dict[str, float]:
        found = added(field, ("denoise", "decode", "encode"))
        texts = sum(times["text"] * each.of_texts(field) for each, times in parts)
        found["total"] = texts + sum(found[stage] for stage in ("denoise", "decode", *["encode"] * encoded))
        return getattr(largest, field) | found

    whole = ("text", "denoise", "decode", "encode")
    seconds = added("seconds", whole)
    seconds["total"] = sum(seconds[stage] for stage in whole if stage != "encode" or encoded)
    return replace(
        largest, frames=frames, windows=len(parts), encoded=encoded, flops=flops_of("flops"),
        executed=flops_of("executed"), seconds=largest.seconds | seconds, bytes=largest.bytes | added("bytes", whole),
    )  # fmt: skip


def table(found: Prediction) -> str:
    """Return the prediction as a table to read."""
    guided = "guided" if found.guided else "unguided"
    size = f"{found.width}x{found.height}"
    windows = "" if found.windows == 1 else f" in {found.windows} windows"
    if found.canvas != (found.width, found.height):
        size += " made at {}x{}".format(*found.canvas)
    lines = [
        f"{found.model}: {size}, {counted(found.frames, 'frame')}{windows}, {counted(found.steps, guided + ' step')}, "
        f"{found.tokens:,} tokens{' at once' if windows else ''}, on {found.machine} in {found.dtype}",
        f"{'':8}{'FLOPs':>11}{'traffic':>12}{'seconds':>12}{'peak memory':>14}  bound by",
    ]
    per_stage = {"step": found.flops["forward"] * (1 + found.guided)}
    per_stage["text"] = found.flops["text"] * (1 + found.guided)
    for stage in STAGES:
        flops = per_stage.get(stage, found.flops.get(stage, 0.0))
        traffic, seconds = scaled(found.bytes[stage], "B"), duration(found.seconds[stage])
        lines.append(
            f"{stage:8}{scaled(flops, 'FLOP'):>11}{traffic:>12}{seconds:>12}"
            f"{found.peak_bytes[stage] / GIB:>10.2f} GiB  {found.bound[stage]}"
        )
    total = f"{scaled(found.flops['total'], 'FLOP'):>11}, {duration(found.seconds['total'])}"
    offload, tiles = found.choices["offload"], found.choices["tiles"]
    held = "" if offload["blocks"] is None else f" ({offload['blocks']} blocks stay)"
    kind = "the device's peaks, nothing lost" if found.basis == "ideal" else "this machine's calibration"
    lines += [
        f"total   {total} by {kind}" + ("" if found.encoded else "; encode only with a clip"),
        f"memory  {found.memory / GIB:.2f} GiB may be used, {found.most / GIB:.2f} GiB are",
        f"choices engine {found.choices['engine']}, attention {found.choices['attention']}, text encoder "
        f"{offload['text_encoder']}, transformer {offload['transformer']}{held}, "
        f"tiles {'none' if tiles is None else f'{tiles[1]}x{tiles[0]}'}",
    ]
    return "\n".join(lines + [f"note    {note}" for note in found.notes])


def counted(number: int, what: str) -> str:
    """Return such as "81 frames", "1 frame"."""
    return f"{number:,} {what}" + "s" * (number != 1)


def scaled(number: float, unit: str) -> str:
    """Return a number with three digits and a decimal prefix."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {prefix}{unit}"
    return f"{number:.4g} {unit}"


def duration(seconds: float) -> str:
    """Return seconds with three digits: in ms below one, from a thousand in minutes, then in hours and days."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    for least, size, unit in ((172800, 86400, "days"), (7200, 3600, "h"), (999.5, 60, "min")):
        if seconds >= least:
            return f"{seconds / size:,.0f} {unit}" if seconds >= 999.5 * size else f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
