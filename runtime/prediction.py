"""A prediction: what a request will take, as data, as JSON and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

STAGES = ("text", "step", "denoise", "decode", "encode")
GIB = 2**30


@dataclass(frozen=True)
class Prediction:
    """What one request takes on one machine; stages are text, step, denoise, decode and encode.

    `flops` counts the published arithmetic: `text` of one prompt of full length, `forward` of one pass for one
    prompt, `decode` and `encode` of the clip, `total` of the request. `executed` counts the same as this runtime
    runs it. `seconds` and `peak_bytes` are those of the whole stage.
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
    notes: list[str] = field(default_factory=list)

    @property
    def most(self) -> int:
        """The highest peak of a request without a clip to encode, in bytes."""
        return max(peak for stage, peak in self.peak_bytes.items() if stage != "encode")

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


def table(found: Prediction) -> str:
    """Return the prediction as a table to read."""
    guided = "guided" if found.guided else "unguided"
    size = f"{found.width}x{found.height}"
    if found.canvas != (found.width, found.height):
        size += " made at {}x{}".format(*found.canvas)
    lines = [
        f"{found.model}: {size}, {found.frames} frames, {found.steps} {guided} steps, "
        f"{found.tokens:,} tokens, on {found.machine} in {found.dtype}",
        f"{'':8}{'FLOPs':>11}{'traffic':>12}{'seconds':>12}{'peak memory':>14}  bound by",
    ]
    per_stage = {"step": found.flops["forward"] * (1 + found.guided)}
    per_stage["text"] = found.flops["text"] * (1 + found.guided)
    per_stage["denoise"] = per_stage["step"] * found.steps
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
        f"total   {total} by {kind}; encode only with a clip",
        f"memory  {found.memory / GIB:.2f} GiB may be used, {found.most / GIB:.2f} GiB are",
        f"choices engine {found.choices['engine']}, attention {found.choices['attention']}, text encoder "
        f"{offload['text_encoder']}, transformer {offload['transformer']}{held}, "
        f"tiles {'none' if tiles is None else f'{tiles[1]}x{tiles[0]}'}",
    ]
    return "\n".join(lines + [f"note    {note}" for note in found.notes])


def scaled(number: float, unit: str) -> str:
    """Return a number with three digits and a decimal prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {prefix}{unit}"
    return f"{number:.4g} {unit}"


def duration(seconds: float) -> str:
    """Return seconds with three digits, in ms below one."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
