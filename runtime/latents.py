"""Latents: seeded noise, checks of latents that a user brings, and files of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from runtime.weights import publish


def draw_noise(shape: tuple[int, int, int, int], seed: int) -> torch.Tensor:
    """Return noise [1, C, T, H, W] float32 drawn on the CPU, so that a seed means the same video on every device."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def check_latents(
    latents: torch.Tensor, shape: tuple[int | None, int | None, int | None, int | None], what: str
) -> torch.Tensor:
    """Return latents as [1, C, T, H, W] float32; ValueError for another shape, dtype, NaN or infinity.

    `shape` is [C, T, H, W], None where any extent will do; a leading dimension of 1 may be there or not.
    """
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"{what} is of type {kind}; legal: a floating-point torch tensor")
    given = tuple(latents.shape)
    if latents.dim() == 5 and latents.shape[0] == 1:
        latents = latents[0]
    if latents.dim() != 4 or any(w is not None and g != w for g, w in zip(latents.shape, shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{what} has shape {list(given)}; legal: [{wanted}] in channels, time, height, width")
    found = latents.detach().float()  # of float64 the largest are infinity then
    bad = (~torch.isfinite(found)).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{what} holds NaN or infinity in latent frame {bad[0]}; legal: finite numbers of float32")
    return found.unsqueeze(0)


def save_latents(path: str | Path, latents: torch.Tensor, notes: Mapping[str, str]) -> Path:
    """Write latents [C, T, H, W] and notes about them as safetensors; the file appears only when it is complete."""
    publish(Path(path), {"latents": latents}, notes)
    return Path(path)


def load_latents(path: str | Path) -> tuple[torch.Tensor, dict[str, str]]:
    """Return (latents [C, T, H, W], notes) of a file that `save_latents` wrote; ValueError for any other."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; legal: latents that generate --latents wrote")
    try:
        with safe_open(path, framework="pt") as handle:
            return handle.get_tensor("latents").clone(), dict(handle.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} does not hold latents ({error}); legal: what generate --latents wrote") from error
