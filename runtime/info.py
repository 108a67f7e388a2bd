"""What a model on disk is, read from its configs and the headers of its weight files."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict

from runtime.models.spec import Checkpoint
from runtime.weights import Component, shapes


def describe(checkpoint: Checkpoint) -> str:
    """Return a readable description: family, networks, legal sizes, defaults, missing files."""
    spec = checkpoint.spec
    down, across = spec.size_multiple
    time = spec.stride[0] * spec.patch[0]
    lines = [
        f"model     {spec.name}",
        f"family    {spec.family}",
        f"folder    {checkpoint.folder}",
        *(f"{part.name:<17} {measure(part)}" for part in checkpoint.components),
        f"sizes     even, from {across}x{down} on, made at multiples of that; 1 + {time} * n frames; at most "
        f"{spec.max_positions * across}x{spec.max_positions * down}, {(spec.max_positions - 1) * time + 1} frames",
        f"latents   {spec.latent_channels} channels, one cell for {spec.stride[0]} frames x {spec.stride[1]} x "
        f"{spec.stride[2]} pixels",
        f"text      {spec.text_length} tokens",
        "defaults  " + ", ".join(f"{key} {value}" for key, value in asdict(spec.defaults).items() if value is not None),
    ]
    if spec.boundary is not None:
        lines.append(f"experts   the first from sigma 1 to {spec.boundary:g}, the second below")
    lines.append("missing   " + (", ".join(checkpoint.missing) or "nothing"))
    return "\n".join(lines)


def measure(part: Component) -> str:
    """Return parameters, dtypes and bytes of one network's files that are there."""
    there = [file for file in part.files if file.exists()]
    count, kinds = 0, Counter[str]()
    for file in there:
        for shape, kind in shapes(file).values():
            count += math.prod(shape)
            kinds[kind] += math.prod(shape)
    size = sum(file.stat().st_size for file in there)
    return f"{count / 1e6:,.2f} M parameters, {'/'.join(k for k, _ in kinds.most_common())}, {size / 1e6:,.1f} MB"
