"""The whole way from a request to a video; read this file first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from runtime.budget import Choice, account, check, choose
from runtime.caches import EXACT
from runtime.canvas import framed
from runtime.checkpoints import Checkpoints
from runtime.clips import Clip, conformed, part_of
from runtime.decoding import decode
from runtime.denoising import Known, OnState, OnStep, Terms, denoise, prepare_context, visits
from runtime.expansion import expand
from runtime.fidelity import frame_psnr, frame_ssim, psnr
from runtime.known import encode_channels, encode_known, firmness, given_frames, given_masks
from runtime.latents import check_latents, draw_noise
from runtime.model import Model
from runtime.pictures import encode_pictures
from runtime.planner import foresee, learn
from runtime.receipt import Receipt
from runtime.request import Request
from runtime.samplers import SamplerState
from runtime.sound import Sound, cut
from runtime.splicing import Splicer
from runtime.tasks import Given, Part, Plan, Window, plan_task
from runtime.text import encode_prompt
from runtime.trace import mark, recording, span
from runtime.video import Video

ROUNDED = "known frames encoded in 16 bits; the dtype float32 encodes in float32"
FINISH = 0.35  # sigma from which a draft is made into the final video: at 0.45 the built-in model strays below 24 dB
LEAD = 8  # latent frames decoded before the first of a loop, so that the decoder has forgotten where it began


def generate(
    model: Model,
    request: Request,
    *,
    noise: torch.Tensor | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    predict: bool = True,
) -> Video:
    """Make the video that a request asks for; its frames are decoded as they are iterated or saved.

    `noise` is [C, T, H, W] or [1, C, T, H, W], the first window's, drawn from the seed where None; `on_step(step,
    total, latents, estimate)` is called after each step, with what it took for the clean latents, and may raise
    Cancelled. `checkpoints` keep the state of the sampling, and where they hold one of this request it goes on from
    there, to the same frames. `predict` puts on the receipt what is foreseen; a machine that nobody measured is
    measured for it briefly, once, in about a second. Raises ValueError for what cannot be made.
    """
    job = begin(model, request, on_step, checkpoints, predict=predict)
    plan, request = job.plan, job.request
    assert request.width and request.height and request.fps
    given = given_frames(plan.windows[0], job.footage, before_first(job))
    with mark("request"):
        latents = sample(job, 0, given, noise)
    if plan.plain:
        learn(model, job.receipt)
    video = decode_window(job, 0, latents)
    if plan.plain:
        return video
    return Video(
        lambda: assemble(job, latents, given),
        fps=request.fps,
        num_frames=plan.num_frames,
        height=request.height,
        width=request.width,
        latents=video.latents if len(plan.windows) == 1 else None,
        receipt=job.receipt,
        sounds=kept_sounds(job),
    )


def begin(
    model: Model,
    request: Request,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    *,
    predict: bool = True,
) -> Job:
    """Return a request as it is about to be made; arguments and errors as of `generate`."""
    request = request.resolved(model.spec)
    check(model, request)
    assert request.width and request.height and request.fps
    footage = [conformed(clip, request.width, request.height, request.fps, request.fit) for clip in request.clips]
    plan = plan_task(request, model.spec, [clip.num_frames for clip in footage])
    receipt = start_receipt(model, request)
    foreseen = foresee(model, request, plan, "brief" if predict else "none")  # refuses what keeps no budget of memory
    if predict and foreseen is not None:
        receipt.predicted = foreseen.to_dict()
    return Job(model, request, plan, footage, receipt, on_step, checkpoints)


def final_request(
    model: Model, draft: Request, width: int, height: int, *, strength: float | None = None, steps: int | None = None
) -> Request:
    """Return the request for the final video of a draft: all of it is known, scaled up, down to sigma `strength`.

    The draft is made again from its request, byte for byte; pictures that it was given stand in the final video too.
    ValueError for a draft of another task.
    """
    if draft.task not in ("text", "place"):
        raise ValueError(f"the draft is of the task {draft.task!r}; legal: a draft of a prompt, or of pictures in it")
    footage = Clip(generate(model, draft, predict=False))
    if steps is not None:
        draft = replace(draft, recipe=None, sigmas=None)
    return replace(
        draft, width=width, height=height, steps=steps, num_frames=None, seconds=None, window=None,
        clips=(footage, *draft.clips),
        strength=FINISH if strength is None else strength, periodic=False,
    ).resolved(model.spec)  # fmt: skip


def compare_exact(model: Model, video: Video) -> None:
    """Make the exact twin of a video and put on its receipt how near the two are: PSNR (dB) and SSIM per frame.

    ValueError for a video of clips, whose files the receipt may not name, and for a model with weights in 8 bits alone.
    """
    assert video.receipt is not None
    asked = video.receipt.request
    if asked["clips"] or asked["storyboard"]:
        raise ValueError("the video is made of clips; legal: videos of a prompt alone, so measure one of them")
    twin = generate(model, Request(**asked | {"quality": "exact"}), predict=False).frames
    decibel, likeness = frame_psnr(video.frames, twin), frame_ssim(video.frames, twin)
    said = video.receipt.quality = video.receipt.quality or {"asked": "exact", "basis": "exact"}
    said["measured"] = {"psnr": psnr(video.frames, twin), "frame_psnr": decibel, "frame_ssim": likeness}


@dataclass(frozen=True)
class Job:
    """One request under way."""

    model: Model
    request: Request
    plan: Plan
    footage: Sequence[Video]  # the clips, at the request's size and rate
    receipt: Receipt
    on_step: OnStep | None
    checkpoints: Checkpoints | None

    def told(self, index: int, total: int, choice: Choice | None) -> OnState:
        """Return the callback of one window's `total` steps: keeps the state, counts the steps of all windows, and puts
        on the receipt what was skipped by choice."""

        def note(state: SamplerState, estimate: torch.Tensor) -> None:
            if choice is not None and state.step == total:
                account(self.receipt, choice, state.past)
            if self.checkpoints is not None:
                self.checkpoints.keep(index, state, last=state.step == total)
            if self.on_step is not None:
                done, own = index * total + state.step, len(self.request.references)  # frames that are not shown
                self.on_step(done, len(self.plan.windows) * total, state.x[:, :, own:], estimate[:, :, own:])

        return note


def sample(job: Job, index: int, given: Mapping[int, np.ndarray], noise: torch.Tensor | None = None) -> torch.Tensor:
    """Return the latents [1, C, T, H, W] of one window, on the CPU, where `given` frames stand in their places."""
    model, request, window = job.model, job.request, job.plan.windows[index]
    assert request.seed is not None and request.steps is not None and request.shift is not None
    channels, time, height, width = window.shape
    extra = len(request.references)  # latent frames of their own before the clip's
    shape = channels, extra + time, height, width
    if noise is None:
        noise = draw_noise(shape, (request.seed + index) % 2**64)
    noise = check_latents(noise, shape, "noise")
    sigmas = request.schedule(model.spec, window.start)
    with recording(job.receipt.stages, job.receipt.notes), torch.inference_mode():
        with span("text", memory=True):
            prompt = request.prompt if window.prompt is None else window.prompt
            texts, notes = encode_prompt(model, replace(request, storyboard=(), prompt=expanded(job, prompt)))
            model.release_text_encoder()
        job.receipt.notes += [note for note in notes if note not in job.receipt.notes]
        told = Told()
        if given or model.checkpoint.channels is not None:
            with span("encode", memory=True):
                told = tell(job, window, given)
            if model.vae_dtype != torch.float32 and ROUNDED not in job.receipt.approximations:
                job.receipt.approximations.append(ROUNDED)
        with span("denoise", memory=True):
            context = prepare_context(model, texts, shape, told.pictures, told.channels, request.positions)
            kept = None if job.checkpoints is None else job.checkpoints.find(index)
            total = len(sigmas) - 1
            choice = choose(
                model,
                request,
                sigmas,
                plain=window.start == 1 and not window.periodic and visits(model, request, told.known) == 1,
            )
            if choice is not None and kept is not None and kept.step == total:
                account(job.receipt, choice, kept.past)
            terms = Terms(told.known, told.channels, window.periodic, EXACT if choice is None else choice.savings)
            note = job.told(index, total, choice)
            latents = denoise(model, kept or noise, context, sigmas, request, note, terms)
    return latents[:, :, extra:].clone().cpu()


def expanded(job: Job, prompt: str) -> str:
    """Return what a prompt is written out to, once per video, and put it on the receipt; the prompt itself if nobody is
    to do so."""
    if job.request.expand is None or not prompt.strip():
        return prompt
    if prompt not in job.receipt.expanded:
        with span("text/expand"):
            spec = job.model.spec
            found, notes = expand(prompt, job.request.expand, spec.captions, spec.expansion)
        job.receipt.expanded[prompt] = found
        job.receipt.notes += notes
    return job.receipt.expanded[prompt]


@dataclass(frozen=True)
class Told:
    """What the network is told of the known frames, in the way that its weights take."""

    known: Known | None = None
    channels: torch.Tensor | None = None
    pictures: torch.Tensor | None = None


def tell(job: Job, window: Window, given: Mapping[int, np.ndarray]) -> Told:
    """Encode the frames that a window is given; SDEdit takes them as latents whatever the weights take."""
    model, request = job.model, job.request
    assert request.width and request.height and request.fps
    channels, pictures, known, shown = None, None, None, given
    if model.checkpoint.channels is None or window.start < 1:
        known = encode_known(model, window, given)
    if model.checkpoint.channels is not None:
        size = request.width, request.height, request.fps, request.fit
        masks = {i: clip.masks(*size) for i, clip in enumerate(request.clips) if clip.mask is not None}
        references = [next(iter(conformed(clip, *size[:3], "pad"))) for clip in request.references]
        firm = firmness(window)
        if window.start < 1:
            shown = {place: frame for place, frame in given.items() if firm[place] == 1}
        channels = encode_channels(model, window, shown, given_masks(window, masks), references)
    if (images := model.checkpoint.image_size) is not None:
        pictures = encode_pictures(model, [shown[min(shown)], shown[max(shown)]][: images.pictures])
    return Told(known, channels, pictures)


def assemble(job: Job, latents: torch.Tensor, given: Mapping[int, np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the frames of the result: clips as they are, windows as they are made, the first from its `latents`.

    What is kept between windows is the last frames of the result, so memory does not grow with its length.
    """
    tails: deque[np.ndarray] = deque(maxlen=max(1, *(window.tail for window in job.plan.windows)))
    place = 0
    for part in job.plan.parts:
        if part.source == "clip":
            frames = part_of(job.footage[part.index], part.start, part.stop - part.start)
        else:
            window = job.plan.windows[part.index]
            if part.index:
                given = given_frames(window, job.footage, list(tails)[-window.tail :])
                latents = sample(job, part.index, given)
            frames = made(job, part, latents, given, place)
        for frame in frames:
            tails.append(frame)
            yield frame
        place += part.stop - part.start


def made(
    job: Job, part: Part, latents: torch.Tensor, given: Mapping[int, np.ndarray], place: int
) -> Iterator[np.ndarray]:
    """Yield a window's part of the result, from `place` on there: what is held to the end is given back unchanged."""
    window = job.plan.windows[part.index]
    held = firmness(window)
    masked = {g.at + i for g in window.given if job.request.clips[g.clip].mask is not None for i in range(g.count)}
    firm = {index: frame for index, frame in given.items() if held[index] == 1 and index not in masked}
    splicer = Splicer(decode_window(job, part.index, latents), firm, place - part.start)
    with closing(splicer.frames()) as frames:
        yield from islice(frames, part.start, part.stop)
    known = {seam.frame for seam in job.receipt.seams}
    job.receipt.seams += [seam for seam in splicer.seams if seam.frame not in known]


def decode_window(job: Job, index: int, latents: torch.Tensor) -> Video:
    """Return the frames that one window's latents stand for.

    A periodic one is decoded going round, held whole, and cut where it moves least.
    """
    step, length = job.model.spec.stride[0], latents.shape[2]
    periodic = job.plan.windows[index].periodic
    assert job.request.height and job.request.width
    shown = latents[:, :, [place % length for place in range(-LEAD, length + 1)]] if periodic else latents
    canvas = decode(job.model, shown, fps=job.request.fps, receipt=job.receipt)
    video = framed(canvas, job.request.height, job.request.width)
    if not periodic:
        return video
    first, count = 1 + step * (LEAD - 1), step * length
    return Video(
        lambda: from_calmest(islice(iter(video), first, first + count)),
        fps=video.fps,
        num_frames=count,
        height=video.height,
        width=video.width,
        latents=latents[0],
        receipt=job.receipt,
    )


def from_calmest(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield a loop's frames, which may begin anywhere, so that the step from the last to the first is its least."""
    held = list(frames)
    before = [held[-1], *held[:-1]]
    start = int(np.argmin([np.abs(a.astype(np.int16) - b).mean() for a, b in zip(before, held, strict=True)]))
    yield from [*held[start:], *held[:start]]


def kept_sounds(job: Job) -> list[Sound]:
    """Return the sounds of the frames that are kept, or made anew in their places, where they stand in the result."""
    fps, place, found = job.request.fps, 0, list[Sound]()
    assert fps
    for part in job.plan.parts:
        given = [Given(part.index, part.start, part.stop - part.start, part.start)]
        if part.source == "window":
            given = list(job.plan.windows[part.index].given)
        for g in given:
            first, last = max(g.at, part.start), min(g.at + g.count, part.stop)
            begin, at = g.start + first - g.at, place + first - part.start
            if last > first:
                found += cut(job.footage[g.clip].sounds, begin / fps, (last - first) / fps, at / fps)
        place += part.stop - part.start
    return found


def before_first(job: Job) -> list[np.ndarray]:
    """Return the last frames of the clips that stand before the first window, as many as it is to know."""
    tail = job.plan.windows[0].tail
    if not tail:
        return []
    part = job.plan.parts[0]
    return list(part_of(job.footage[part.index], part.stop - tail, tail))


def start_receipt(model: Model, request: Request) -> Receipt:
    """Return the receipt of a resolved request, its stages still to come but for the loading."""
    assert request.seed is not None and request.height and request.width
    approximations = [] if request.positions is None else [f"positions spread by {request.positions}"]
    if model.precision == "fp8":
        approximations.append(f"{len(model.narrow_layers)} linear layers in fp8, as the model was loaded")
    return Receipt(
        request=request.record(),
        approximations=approximations,
        canvas=model.spec.canvas(request.height, request.width)[::-1],
        seed=request.seed,
        model=model.spec.name,
        model_hash=model.fingerprint,
        engine=model.engine,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        offload=model.offload,
        loras=[lora.told() for lora in model.loras],
        stages=dict(model.load_stages),
    )
