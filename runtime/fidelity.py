"""How near one video is to another: PSNR and SSIM per frame of uint8 frames [F, H, W, 3]."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

WINDOW, SPREAD = 11, 1.5  # pixels of SSIM's Gaussian window, and its standard deviation
EQUAL = 100.0  # dB that are said of equal frames, whose PSNR is infinite


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two videos as a whole, in dB, EQUAL at most."""
    return float(_decibel(_squares(one, other).mean()))


def frame_psnr(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Return it for each frame."""
    return [float(value) for value in _decibel(_squares(one, other).mean(axis=(1, 2, 3)))]


def frame_ssim(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Return the structural similarity of each frame, the mean over colours, where the window lies inside the frame.

    Source: Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, K 0.01 and 0.03. Frames must be 11 x 11 or more.
    """
    return [_ssim(a, b) for a, b in zip(one, other, strict=True)]


def _squares(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    if one.shape != other.shape:
        raise ValueError(f"two videos have the shapes {list(one.shape)} and {list(other.shape)}; legal: the same")
    return (one.astype(np.float64) - other) ** 2


def _decibel(error: np.ndarray) -> np.ndarray:
    return np.minimum(10 * np.log10(255.0**2 / np.maximum(error, 1e-12)), EQUAL)


def _ssim(one: np.ndarray, other: np.ndarray) -> float:
    if min(one.shape[:2]) < WINDOW:
        raise ValueError(f"a frame is {one.shape[1]}x{one.shape[0]}; SSIM takes {WINDOW}x{WINDOW} pixels or more")
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(places**2) / (2 * SPREAD**2))
    line = line / line.sum()

    def blurred(picture: torch.Tensor) -> torch.Tensor:
        rows = F.conv2d(picture, line.view(1, 1, -1, 1))
        return F.conv2d(rows, line.view(1, 1, 1, -1))

    a, b = (torch.from_numpy(frame).permute(2, 0, 1)[:, None].double() for frame in (one, other))  # [3, 1, H, W]
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(found.mean())
