"""Request -> Plan: a task says which frames are known, how firmly, and from which sigma sampling starts.

A plan has windows, which are sampled one after the other, and parts, which the result is put together from. Most have
one window; a long video has many, and each knows the last frames of what is there before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from runtime.models.spec import ModelSpec
from runtime.request import Request


@dataclass(frozen=True)
class Given:
    """`count` frames of a clip from `start` on, which are the frames from `at` on of what a window samples.

    Past a clip's end its last frame is repeated.
    """

    clip: int
    start: int
    count: int
    at: int
    hold: float = 1.0


@dataclass(frozen=True)
class Window:
    """What is sampled at once: latents of `shape` [C, T, H, W], from sigma `start` (1 = pure noise).

    `tail` is how many last frames of the result so far are known at its beginning.
    """

    shape: tuple[int, int, int, int]
    num_frames: int
    start: float = 1.0
    given: tuple[Given, ...] = ()
    tail: int = 0
    periodic: bool = False
    prompt: str | None = None  # None: the request's


@dataclass(frozen=True)
class Part:
    """Frames from `start` to `stop` of window `index`, or of clip `index`, in the result."""

    source: str  # "window" or "clip"
    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """How a request is made: what is sampled, and what the result consists of."""

    windows: tuple[Window, ...]
    parts: tuple[Part, ...]

    @property
    def num_frames(self) -> int:
        """How many frames the result has."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def plain(self) -> bool:
        """Tell whether the result is just what one window makes."""
        first = self.windows[0]
        return len(self.windows) == 1 and not first.given and not first.tail and self.num_frames == first.num_frames


def plan_task(request: Request, spec: ModelSpec, lengths: Sequence[int] | None = None) -> Plan:
    """Return the plan of a resolved request; `lengths` are the frames of its clips at its rate (None: counted).

    Raises ValueError for clips that are too short, overlap or lie outside.
    """
    if lengths is None:
        assert request.fps
        lengths = [clip.count(request.fps) for clip in request.clips]
    return TASKS[request.task](request, spec, tuple(lengths))


def text(request: Request, spec: ModelSpec, lengths: tuple[int, ...]) -> Plan:
    """Text to video, or to an image: nothing is known; beyond one window, what was made before."""
    assert request.num_frames and request.window
    first = min(request.num_frames, request.window)
    windows = [window(request, spec, first)]
    return onward(request, spec, windows, [Part("window", 0, 0, first)], request.num_frames - first)


def place(request: Request, spec: ModelSpec, lengths: tuple[int, ...]) -> Plan:
    """Animate a picture, keyframes, fill missing frames: each clip stands where its `at` says."""
    total = request.num_frames
    assert total
    return Plan((window(request, spec, total, placed(request, lengths, total)),), (Part("window", 0, 0, total),))


def placed(request: Request, lengths: Sequence[int], total: int, first: int = 0) -> list[Given]:
    """Return the clips from the `first` on, each where its `at` says, in order; ValueError outside and for overlaps."""
    given = []
    for index, (clip, count) in list(enumerate(zip(request.clips, lengths, strict=True)))[first:]:
        at = total - count if clip.at == "end" else clip.at
        assert isinstance(at, int)
        if at < 0 or at + count > total:
            raise ValueError(
                f"clip {index} has {count} frames and stands at {clip.at}, but the video has {total}: legal is a place "
                f"from 0 to {total - count}; ask for more frames or shorten the clip"
            )
        given.append(Given(index, 0, count, at, clip.hold))
    given.sort(key=lambda part: part.at)
    for before, after in pairwise(given):
        if before.at + before.count > after.at:
            raise ValueError(
                f"clips {before.clip} and {after.clip} both give frame {after.at}; legal: one clip for a frame, so "
                "move one or leave it out"
            )
    return given


def extend(request: Request, spec: ModelSpec, lengths: tuple[int, ...]) -> Plan:
    """Go on after a clip: its tail is known, and the result is the clip and the new frames."""
    assert request.num_frames
    return onward(request, spec, [], [Part("clip", 0, 0, lengths[0])], request.num_frames)


def prepend(request: Request, spec: ModelSpec, lengths: tuple[int, ...]) -> Plan:
    """Lead up to a clip: its head is known, and the result is the new frames and the clip."""
    new = at_once(request)
    head, total = context(request, spec, new, 0, lengths[0])
    head -= head % spec.stride[0] if head > spec.stride[0] else 0  # whole latent frames: no made frame shares one
    given = [Given(0, 0, head, total - head)]
    parts = Part("window", 0, total - head - new, total - head), Part("clip", 0, 0, lengths[0])
    return Plan((window(request, spec, total, given),), parts)


def connect(request: Request, spec: ModelSpec, lengths: tuple[int, ...]) -> Plan:
    """Connect two clips: the tail of one and the head of the other are known; the result is both and the new frames."""
    new = at_once(request)
    tail = whole(min(lengths[0], overlap(request)), spec)
    head, total = context(request, spec, new, tail, lengths[1])
    given = [Given(0, lengths[0] - tail, tail, 0), Given(1, 0, head, tail + new)]
    parts = (
        Part("clip", 0, 0, lengths[0]),
        Part("window", 0, tail, tail + new),
        Part("clip", 1, 0, lengths[1]),
    )
    return Plan((window(request, spec, total, given),), parts)


def loop(request: Request, spec: ModelSpec, lengths: tuple[int, ...]) -> Plan:
    """A loop of the text: time is periodic, no frame is the first. A loop of a clip: its tail leads to its head."""
    if lengths:
        if lengths[0] < 2:
            raise ValueError("the clip has 1 frame; a loop takes at least 2: animate the picture first")
        plan = connect(request, spec, (lengths[0], lengths[0]))
        (only,) = plan.windows
        tail, head = only.given
        given = (tail, Given(0, 0, head.count, head.at))
        return Plan((Window(only.shape, only.num_frames, given=given),), plan.parts[:2])
    total, time = at_once(request), spec.stride[0] * spec.patch[0]
    if total % time:
        below, above = max(total // time, 1) * time, -(-total // time) * time
        raise ValueError(f"num_frames is {total}; a loop has a multiple of {time}: take {below} or {above}")
    assert request.height and request.width
    channels, _, height, width = spec.latent_shape(1, request.height, request.width)
    shape = channels, total // spec.stride[0], height, width
    return Plan((Window(shape, total, periodic=True),), (Part("window", 0, 0, total),))


def edit(request: Request, spec: ModelSpec, lengths: tuple[int, ...]) -> Plan:
    """Make a clip anew (SDEdit, https://arxiv.org/abs/2108.01073): all is known, but only down to `strength`.

    Further clips are known to the end, in their places: the pictures of a draft, say.
    """
    assert request.strength is not None and request.num_frames
    total = min(request.num_frames, lengths[0])
    given = [Given(0, 0, spec.sampled_frames(total), 0, hold=1.0 - request.strength)]
    given += placed(request, lengths, total, first=1)
    return Plan((window(request, spec, total, given, start=request.strength),), (Part("window", 0, 0, total),))


def storyboard(request: Request, spec: ModelSpec, lengths: tuple[int, ...]) -> Plan:
    """Card after card, window by window; a card's clip is known in it, and its beginning to what leads up to it."""
    assert request.fps and request.num_frames and request.window
    starts = [0, *(round(card.start * request.fps) for card in request.storyboard[1:]), request.num_frames]
    clips = [i if card.clip is not None else None for i, card in enumerate(request.storyboard)]
    numbers = {card: number for number, card in enumerate(i for i in clips if i is not None)}
    windows: list[Window] = []
    parts: list[Part] = []
    for i, card in enumerate(request.storyboard):
        done, length = starts[i], starts[i + 1] - starts[i]
        own = lengths[numbers[i]] if i in numbers else 0
        following = lengths[numbers[i + 1]] if i + 1 in numbers else 0
        while (place := done - starts[i]) < length:
            tail = whole(min(done, overlap(request)), spec) if done else 0
            new = min(length - place, request.window - tail)
            given = [Given(numbers[i], place, min(own - place, new), tail)] if place < own else []
            ahead = min(following, spec.stride[0]) if place + new == length else 0
            given += [Given(numbers[i + 1], 0, ahead, tail + new)] if ahead else []
            parts.append(Part("window", len(windows), tail, tail + new))
            made = window(request, spec, tail + new + ahead, given, tail=tail)
            windows.append(replace(made, prompt=card.prompt))
            done += new
    return Plan(tuple(windows), tuple(parts))


TASKS = {
    "text": text, "place": place, "extend": extend, "prepend": prepend, "connect": connect, "loop": loop, "edit": edit,
    "storyboard": storyboard,
}  # fmt: skip


def window(
    request: Request,
    spec: ModelSpec,
    num_frames: int,
    given: Sequence[Given] = (),
    *,
    start: float = 1.0,
    tail: int = 0,
) -> Window:
    """Return a window for at least `num_frames` frames at the request's size."""
    assert request.height and request.width
    sampled = spec.sampled_frames(num_frames)
    shape = spec.latent_shape(sampled, request.height, request.width)
    return Window(shape, sampled, start=start, given=tuple(given), tail=tail)


def onward(request: Request, spec: ModelSpec, windows: list[Window], parts: list[Part], left: int) -> Plan:
    """Return the plan of `windows` and `parts` with `left` frames more behind them, window by window."""
    assert request.window
    there = sum(part.stop - part.start for part in parts)
    while left > 0:
        tail = whole(min(there, overlap(request)), spec)
        new = min(left, max(request.window - tail, 1))
        parts.append(Part("window", len(windows), tail, tail + new))
        windows.append(window(request, spec, tail + new, tail=tail))
        left, there = left - new, there + new
    return Plan(tuple(windows), tuple(parts))


def overlap(request: Request) -> int:
    """Return how many frames of what is there are shown to what is made next to it."""
    assert request.overlap
    return request.overlap


def whole(count: int, spec: ModelSpec) -> int:
    """Return the most frames, up to `count`, that whole latent frames from the first on stand for."""
    step = spec.stride[0]
    return 1 + (count - 1) // step * step


def context(request: Request, spec: ModelSpec, new: int, before: int, length: int) -> tuple[int, int]:
    """Return (frames of a following clip that are known, frames in all) where `before` + `new` frames come first.

    As many latent frames are known as of a clip before: the first of those stands for one frame, these for more.
    """
    total = spec.sampled_frames(before + new + min(length, overlap(request) + spec.stride[0] - 1))
    return min(length, total - before - new), total


def at_once(request: Request) -> int:
    """Return the frames to make where all must be in one window; ValueError where they are more than that."""
    assert request.num_frames and request.window
    if request.num_frames > request.window:
        raise ValueError(
            f"{request.num_frames} new frames are more than one window of {request.window}, and {request.task!r} is "
            "made in one: ask for fewer frames, or set a larger window"
        )
    return request.num_frames
