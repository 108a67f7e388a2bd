"""What Wan's weights are shown of known frames: I2V's mask and clip in extra channels, VACE's control channels.

Source: Wan2.1 `wan/image2video.py` and `wan/vace.py`, and the pipelines of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from runtime.models.spec import Shown

Encode = Callable[[Callable[[], Iterable[torch.Tensor]]], torch.Tensor]  # of what yields chunks, maybe more than once
Chunks = Callable[[], Iterable[Shown]]


def picture_channels(encode: Encode, chunks: Chunks, references: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return [1, 4 + C, T, H, W]: for each latent frame which of its four frames are given, then the clip's latents.

    What is not given is grey. The first latent frame is one frame, so its mask stands four times.
    """
    if references:
        raise ValueError("this model takes no reference pictures; give them as frames, or take a VACE model")
    latents = encode(lambda: (shown.pixels for shown in chunks()))
    _, _, _, height, width = latents.shape
    given = torch.cat([shown.given.amin((0, 1, 3, 4)) for shown in chunks()])  # [F]
    mask = torch.cat([given[:1].expand(4), given[1:]]).view(-1, 4).T  # [4, T]
    return torch.cat([mask[None, :, :, None, None].expand(-1, -1, -1, height, width).to(latents), latents], dim=1)


def control_channels(encode: Encode, chunks: Chunks, references: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return [1, 2 C + 64, P + T, H, W]: latents of what is given and of what is not, then the mask of each pixel.

    P pictures to look like come first in time, as latents of their own.
    """
    kept = encode(lambda: (shown.pixels * shown.given for shown in chunks()))
    made = encode(lambda: (shown.pixels * (1 - shown.given) for shown in chunks()))
    _, _, time, height, width = kept.shape
    mask = 1 - torch.cat([shown.given[0, 0] for shown in chunks()])  # [F, H', W']
    cell = mask.shape[1] // height
    folded = mask.view(len(mask), height, cell, width, cell).permute(2, 4, 0, 1, 3).flatten(0, 1)  # [64, F, H, W]
    folded = F.interpolate(folded[None], size=(time, height, width), mode="nearest-exact")
    shown_clip = torch.cat([kept, made, folded.to(kept)], dim=1)
    pictures = [encode(partial(iter, [reference])) for reference in references]
    blank = [torch.cat([p, torch.zeros_like(p), torch.zeros_like(folded[:, :, :1]).to(p)], dim=1) for p in pictures]
    return torch.cat([*reversed(blank), shown_clip], dim=2)
