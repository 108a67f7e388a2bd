"""The published Wan models from their configs alone, so that they can be planned with nothing on disk.

Source: the `config.json` files of each repository's transformer, VAE and text encoder.
"""

from __future__ import annotations

from typing import Any

from runtime.models.costs import Costs
from runtime.models.spec import Defaults, ModelSpec
from runtime.models.wan.costs import WanCosts
from runtime.models.wan.layouts import conditioning_of
from runtime.models.wan.specs import LATENT_STATISTICS, PUBLISHED, TEXT_LENGTH
from runtime.models.wan.transformer import TransformerConfig
from runtime.models.wan.vae_config import VAEConfig

UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
}

SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
LARGE = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
MIDDLE = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}

FROM_PICTURE = {**LARGE, "in_channels": 36}
SHOWN = {**FROM_PICTURE, "image_dim": 1280}

NETWORKS: dict[str, dict[str, Any]] = {  # name -> transformer config
    "wan2.1-t2v-1.3b": SMALL,
    "wan2.1-t2v-14b": LARGE,
    "wan2.1-i2v-14b": SHOWN,
    "wan2.1-flf2v-14b": {**SHOWN, "pos_embed_seq_len": 514},
    "wan2.1-vace-1.3b": {**SMALL, "vace_layers": tuple(range(0, 30, 2)), "vace_in_channels": 96},
    "wan2.1-vace-14b": {**LARGE, "vace_layers": tuple(range(0, 40, 5)), "vace_in_channels": 96},
    "wan2.2-t2v-a14b": LARGE,
    "wan2.2-i2v-a14b": FROM_PICTURE,
    "wan2.2-ti2v-5b": MIDDLE,
}
ALIASES = {
    "wan2.1-i2v-14b-480p": "wan2.1-i2v-14b",
    "wan2.1-i2v-14b-720p": "wan2.1-i2v-14b",
    "wan2.1-flf2v-14b-720p": "wan2.1-flf2v-14b",
}
BOUNDARIES = {"wan2.2-t2v-a14b": 0.875, "wan2.2-i2v-a14b": 0.9}
MORE_DEFAULTS = {  # told from other variants by its two pictures alone, so that no checkpoint has its name
    "wan2.1-flf2v-14b": Defaults(width=1280, height=720, num_frames=81, fps=16, steps=50, guidance=5.0, shift=16.0),
}


def published(name: str) -> tuple[ModelSpec, Costs] | None:
    """Return the facts and formulas of a published model by its name in lower case; None for other names."""
    name = ALIASES.get(name, name)
    if name not in NETWORKS:
        return None
    config = TransformerConfig(**NETWORKS[name])
    vae = vae_config(config.out_channels)
    spec = ModelSpec(
        family="wan",
        name=name,
        latent_channels=vae.z_dim,
        stride=vae.stride,
        patch=config.patch_size,
        text_length=TEXT_LENGTH,
        max_positions=config.rope_max_seq_len,
        schedule="flow_linear",
        sampler_options={"order": 2, "solver": "bh2"},
        defaults=(PUBLISHED | MORE_DEFAULTS)[name],
        boundary=BOUNDARIES.get(name),
        conditioning=conditioning_of(config, vae, name == "wan2.2-ti2v-5b"),
    )
    return spec, WanCosts(config, vae, UMT5_XXL)


def vae_config(channels: int) -> VAEConfig:
    """Return the published autoencoder with so many latent channels: 16 is Wan 2.1's, 48 Wan 2.2's."""
    mean, std = LATENT_STATISTICS[channels]
    numbers: dict[str, Any] = {"z_dim": channels, "latents_mean": mean, "latents_std": std}
    if channels == 48:
        numbers |= {
            "base_dim": 160, "decoder_base_dim": 256, "is_residual": True, "patch_size": 2, "in_channels": 12,
            "out_channels": 12, "scale_factor_spatial": 16,
        }  # fmt: skip
    return VAEConfig(**numbers)
