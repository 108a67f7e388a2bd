"""The cuda_graph engine: the transformer as it is written, its launches recorded once per request and replayed.

What is captured is a whole guided forward: both rows and their combination. The sampler's few operations stay outside,
because their factors are new numbers at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.engines.eager import build
from runtime.models.spec import Context, Denoiser
from runtime.trace import note, span

__all__ = ["build", "captured"]


@dataclass(frozen=True)
class Recording:
    """A CUDA graph and the memory that it reads and writes; the context is kept, so that its addresses stay its own."""

    graph: torch.cuda.CUDAGraph
    x: torch.Tensor
    sigma: torch.Tensor
    out: torch.Tensor
    context: Context


def captured(denoiser: Denoiser) -> Denoiser:
    """Return a Denoiser that runs `denoiser` at the first call of each shape, records the second and replays from then.

    The numbers are the same to the bit. Without an NVIDIA GPU, or where recording fails, it goes on without, and says
    so once.
    """
    recordings: dict[tuple, Recording | None] = {}  # None: seen once
    given_up = False

    def denoise(x: torch.Tensor, sigma: torch.Tensor, context: Context) -> torch.Tensor:
        nonlocal given_up
        if x.device.type != "cuda" and not given_up:
            given_up = True
            note(f"engine 'cuda_graph' needs an NVIDIA GPU, and the model is on {x.device}; it ran as 'eager'")
        if given_up:
            return denoiser(x, sigma, context)
        sigma = sigma.to(x.device, non_blocking=True)  # a number from the host would be recorded as a constant
        key = (x.shape, sigma.shape, id(context))
        if key not in recordings:
            recordings[key] = None
            return denoiser(x, sigma, context)  # kernels are compiled and libraries set up in it
        found = recordings[key]
        if found is None:
            try:
                with span("denoise/capture"):
                    found = recordings[key] = record(denoiser, x, sigma, context)
            except RuntimeError as error:
                given_up = True
                reason = str(error).splitlines()[0]
                note(f"the forward could not be recorded as a CUDA graph ({reason}); it ran as 'eager'")
                return denoiser(x, sigma, context)
        found.x.copy_(x)
        found.sigma.copy_(sigma)
        found.graph.replay()
        return found.out.clone()

    return denoise


def record(denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, context: Context) -> Recording:
    """Record one call; nothing is computed yet."""
    x, sigma = x.clone(), sigma.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may decode meanwhile
        out = denoiser(x, sigma, context)
    return Recording(graph, x, sigma, out, context)
