"""Request: what a user may ask. A mistake is a ValueError that says what was given, what is legal and what to do."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace

from runtime.models.spec import ModelSpec, nearest_counts, nearest_multiples
from runtime.samplers import LEGAL_OPTIONS


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to make; None means the model's own published default, and a random seed is drawn and reported.

    `width` and `height` are pixels, `num_frames` frames, `fps` frames per second; `guidance_2` is the second
    expert's. Raises ValueError for values that no model could take.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    shift: float | None = None
    sampler: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(given := getattr(self, name), str):
                raise ValueError(f"{name} is a {type(given).__name__}; legal: text")
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; legal: some text, so say what the video shows")
        for name in ("width", "height", "num_frames", "steps"):
            given = getattr(self, name)
            if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
                raise ValueError(f"{name} is {given!r}; legal: a whole number of at least 1")
        for name, floor in (("fps", 0.0), ("guidance", None), ("guidance_2", None), ("shift", 0.0)):
            given = getattr(self, name)
            if given is None:
                continue
            if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
                raise ValueError(f"{name} is {given!r}; legal: a finite number")
            if floor is not None and given <= floor:
                raise ValueError(f"{name} is {given!r}; legal: more than {floor:g}")
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64
        ):
            raise ValueError(f"seed is {self.seed!r}; legal: a whole number from 0 to 2^64 - 1")
        if self.sampler is not None and self.sampler not in LEGAL_OPTIONS:
            raise ValueError(f"sampler is {self.sampler!r}; legal: {', '.join(sorted(LEGAL_OPTIONS))}")

    def resolved(self, spec: ModelSpec) -> Request:
        """Return the request with every None filled from the model; ValueError where the model cannot make it."""
        own = spec.defaults
        if self.guidance_2 is not None and spec.boundary is None:
            raise ValueError(f"guidance_2 is {self.guidance_2:g}, but {spec.name} has one expert; leave it out")
        filled = {
            name: getattr(own, name)
            for name in ("width", "height", "num_frames", "fps", "steps", "guidance", "shift", "sampler")
            if getattr(self, name) is None
        }
        if self.guidance_2 is None and spec.boundary is not None:
            guidance = filled.get("guidance", self.guidance)
            filled["guidance_2"] = own.guidance_2 if own.guidance_2 is not None else guidance
        if self.seed is None:
            filled["seed"] = secrets.randbelow(2**31)
        request = replace(self, **filled)
        request._check_size(spec)
        return request

    def _check_size(self, spec: ModelSpec) -> None:
        assert self.width and self.height and self.num_frames
        down, across = spec.size_multiple
        if self.height % down or self.width % across:
            widths, heights = nearest_multiples(self.width, across), nearest_multiples(self.height, down)
            raise ValueError(
                f"the size is {self.width}x{self.height}; {spec.name} makes widths in multiples of {across} and "
                f"heights of {down}: take {widths[0]}x{heights[0]} or {widths[1]}x{heights[1]}"
            )
        time = spec.stride[0] * spec.patch[0]
        if (self.num_frames - 1) % time:
            below, above = nearest_counts(self.num_frames, time)
            raise ValueError(
                f"num_frames is {self.num_frames}; {spec.name} makes 1 + {time} * n frames: take {below} or {above}"
            )
        for what, given, tokens, per_token in (
            ("num_frames", self.num_frames, 1 + (self.num_frames - 1) // time, time),
            ("height", self.height, self.height // down, down),
            ("width", self.width, self.width // across, across),
        ):
            if tokens > spec.max_positions:
                most = spec.max_positions * per_token
                most = most - time + 1 if what == "num_frames" else most
                raise ValueError(
                    f"{what} is {given}; {spec.name} has positions for {most} at most: ask for {most} or less"
                )
