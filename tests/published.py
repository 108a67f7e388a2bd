"""Tiny random checkpoints in the published layout, written by diffusers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

DEMO = Path(__file__).parent.parent / "runtime" / "demo"


@dataclass(frozen=True)
class Tiny:
    """What is varied; everything else is the published default."""

    heads: int = 2
    head_dim: int = 12
    layers: int = 2
    ffn: int = 32
    channels: int = 4
    text_dim: int = 16
    text_length: int = 24
    vae_width: int = 4
    res_blocks: int = 1
    residual: bool = False  # the VAE of Wan 2.2
    experts: int = 1
    boundary: float = 0.875
    cross_norm: bool = True
    shift: float = 3.0
    seed: int = 0
    vae: dict = field(default_factory=dict, hash=False)


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter, gains and biases too, values that matter and do not explode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan = parameter[0].numel() if parameter.dim() > 1 else 1
        if parameter.dim() > 1 and "table" not in name and "gamma" not in name:
            parameter.data = noise / fan**0.5
        elif "norm" in name or "gamma" in name:
            parameter.data = (1.0 if "weight" in name or "gamma" in name else 0.0) + 0.2 * noise
        else:
            parameter.data = 0.2 * noise
    return module.eval()


def transformer(tiny: Tiny, seed: int) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=tiny.heads,
        attention_head_dim=tiny.head_dim,
        in_channels=tiny.channels,
        out_channels=tiny.channels,
        text_dim=tiny.text_dim,
        freq_dim=32,
        ffn_dim=tiny.ffn,
        num_layers=tiny.layers,
        cross_attn_norm=tiny.cross_norm,
    )
    return randomise(model, seed)


def vae(tiny: Tiny, seed: int) -> AutoencoderKLWan:
    generator = torch.Generator().manual_seed(seed)
    extra: dict = {}
    if tiny.residual:
        extra = {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
            "decoder_base_dim": 2 * tiny.vae_width,
        }
    model = AutoencoderKLWan(
        base_dim=tiny.vae_width,
        z_dim=tiny.channels,
        num_res_blocks=tiny.res_blocks,
        latents_mean=torch.randn(tiny.channels, generator=generator).tolist(),
        latents_std=(0.5 + torch.rand(tiny.channels, generator=generator)).tolist(),
        **extra,
    )
    return randomise(model, seed)


@lru_cache
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(DEMO / "tokenizer")


def text_encoder(tiny: Tiny, seed: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer()),
        d_model=tiny.text_dim,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return randomise(UMT5EncoderModel(config), seed)


def pipeline(tiny: Tiny) -> WanPipeline:
    """Build the reference pipeline."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=tiny.shift
    )
    two = tiny.experts == 2
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(tiny, tiny.seed + 1),
        vae=vae(tiny, tiny.seed + 2),
        scheduler=scheduler,
        transformer=transformer(tiny, tiny.seed + 3),
        transformer_2=transformer(tiny, tiny.seed + 4) if two else None,
        boundary_ratio=tiny.boundary if two else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_pipeline(tiny: Tiny) -> WanImageToVideoPipeline:
    """Build the reference pipeline for a picture, in the layout of Wan 2.2 TI2V: clean tokens, times per token."""
    plain = pipeline(tiny)
    parts = {name: plain.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    pipe = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CLIP = {  # one head as wide as the published ones, whose number no file of the original layout tells
    "hidden_size": 80, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 1, "hidden_act": "gelu",
}  # fmt: skip


def wide_transformer(tiny: Tiny, seed: int, images: int) -> WanTransformer3DModel:
    """A transformer with I2V's extra input channels, and shown 0, 1 or 2 pictures by cross-attention."""
    width = tiny.heads * tiny.head_dim
    extra = {"image_dim": CLIP["hidden_size"], "added_kv_proj_dim": width} if images else {}
    model = WanTransformer3DModel(
        num_attention_heads=tiny.heads,
        attention_head_dim=tiny.head_dim,
        in_channels=2 * tiny.channels + 4,
        out_channels=tiny.channels,
        text_dim=tiny.text_dim,
        freq_dim=32,
        ffn_dim=tiny.ffn,
        num_layers=tiny.layers,
        pos_embed_seq_len=10 if images == 2 else None,
        **extra,
    )
    return randomise(model, seed)


def channels_pipeline(tiny: Tiny, images: int = 0) -> WanImageToVideoPipeline:
    """Build the reference pipeline for pictures in extra channels: Wan 2.1 I2V (1), FLF2V (2), Wan 2.2 I2V-A14B (0)."""
    plain = pipeline(tiny)
    parts = {name: plain.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    two = tiny.experts == 2
    if images:
        config = CLIPVisionConfig(image_size=28, patch_size=14, **CLIP)
        parts["image_encoder"] = randomise(CLIPVisionModel(config), tiny.seed + 5)
        parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pipe = WanImageToVideoPipeline(
        **parts,
        transformer=wide_transformer(tiny, tiny.seed + 3, images),
        transformer_2=wide_transformer(tiny, tiny.seed + 4, images) if two else None,
        boundary_ratio=tiny.boundary if two else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def control_pipeline(tiny: Tiny) -> WanVACEPipeline:
    """Build the reference pipeline of VACE."""
    plain = pipeline(tiny)
    parts = {name: plain.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    network = WanVACETransformer3DModel(
        num_attention_heads=tiny.heads,
        attention_head_dim=tiny.head_dim,
        in_channels=tiny.channels,
        out_channels=tiny.channels,
        text_dim=tiny.text_dim,
        freq_dim=32,
        ffn_dim=tiny.ffn,
        num_layers=3,
        vace_layers=[0, 2],
        vace_in_channels=2 * tiny.channels + 64,
    )
    pipe = WanVACEPipeline(**parts, transformer=randomise(network, tiny.seed + 3))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write(tiny: Tiny, folder: Path, build: Callable[[Tiny], DiffusionPipeline] = pipeline, **save: object) -> Any:
    """Save the reference pipeline into a folder, with our runtime.json beside it, and return it."""
    pipe = build(tiny)
    pipe.save_pretrained(folder, **save)
    settings = {"text_length": tiny.text_length, "defaults": {"width": 32, "height": 32, "num_frames": 5, "steps": 4}}
    (folder / "runtime.json").write_text(json.dumps(settings))
    return pipe


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference, relative to the reference's largest value."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
