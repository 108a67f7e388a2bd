"""The whole way from a request to a video; read this file first."""

from __future__ import annotations

from dataclasses import asdict

import torch

from runtime.decoding import decode
from runtime.denoising import OnStep, denoise, prepare_context
from runtime.latents import check_latents, draw_noise
from runtime.model import Model
from runtime.receipt import Receipt
from runtime.request import Request
from runtime.schedules import make_schedule
from runtime.tasks import plan_task
from runtime.text import encode_prompt
from runtime.trace import recording, span
from runtime.video import Video


def generate(
    model: Model, request: Request, *, noise: torch.Tensor | None = None, on_step: OnStep | None = None
) -> Video:
    """Make the video that a request asks for; its frames are decoded as they are iterated or saved.

    `noise` is [C, T, H, W] or [1, C, T, H, W], drawn from the seed where None; `on_step(step, total, latents)` is
    called after each step and may raise Cancelled. Raises ValueError for what the model cannot make.
    """
    request = request.resolved(model.spec)
    receipt = start_receipt(model, request)
    plan = plan_task(request, model.spec)
    assert request.seed is not None and request.steps is not None and request.shift is not None
    if noise is None:
        noise = draw_noise(plan.shape, request.seed)
    noise = check_latents(noise, plan.shape, "noise")
    sigmas = make_schedule(model.spec.schedule, request.steps, request.shift, plan.start)
    with recording(receipt.stages, receipt.notes), torch.inference_mode():
        with span("text", memory=True):
            texts, notes = encode_prompt(model, request)
        receipt.notes += notes
        with span("denoise", memory=True):
            context = prepare_context(model, texts, plan.shape)
            latents = denoise(model, noise, context, sigmas, request, on_step)
    return decode(model, latents.clone().cpu(), fps=request.fps, receipt=receipt)


def start_receipt(model: Model, request: Request) -> Receipt:
    """Return the receipt of a resolved request, its stages still to come but for the loading."""
    assert request.seed is not None
    return Receipt(
        request=asdict(request),
        seed=request.seed,
        model=model.spec.name,
        model_hash=model.fingerprint,
        engine=model.engine,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        stages=dict(model.load_stages),
    )
