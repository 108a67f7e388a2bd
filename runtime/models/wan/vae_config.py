"""The settings of Wan's video autoencoder, as its `vae/config.json` publishes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.models.spec import config_from


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The published `vae/config.json`; absent keys have the published code's defaults."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: as base_dim
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # published spelling
    dropout: float = 0.0  # of the training; not used
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> VAEConfig:
        """Read a published config; ValueError for unknown keys, contradictions and variants not supported."""
        # Wan 2.2 publishes clip_output, which its code does not read: pixels are always clamped.
        given = {key: value for key, value in given.items() if key != "clip_output"}
        return cls(**config_from(cls, given, "vae config"))

    def __post_init__(self) -> None:
        if self.attn_scales:
            raise ValueError(f"vae config has attn_scales {list(self.attn_scales)}; supported is none, as published")
        levels = len(self.dim_mult) - 1
        time, height, _ = self.stride
        for key, value, expected, why in (
            ("temperal_downsample", len(self.temperal_downsample), levels, "entries, one less than dim_mult"),
            ("latents_mean", len(self.latents_mean), self.z_dim, "entries, as z_dim"),
            ("latents_std", len(self.latents_std), self.z_dim, "entries, as z_dim"),
            ("scale_factor_temporal", self.scale_factor_temporal, time, "as temperal_downsample gives"),
            ("scale_factor_spatial", self.scale_factor_spatial, height, "as dim_mult and patch_size give"),
        ):
            if value != expected:
                raise ValueError(f"vae config has {key}: {value}; expected {expected} {why}")
        cells = (self.patch_size or 1) ** 2
        for key, value in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if value % cells:
                raise ValueError(f"vae config has {key}: {value}; expected a multiple of {cells}, patch_size squared")

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent cell in (time, height, width)."""
        spatial = 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)
        return 2 ** sum(self.temperal_downsample), spatial, spatial
