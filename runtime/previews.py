"""A cheap look at latents, at any step: one small matrix makes a colour of each cell, without the decoder.

The matrix is fitted to the model's own autoencoder by ridge regression, from what it makes of a seeded clip of soft
colours. Who writes a checkpoint stores it beside the weights; where it is missing it is fitted at first use and kept in
the cache, which takes two latent frames of 8 x 8 cells through the autoencoder.
Source of the idea: latent-to-RGB factors, as image tools have them per published model.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from runtime.canvas import framed
from runtime.decoding import to_bytes
from runtime.denoising import OnStep
from runtime.engines.store import cache_root
from runtime.latents import check_latents
from runtime.model import Model
from runtime.request import Request
from runtime.video import Video
from runtime.weights import publish

BESIDE = "preview.safetensors"  # in a checkpoint's folder
CELLS = 8  # of the clip, each way
RIDGE = 0.1  # of the latents' variance, which is about 1: channels that hardly show colour stay small
ENLARGE = 4  # pixels per cell in a preview


def preview(
    model: Model,
    latents: torch.Tensor,
    *,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Video:
    """Return a small video of latents [C, T, H, W] or [1, C, T, H, W]: a frame of 4 H x 4 W pixels for each of T.

    `fps` is the rate of the whole video (the model's own where None), of which latent frames are a fraction; `height`
    and `width` in pixels are its frame (the whole canvas where None), whose part is shown. Raises ValueError for
    latents of another shape or type, or with NaN or infinity, and for a frame larger than they are.
    """
    spec = model.spec
    latents = check_latents(latents, (spec.latent_channels, None, None, None), "latents").cpu()
    matrix = projection(model)
    colours = torch.einsum("cthw,co->tohw", latents[0], matrix[:-1]) + matrix[-1].view(3, 1, 1)
    pixels = F.interpolate(colours, scale_factor=ENLARGE, mode="bilinear")
    frames = to_bytes(pixels.transpose(0, 1))
    count, rows, columns, _ = frames.shape
    rate = (spec.defaults.fps if fps is None else fps) / spec.stride[0]
    video = Video(frames, fps=max(rate, 0.01), num_frames=count, height=rows, width=columns, latents=latents[0])
    return framed(
        video,
        rows
        if height is None
        else 2 * round(ENLARGE * height / spec.stride[1] / 2),  # even, as files of videos want it
        columns if width is None else 2 * round(ENLARGE * width / spec.stride[2] / 2),
    )


class Previewer:
    """An `on_step` that writes each estimate's preview to a file, which always holds the newest one whole.

    `request` is the resolved one of the video.
    """

    def __init__(
        self, model: Model, path: str | os.PathLike[str], request: Request, then: OnStep | None = None
    ) -> None:
        self.model, self.path, self.request, self.then = model, path, request, then

    def __call__(self, step: int, total: int, latents: torch.Tensor, estimate: torch.Tensor) -> None:
        """Show the estimate of a step; then tell the next callback, if there is one."""
        asked = self.request
        preview(self.model, estimate, fps=asked.fps, height=asked.height, width=asked.width).save(self.path)
        if self.then is not None:
            self.then(step, total, latents, estimate)


def projection(model: Model) -> torch.Tensor:
    """Return the matrix [C + 1, 3] float32 from latents, and 1, to colours in [-1, 1]: stored, in the cache, or new."""
    kept = cache_root() / "previews" / f"{model.published.replace(':', '-')}.safetensors"
    for file in (model.checkpoint.folder / BESIDE, kept):
        found = _read(file, (model.spec.latent_channels + 1, 3))
        if found is not None:
            return found
    matrix = fit_projection(model)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        publish(kept, {"projection": matrix}, {"model": model.spec.name})
    except OSError as error:
        warnings.warn(f"the cache {kept.parent} cannot be written ({error}); going on without", stacklevel=2)
    return matrix


def store_projection(model: Model) -> Path:
    """Fit the matrix and write it beside the model's weights, as `preview.safetensors`; return the file."""
    file = model.checkpoint.folder / BESIDE
    publish(file, {"projection": fit_projection(model)}, {"model": model.spec.name})
    return file


def _read(file: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    try:
        with safe_open(file, framework="pt") as handle:
            found = handle.get_tensor("projection").clone()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{file} is damaged ({error}); the colours of previews are fitted again", stacklevel=2)
        return None
    return found if found.shape == shape else None


@torch.inference_mode()
def fit_projection(model: Model) -> torch.Tensor:
    """Fit the matrix [C + 1, 3] to the autoencoder, from the latents of a clip of soft colours and their decoding."""
    time, height, width = model.spec.stride
    clip = soft_colours(1 + time, CELLS * height, CELLS * width).to(model.device)
    chunks = (clip[:, :, :1], clip[:, :, 1:])
    latents = torch.cat(list(model.vae.encode_stream(chunks)), dim=2)
    colours = [F.adaptive_avg_pool3d(chunk, (1, CELLS, CELLS)) for chunk in model.vae.decode_stream(latents)]
    known = latents[0].flatten(1).double().cpu()  # [C, cells]
    known = torch.cat([known, torch.ones_like(known[:1])])
    wanted = torch.cat(colours, dim=2)[0].flatten(1).double().cpu()  # [3, cells]
    penalty = torch.full((len(known),), RIDGE * known.shape[1], dtype=torch.float64)
    penalty[-1] = 0.0
    return torch.linalg.solve(known @ known.T + penalty.diag(), known @ wanted.T).float()


def soft_colours(frames: int, height: int, width: int) -> torch.Tensor:
    """Return a clip [1, 3, F, H, W] in [-1, 1] of colours that change slowly, the same each time."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, frames, height, width)
    for cells in (2, 4, 8, 16):
        coarse = torch.randn(1, 3, 2, cells, cells, generator=generator)
        total += F.interpolate(coarse, size=(frames, height, width), mode="trilinear")
    return total.mul_(0.6).tanh_()
