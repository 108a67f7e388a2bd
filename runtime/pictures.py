"""Known pictures -> image embeddings, for weights that are shown them through an image encoder as well."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from runtime.model import Model
from runtime.models.spec import ImageSize


@torch.inference_mode()
def encode_pictures(model: Model, frames: Sequence[np.ndarray]) -> torch.Tensor:
    """Return the embeddings [P, S, D] of P pictures, uint8 [H, W, 3] each: the encoder's last layer but one."""
    size = model.checkpoint.image_size
    assert size is not None
    pixels = torch.stack([shown(frame, size) for frame in frames]).to(model.device, model.dtype)
    return model.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]


def shown(frame: np.ndarray, size: ImageSize) -> torch.Tensor:
    """Return a picture uint8 [H, W, 3] as the encoder takes it [3, h, w] float32.

    Scaled bicubically to its shorter edge, rounded to whole levels and cut in the middle, as Pillow does.
    """
    height, width = frame.shape[:2]
    scale = size.edge / min(height, width)
    target = (int(height * scale + 1e-9), int(width * scale + 1e-9))
    picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
    if target != (height, width):
        picture = F.interpolate(picture, size=target, mode="bicubic", antialias=True)
    down, across = (target[0] - size.crop[0]) // 2, (target[1] - size.crop[1]) // 2
    cut = picture[0, :, down : down + size.crop[0], across : across + size.crop[1]].float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (size.mean, size.std))
    return (cut - mean) / std
