"""Published models and resolutions: the shapes of real cases."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Transformer:
    """The widths of a published transformer."""

    name: str
    width: int
    heads: int
    ffn: int


@dataclass(frozen=True)
class Resolution:
    """A token grid (t, h, w) of a published size."""

    name: str
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Number of video tokens, L."""
        return self.grid[0] * self.grid[1] * self.grid[2]


WAN_1B = Transformer("wan-1.3b", 1536, 12, 8960)
WAN_14B = Transformer("wan-14b", 5120, 40, 13824)
WAN_5B = Transformer("wan-5b", 3072, 24, 14336)
P480 = Resolution("480p", (21, 30, 52))  # 832x480, 81 frames
P720 = Resolution("720p", (21, 45, 80))  # 1280x720, 81 frames
P704 = Resolution("704p", (31, 22, 40))  # 1280x704, 121 frames, the 16x16 autoencoder

REAL = ((WAN_1B, P480), (WAN_1B, P720), (WAN_14B, P480), (WAN_14B, P720), (WAN_5B, P704))
HALF = 2  # bytes of bfloat16, in which real cases are counted


@dataclass(frozen=True)
class Decoder:
    """The convolutions of a published video decoder, at a size: channels in and out, level, kernel, where they occur.

    Level i has 2 ** i times the latents' height and width; `frames` are those of one latent frame, by level.
    """

    name: str
    latent: tuple[int, int]
    convolutions: tuple[tuple[int, int, int, tuple[int, int, int]], ...]
    frames: tuple[int, ...] = (1, 2, 4, 4)


CUBE, IN_TIME = (3, 3, 3), (3, 1, 1)
WAN_DECODER = (
    (16, 384, 0, CUBE), (384, 384, 0, CUBE), (384, 768, 0, IN_TIME),
    (192, 384, 1, CUBE), (384, 384, 1, CUBE), (384, 768, 1, IN_TIME),
    (192, 192, 2, CUBE), (96, 96, 3, CUBE), (96, 3, 3, CUBE),
)  # fmt: skip
WAN22_DECODER = (
    (48, 1024, 0, CUBE), (1024, 1024, 0, CUBE), (1024, 2048, 0, IN_TIME), (1024, 1024, 1, CUBE),
    (1024, 2048, 1, IN_TIME), (1024, 512, 2, CUBE), (512, 512, 2, CUBE), (512, 256, 3, CUBE), (256, 256, 3, CUBE),
    (256, 12, 3, CUBE),
)  # fmt: skip
DECODERS = (
    Decoder("wan-vae 480p", (60, 104), WAN_DECODER),
    Decoder("wan-vae 720p", (90, 160), WAN_DECODER),
    Decoder("wan-vae-2.2 704p", (44, 80), WAN22_DECODER),
)
