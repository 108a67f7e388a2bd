"""Known frames -> known latents: where the clips of a plan stand in what is sampled, and how firmly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from runtime.canvas import on_canvas
from runtime.clips import part_of
from runtime.decoding import encode, encode_chunks
from runtime.denoising import Known
from runtime.model import Model
from runtime.models.spec import Shown
from runtime.tasks import Window
from runtime.video import Video

PARTLY = 0.5  # how firmly a latent frame is held of which only some frames are given, and none before or behind it


def given_frames(window: Window, footage: Sequence[Video], tail: Sequence[np.ndarray] = ()) -> dict[int, np.ndarray]:
    """Return the frames that a window is given, uint8 [H, W, 3], by their place in what it samples.

    `footage` are the clips at the window's size; `tail` the last frames of what is there before it.
    """
    found = dict(enumerate(tail))
    for given in window.given:
        frames = list(part_of(footage[given.clip], given.start, given.count))
        frames += [frames[-1]] * (given.count - len(frames))
        found |= {given.at + i: frame for i, frame in enumerate(frames)}
    return dict(sorted(found.items()))


def firmness(window: Window) -> dict[int, float]:
    """Return how firmly each given frame is held, by its place."""
    held = dict.fromkeys(range(window.tail), 1.0)
    for given in window.given:
        held |= dict.fromkeys(range(given.at, given.at + given.count), given.hold)
    return held


def latent_holds(window: Window, step: int) -> list[float]:
    """Return how firmly each latent frame is held, 0 for those to be made; `step` is the time stride.

    A latent frame is known where all its frames are, or where one is a picture of its own: nothing moves in it then.
    Where only some are given and go on from a known latent frame, it is made: encoded, the rest of it would stand
    still, and what moves would have to catch up. Where nothing else of a clip is known, it is held while the noise is
    strong and made to fit afterwards.
    """
    held = firmness(window)
    pictures = {given.at: given.hold for given in window.given if given.count == 1}
    spans = [range(max(0, step * (t - 1) + 1), step * t + 1) for t in range(window.shape[1])]
    known = [all(frame in held for frame in span) for span in spans]
    holds = []
    for t, span in enumerate(spans):
        own = [held[f] for f in span if f in held]
        goes_on = span[0] in held and known[t - 1] if t else False
        leads_up = span[-1] in held and t + 1 < len(spans) and known[t + 1]
        share = 1.0 if known[t] else 0.0 if goes_on or leads_up else PARTLY
        shown = [pictures[f] for f in span if f in pictures]
        holds.append(max(shown) if shown else min(own, default=0.0) * share)
    return holds


def encode_known(model: Model, window: Window, given: Mapping[int, np.ndarray]) -> Known | None:
    """Return the latents of the given frames and how firmly they are held; None where there are none.

    The encoder sees the clip from its first frame on, so a place that is not given shows the nearest frame that is.
    """
    holds = latent_holds(window, model.spec.stride[0])
    if not any(holds):
        return None
    last = max(t for t, hold in enumerate(holds) if hold)
    height, width = canvas_of(model, window)
    count = 1 + last * model.spec.stride[0]
    shown = {place: on_canvas(frame, height, width) for place, frame in given.items()}
    video = Video(lambda: filled(shown, count), fps=1, num_frames=count, height=height, width=width)
    latents = torch.zeros(1, *window.shape)
    latents[0, :, : last + 1] = encode(model, video)
    return Known(latents.to(model.device), torch.tensor(holds))


def encode_channels(
    model: Model,
    window: Window,
    given: Mapping[int, np.ndarray],
    masks: Mapping[int, np.ndarray],
    references: Sequence[np.ndarray],
) -> torch.Tensor:
    """Return the channels [1, C, T, H, W] that the weights take of what is known.

    `masks` are true where a given frame [H, W] is to be made anew; `references` are pictures to look like [H, W, 3].
    """
    make = model.checkpoint.channels
    assert make is not None
    step, time = model.spec.stride[0], window.shape[1]
    height, width = canvas_of(model, window)

    def encoded(chunks: Callable[[], Iterable[torch.Tensor]]) -> torch.Tensor:
        return encode_chunks(model, chunks, window.shape[1:], None, model.vae_dtype).to(model.device)

    def chunks() -> Iterator[Shown]:
        for t in range(time):
            places = range(max(0, step * (t - 1) + 1), step * t + 1)
            pixels = torch.zeros(1, 3, len(places), height, width, device=model.device)
            known = torch.zeros(1, 1, len(places), height, width, device=model.device)
            for i, place in enumerate(places):
                if place in given:
                    pixels[0, :, i] = as_pixels(on_canvas(given[place], height, width)).to(model.device)
                    known[0, 0, i] = 1.0
                    if place in masks:
                        known[0, 0, i] = torch.from_numpy(~on_canvas(masks[place], height, width)).to(known)
            yield Shown(pixels, known)

    pictures = [as_pixels(on_canvas(picture, height, width))[None, :, None] for picture in references]
    return make(encoded, chunks, [picture.to(model.device) for picture in pictures])


def canvas_of(model: Model, window: Window) -> tuple[int, int]:
    """Return the (height, width) in pixels of what a window samples."""
    _, _, rows, columns = window.shape
    return rows * model.spec.stride[1], columns * model.spec.stride[2]


def as_pixels(frame: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).float() / 127.5 - 1.0


def given_masks(window: Window, masks: Mapping[int, Video]) -> dict[int, np.ndarray]:
    """Return where the given frames of clips with a mask are to be made anew, bool [H, W], by their place."""
    found = {}
    for given in window.given:
        if given.clip in masks:
            for i, frame in enumerate(part_of(masks[given.clip], given.start, given.count)):
                found[given.at + i] = frame[..., 0] > 127
    return found


def filled(given: Mapping[int, np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield `count` frames: the given ones in their places, elsewhere the nearest given one, the later of two."""
    places = np.array(sorted(given))
    for place in range(count):
        distance = np.abs(places - place)
        yield given[int(places[len(places) - 1 - int(distance[::-1].argmin())])]
