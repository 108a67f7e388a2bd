"""Request: what a user may ask. A mistake is a ValueError that says what was given, what is legal and what to do."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.clips import FITS, Clip, natural_size
from runtime.expansion import Expansion
from runtime.models.spec import ModelSpec, nearest_counts
from runtime.recipes import RECIPES
from runtime.samplers import LEGAL_OPTIONS
from runtime.storyboard import Card, card_of, check_cards

if TYPE_CHECKING:
    import torch

DIRECTIONS = {"forward": "extend", "backward": "prepend", "between": "connect"}
SMALL_AREA = 416 * 240  # pixels of a draft that shows something, where a quarter of the model's own size is more
POSITIONS = ("ntk", "riflex")
QUALITIES = {"exact": math.inf, "high": 32.0, "fast": 26.0}  # least PSNR in dB against the exact video of the seed
MOST = 1000.0  # of guidance and shift: beyond that no number is left of a video; and of frames per second
MOST_STEPS = 10_000  # ten for each noise level that models are trained on
MOST_FRAMES = 1_000_000
WHOLE = 3  # up to so many times the model's own length a video is made at once, beyond that window by window


def check_sigmas(given: Any) -> tuple[float, ...]:
    """Return noise levels as floats; ValueError unless they fall from 1 at most to more than 0."""
    numbers = (
        isinstance(given, list | tuple)
        and given
        and all(isinstance(s, int | float) and not isinstance(s, bool) for s in given)
    )
    levels = tuple(float(s) for s in given) if numbers else ()
    if not levels or any(not high > low for high, low in zip((1.0 + 1e-9, *levels), (*levels, 0.0), strict=True)):
        raise ValueError(
            f"sigmas is {given!r}; legal: falling numbers from 1 at most to more than 0, such as 1,0.75,0.5"
        )
    return levels


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to make; None means the model's own published default, and a random seed is drawn and reported.

    `width` and `height` are pixels, even of a video, and need not be multiples that the model makes; `num_frames` are
    frames, `fps` frames per second; `guidance_2` is the second expert's, who works below sigma `boundary`. Raises
    ValueError for values that no model could take.

    With `clips` and nothing more, each stands in the result where its `at` says. `direction` "forward" goes on after
    the one clip, "backward" comes before it, "between" connects two: `num_frames` (or `seconds`) then counts the new
    frames alone. `periodic` makes a loop, of the text or of a clip. `strength` in (0, 1] makes a clip anew from that
    sigma on; further clips stand in the result as they are. `references` are pictures to look like. A `storyboard` has
    cards instead of a prompt. `fit` ("crop", "pad", "stretch") brings clips to the size asked for. A video much longer
    than the model's own length is made in windows of `window` frames that share `overlap`. `expand` says who writes the
    prompt out. `positions` ("ntk", "riflex") spreads them where a video is larger or longer than the model's own.
    `recipe` names how distilled weights are sampled (runtime/recipes.py); `sigmas` are the levels that the network is
    asked at, falling from 1 at most to more than 0, in the place of `steps` and `shift`.
    `quality` is "exact", or what may be given up for speed: "high", "fast", or a floor in dB of the PSNR against the
    exact video of the same seed.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    boundary: float | None = None
    shift: float | None = None
    sampler: str | None = None
    seed: int | None = None
    clips: tuple[Clip, ...] = ()
    references: tuple[Clip, ...] = ()
    storyboard: tuple[Card, ...] = ()
    direction: str | None = None
    periodic: bool = False
    strength: float | None = None
    fit: str = "crop"
    window: int | None = None
    overlap: int | None = None
    resample: int | None = None
    expand: Expansion | None = None
    positions: str | None = None
    quality: str | float = "exact"
    recipe: str | None = None
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(given := getattr(self, name), str):
                raise ValueError(f"{name} is a {type(given).__name__}; legal: text")
            try:
                given.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} holds no text at {error.start} (half a character); legal: UTF-8") from error
        if not self.prompt.strip() and not self.clips and not self.storyboard:
            raise ValueError("the prompt is empty; legal: some text, so say what the video shows")
        for name in ("width", "height", "num_frames", "steps", "window", "overlap", "resample"):
            given = getattr(self, name)
            if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
                raise ValueError(f"{name} is {given!r}; legal: a whole number of at least 1")
        if self.steps is not None and self.steps > MOST_STEPS:
            raise ValueError(f"steps is {self.steps}; legal: up to {MOST_STEPS}")
        for name, floor, most in (
            ("fps", 0.0, MOST), ("seconds", 0.0, 1e6), ("guidance", -math.inf, MOST),
            ("guidance_2", -math.inf, MOST), ("shift", 0.0, MOST), ("strength", 0.0, math.inf), ("boundary", 0.0, 1.0),
        ):  # fmt: skip
            given = getattr(self, name)
            if given is None:
                continue
            if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
                raise ValueError(f"{name} is {given!r}; legal: a finite number")
            if given <= floor:
                raise ValueError(f"{name} is {given!r}; legal: more than {floor:g}")
            if abs(given) > most:
                raise ValueError(f"{name} is {given!r}; legal: up to {most:.0f}")
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64
        ):
            raise ValueError(f"seed is {self.seed!r}; legal: a whole number from 0 to 2^64 - 1")
        for name, legal in (
            ("sampler", sorted(LEGAL_OPTIONS)),
            ("direction", sorted(DIRECTIONS)),
            ("fit", FITS),
            ("positions", POSITIONS),
            ("recipe", sorted(RECIPES)),
        ):
            if (given := getattr(self, name)) is not None and given not in legal:
                raise ValueError(f"{name} is {given!r}; legal: {', '.join(legal)}")
        given = self.quality
        number = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given) and given > 0
        if not number and (not isinstance(given, str) or given not in QUALITIES):
            raise ValueError(f"quality is {given!r}; legal: {', '.join(QUALITIES)}, or a floor in dB such as 32")
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", check_sigmas(self.sigmas))
        if isinstance(self.expand, Mapping):
            object.__setattr__(self, "expand", Expansion(**self.expand))
        self._check_clips()

    def _check_clips(self) -> None:
        if self.storyboard:
            cards = check_cards(tuple(card_of(card, Path()) for card in self.storyboard))
            if self.direction or self.periodic or self.strength is not None or self.seconds:
                raise ValueError("a storyboard says by itself what is made and how long it is; give nothing beside it")
            object.__setattr__(self, "storyboard", cards)
            object.__setattr__(self, "clips", tuple(card.clip for card in cards if card.clip is not None))
        for name in ("clips", "references"):
            given = tuple(Clip(**c) if isinstance(c, Mapping) else c for c in getattr(self, name))
            if wrong := next((c for c in given if not isinstance(c, Clip)), None):
                raise ValueError(f"{name} holds a {type(wrong).__name__}; legal: runtime.Clip")
            object.__setattr__(self, name, given)
        clips = self.clips
        if sum((self.periodic, self.direction is not None, self.strength is not None)) > 1:
            raise ValueError("direction, periodic and strength are three tasks; give one of them")
        if self.strength is not None and self.strength > 1:
            raise ValueError(
                f"strength is {self.strength!r}; legal: more than 0, up to 1 (nothing of the clip is left)"
            )
        any_number = max(1, len(clips))
        wanted = {"extend": (1, 1), "prepend": (1, 1), "connect": (2, 2), "loop": (0, 1), "edit": (1, any_number)}
        least, most = wanted.get(self.task, (0, any_number))
        if not least <= len(clips) <= most:
            legal = f"{least}" if least == most else f"{least} or {most}"
            raise ValueError(f"{len(clips)} clips are given; the task {self.task!r} takes {legal}")

    def _own_clips(self) -> tuple[str, ...]:
        return ("references",) if self.storyboard else ("clips", "references")

    @classmethod
    def from_receipt(cls, path: str | Path) -> Request:
        """Return the request in a receipt that was saved; ValueError for any other file."""
        try:
            asked = json.loads(Path(path).read_text(encoding="utf-8"))["request"]
            unknown = sorted(asked.keys() - {f.name for f in fields(cls)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no receipt ({error}); legal: what --receipt wrote") from error
        if unknown:
            raise ValueError(f"{path} asks for {', '.join(unknown)}, which this version does not know")
        return cls(**asked)

    @property
    def task(self) -> str:
        """What is asked: "text", "place", "extend", "prepend", "connect", "loop", "edit" or "storyboard"."""
        if self.storyboard:
            return "storyboard"
        if self.periodic:
            return "loop"
        if self.strength is not None:
            return "edit"
        if self.direction is not None:
            return DIRECTIONS[self.direction]
        return "place" if self.clips else "text"

    @property
    def still(self) -> bool:
        """Tell whether a resolved request is for a picture, one frame."""
        return self.num_frames == 1 and self.task in ("text", "place", "edit")

    @property
    def floor(self) -> float:
        """The least PSNR in dB against the exact video; infinite for "exact"."""
        return QUALITIES[self.quality] if isinstance(self.quality, str) else float(self.quality)

    def record(self) -> dict[str, Any]:
        """Return what a receipt says of it; Request(**record) asks the same again where clips came from files."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["expand"] = None if self.expand is None else asdict(self.expand)
        plain["storyboard"] = [card.record() for card in self.storyboard]
        if self.storyboard:
            plain |= {"clips": [], "num_frames": None}
        return plain | {name: [clip.record() for clip in getattr(self, name)] for name in self._own_clips()}

    def resolved(self, spec: ModelSpec) -> Request:
        """Return the request with every None filled from the model and the clips; ValueError where it cannot be made.

        A clip brings its own size, as far as the model makes it, and its own rate.
        """
        own = spec.defaults
        for name in ("guidance_2", "boundary"):
            if (given := getattr(self, name)) is not None and spec.boundary is None:
                raise ValueError(f"{name} is {given:g}, but {spec.name} has one expert; leave it out")
        filled = self._sampling(spec) | ({"boundary": spec.boundary} if self.boundary is None else {})
        if self.guidance_2 is None and spec.boundary is not None:
            guidance = filled.get("guidance", self.guidance)
            alike = own.guidance_2 is None or filled.get("recipe", self.recipe) is not None
            filled["guidance_2"] = guidance if alike else own.guidance_2
        if self.seed is None:
            filled["seed"] = secrets.randbelow(2**31)
        if self.fps is None:
            filled["fps"] = next((clip.fps for clip in self.clips if clip.fps is not None), own.fps)
        width, height = own.width, own.height
        if self.clips:
            video = self.clips[0].video
            width, height = natural_size(video.width, video.height, spec.size_multiple, width * height)
        filled |= {"width": self.width or width, "height": self.height or height}
        request = replace(self, **filled)
        request._check_conditioning(spec)
        request = replace(request, **request._lengths(spec))
        request._check_size(spec)
        return request

    def _sampling(self, spec: ModelSpec) -> dict[str, Any]:
        """Return what the recipe and the model's defaults fill in of steps, sigmas, sampler, shift and guidance.

        The model's own recipe and sigmas hold where the request gives no steps of its own.
        """
        own, filled = spec.defaults, dict[str, Any]()
        free = self.steps is None and self.sigmas is None
        recipe, sigmas = self.recipe or (own.recipe if free else None), self.sigmas
        if recipe is not None:
            filled |= {"recipe": recipe, "sampler": RECIPES[recipe].sampler, "guidance": RECIPES[recipe].guidance}
            sigmas = sigmas or RECIPES[recipe].sigmas
        elif free and own.sigmas is not None:
            sigmas = check_sigmas(own.sigmas)
        if sigmas is not None:
            if self.steps not in (None, len(sigmas)):
                raise ValueError(f"steps is {self.steps}, and {len(sigmas)} sigmas are given; leave the steps out")
            filled |= {"sigmas": sigmas, "steps": len(sigmas)}
        defaults = {name: getattr(own, name) for name in ("steps", "guidance", "shift", "sampler")}
        return {
            name: value
            for name, value in (defaults | filled).items()
            if name in ("recipe", "sigmas") or getattr(self, name) is None
        }

    def schedule(self, spec: ModelSpec, start: float = 1.0) -> torch.Tensor:
        """Return the sigmas [steps + 1] float64 of a resolved request; those above `start` are skipped."""
        from runtime.schedules import NEARLY_NOISE, given_schedule, make_schedule

        assert self.steps and self.shift is not None
        if self.sigmas is None:
            return make_schedule(spec.schedule, self.steps, self.shift, start)
        first = min(self.sigmas[0], NEARLY_NOISE) if self.sampler == "unipc" else self.sigmas[0]
        return given_schedule((first, *self.sigmas[1:]), start)

    def drafted(self, spec: ModelSpec) -> Request:
        """Return a resolved request as a draft, of at most a fifth of its cost.

        Half as wide and high with a third of the steps; where that is too small to show anything, a fifth of the steps.
        Given sigmas stay: a distilled model has no step to spare.
        """
        assert self.width and self.height and self.steps
        down, across = spec.size_multiple
        if self.width * self.height >= min(spec.defaults.width * spec.defaults.height, 4 * SMALL_AREA):
            width = max(across, self.width // 2 // across * across)
            height = max(down, self.height // 2 // down * down)
            fewer = self.steps if self.sigmas is not None else max(1, self.steps // 3)
            return replace(self, width=width, height=height, steps=fewer)
        return self if self.sigmas is not None else replace(self, steps=max(1, self.steps // 5))

    def _lengths(self, spec: ModelSpec) -> dict[str, Any]:
        """Return `num_frames`, `window` and `overlap`, each as given or as fits the task."""
        assert self.fps is not None
        time, own = spec.stride[0] * spec.patch[0], spec.defaults.num_frames
        overlap = self.overlap or 1 + time * max(1, (own - 1) // time // 4)
        frames = self.num_frames
        if self.seconds is not None:
            frames = max(1, round(self.seconds * self.fps))
            if self.task == "loop" and not self.clips:
                frames = max(1, round(frames / time)) * time
            if self.num_frames not in (None, frames):
                raise ValueError(
                    f"num_frames is {self.num_frames}, but {self.seconds:g} seconds at {self.fps:g} frames per second "
                    f"are {frames}; give one of them"
                )
        if self.storyboard:
            frames = max(1, round(self.storyboard[-1].end * self.fps))
        if frames is None:
            counts = [clip.count(self.fps) for clip in self.clips]
            frames = {
                "extend": max(own - overlap, time),
                "prepend": max(own - overlap, time),
                "connect": max(own - 2 * overlap, time),
                "loop": max(own - 2 * overlap, time) if counts else own - 1,
                "edit": counts[0] if counts else 0,
                "place": max([own, *(n + c.at for c, n in zip(self.clips, counts, strict=True) if c.at != "end")]),
            }.get(self.task, own)
        if frames > MOST_FRAMES:
            raise ValueError(f"num_frames is {frames}; legal: up to {MOST_FRAMES}, and no more in seconds either")
        room = spec.sampled_frames(frames + 2 * overlap)
        window = self.window or (max(own, room) if frames <= WHOLE * own else max(own, overlap + time))
        return {"num_frames": frames, "window": window, "overlap": overlap}

    def _check_conditioning(self, spec: ModelSpec) -> None:
        if self.references and spec.conditioning != "control":
            raise ValueError(f"reference pictures are given, and {spec.name} takes none; leave them out, or take VACE")
        if any(clip.mask is not None for clip in self.clips) and spec.conditioning != "control":
            raise ValueError(f"a clip has a mask, and {spec.name} takes whole frames; leave it out, or take VACE")
        shown = [clip for clip in self.clips[1:] if clip.hold == 1] if self.task == "edit" else self.clips
        if spec.conditioning == "channels" and not shown:
            raise ValueError(f"{spec.name} goes on from known frames; give a picture, or take a text-to-video model")

    def _check_size(self, spec: ModelSpec) -> None:
        assert self.width and self.height and self.num_frames and self.window and self.overlap
        down, across = spec.size_multiple
        if self.height < down or self.width < across:
            smallest = "x".join(str(n + n % 2) for n in (max(self.width, across), max(self.height, down)))
            raise ValueError(
                f"the size is {self.width}x{self.height}; {spec.name} makes {across}x{down} at least: take {smallest}"
            )
        time = spec.stride[0] * spec.patch[0]
        at_once = spec.sampled_frames(min(self.num_frames, self.window))
        for what, given, tokens, per_token in (
            ("num_frames", at_once, 1 + (at_once - 1) // time, time),
            ("height", self.height, -(-self.height // down), down),
            ("width", self.width, -(-self.width // across), across),
        ):
            if tokens > spec.max_positions:
                most = spec.max_positions * per_token
                most = most - time + 1 if what == "num_frames" else most
                raise ValueError(
                    f"{what} is {given}; {spec.name} has positions for {most} at most: ask for {most} or less"
                )
        if not self.still and (self.width % 2 or self.height % 2):
            smaller, larger = ("x".join(str(n + n % 2 * by) for n in (self.width, self.height)) for by in (-1, 1))
            raise ValueError(
                f"the size is {self.width}x{self.height}; the width and height of a video are even: take {smaller} or "
                f"{larger}"
            )
        text_at_once = self.task == "text" and self.seconds is None and self.window >= self.num_frames
        if text_at_once and (self.num_frames - 1) % time:
            below, above = nearest_counts(self.num_frames, time)
            raise ValueError(
                f"num_frames is {self.num_frames}; {spec.name} makes 1 + {time} * n frames: take {below} or {above}"
            )
        for name, least in (("overlap", 1), ("window", self.overlap + time)):
            given = getattr(self, name)
            if (given - 1) % time or given < least:
                raise ValueError(f"{name} is {given}; legal: 1 + {time} * n frames, at least {least}")
