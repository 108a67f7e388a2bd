"""Latents -> frames, streamed as each latent frame is decoded; and frames -> latents, the way back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from runtime.latents import check_latents
from runtime.model import Model
from runtime.receipt import Receipt
from runtime.trace import recording, span
from runtime.video import Video


def decode(model: Model, latents: torch.Tensor, *, fps: float | None = None, receipt: Receipt | None = None) -> Video:
    """Return the video of latents [C, T, H, W] or [1, C, T, H, W], decoded frame by frame as it is iterated.

    `fps` is frames per second (the model's own where None). Raises ValueError for latents of another shape or type,
    or with NaN or infinity.
    """
    spec = model.spec
    latents = check_latents(latents, (spec.latent_channels, None, None, None), "latents")
    _, _, time, height, width = latents.shape
    stages = {} if receipt is None else receipt.stages

    def frames() -> Iterator[np.ndarray]:
        chunks = decode_chunks(model, latents)
        while True:
            with recording(stages), span("decode", memory=True):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield from chunk

    return Video(
        frames,
        fps=spec.defaults.fps if fps is None else fps,
        num_frames=1 + (time - 1) * spec.stride[0],
        height=height * spec.stride[1],
        width=width * spec.stride[2],
        latents=latents[0],
        receipt=receipt,
    )


@torch.inference_mode()
def decode_chunks(model: Model, latents: torch.Tensor) -> Iterator[np.ndarray]:
    """Yield uint8 frames [F, H, W, 3]: one for the first latent frame, then as many as the time stride."""
    for pixels in model.vae.decode_stream(latents.to(model.device)):
        yield to_bytes(pixels[0])


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3], rounded to nearest."""
    levels = pixels.float().add(1.0).mul_(127.5).clamp_(0, 255).round_().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 3, 0).cpu().numpy())


@torch.inference_mode()
def _encode(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    return model.vae.encode(pixels)[0].float().cpu()


def encode(model: Model, frames: np.ndarray | Video) -> torch.Tensor:
    """Return the latents [C, T, H, W] float32, normalised as the sampler sees them, of uint8 frames [F, H, W, 3].

    Raises ValueError for frames whose size or number the model cannot take.
    """
    if isinstance(frames, Video):
        frames = frames.frames
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        given = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"frames are {given}; legal: a numpy array of uint8 [frames, height, width, 3]")
    count, height, width, _ = frames.shape
    time, down, across = model.spec.stride
    if height % down or width % across or not height or not width:
        low = (max(width // across, 1) * across, max(height // down, 1) * down)
        high = (-(-max(width, 1) // across) * across, -(-max(height, 1) // down) * down)
        raise ValueError(
            f"the frames are {width}x{height}; {model.spec.name} takes widths in multiples of {across} and heights of "
            f"{down}: scale or crop to {low[0]}x{low[1]} or {high[0]}x{high[1]}"
        )
    if count < 1 or (count - 1) % time:
        low_count = max(count - 1, 0) // time * time + 1
        raise ValueError(
            f"there are {count} frames; {model.spec.name} takes 1 + {time} * n: give {low_count} or {low_count + time}"
        )
    pixels = torch.from_numpy(frames).to(model.device).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)
    return _encode(model, pixels.unsqueeze(0)).clone()
