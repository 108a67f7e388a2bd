"""Wan's checkpoints in the original repositories' layout, described from their config.json and the weights' shapes.

Source of the names and numbers: Wan2.1 `wan/modules/model.py`, `vace_model.py`, `clip.py`, `wan/configs/*.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from runtime.models.spec import Checkpoint, Conditioning, ImageSize, config_from
from runtime.models.wan import weights as names
from runtime.models.wan.costs import WanCosts
from runtime.models.wan.layouts import (
    channels,
    number_positions,
    read_config,
    spec_of,
    vae_component,
)
from runtime.models.wan.specs import LATENT_STATISTICS, TEXT_LENGTH
from runtime.models.wan.text_encoder import build_text_encoder
from runtime.models.wan.transformer import TransformerConfig, WanTransformer
from runtime.models.wan.vae_config import VAEConfig
from runtime.weights import Component, find
from runtime.weights import shapes as tensor_shapes

EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")
BOUNDARY = {"t2v": 0.875, "i2v": 0.9}  # model type of two experts -> sigma at which they take turns
VAES = {16: "Wan2.1_VAE.pth", 48: "Wan2.2_VAE.pth"}  # latent channels -> file
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
IMAGE_HEAD = 80  # width of an attention head there, which no shape in the file tells
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
KINDS: dict[str, Conditioning] = {  # model type -> how known frames are taken
    "t2v": "blend", "ti2v": "clean_tokens", "i2v": "channels", "flf2v": "channels", "vace": "control",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OriginalConfig:
    """The original repositories' `config.json`; keys that not every published one has are defaults of their code."""

    dim: int
    eps: float
    ffn_dim: int
    freq_dim: int
    in_dim: int
    num_heads: int
    num_layers: int
    out_dim: int
    model_type: str = "t2v"
    text_len: int = TEXT_LENGTH
    text_dim: int = 4096
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    qk_norm: bool = True
    window_size: tuple[int, int] = (-1, -1)
    vace_layers: tuple[int, ...] | None = None
    vace_in_dim: int | None = None

    @classmethod
    def from_file(cls, file: Path) -> OriginalConfig:
        """Read a published config; ValueError for missing and unknown keys, and for variants not supported."""
        given = read_config(file)
        if (kind := given.get("model_type", "t2v")) not in KINDS:
            raise ValueError(f"{file} has model_type {kind!r}; supported: {', '.join(KINDS)}")
        if lacking := [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]:
            raise ValueError(f"{file} lacks {', '.join(lacking)}; it is not the published config: fetch it again")
        config = cls(**config_from(cls, given, str(file)))
        for key in (f.name for f in fields(cls) if f.type == "int"):
            if type(number := getattr(config, key)) is not int or number < 1:
                raise ValueError(f"{file} has {key} {number!r}; legal: a whole number above 0")
        for key, only in (("qk_norm", True), ("window_size", (-1, -1))):
            if getattr(config, key) != only:
                raise ValueError(f"{file} has {key} {getattr(config, key)!r}; supported is {only!r}")
        if config.dim % config.num_heads:
            raise ValueError(f"{file} has dim {config.dim}; legal: a multiple of num_heads, {config.num_heads}")
        if config.conditioning != "control" and (config.vace_layers or config.vace_in_dim):
            raise ValueError(f"{file} has vace_layers and model_type {kind!r}; legal: they belong to the type 'vace'")
        if config.latent_channels not in VAES:
            key = "in_dim" if config.latent_channels == config.in_dim else "out_dim"
            legal = ", ".join(map(str, VAES))
            raise ValueError(f"{file} has {key} {config.latent_channels}; supported: {legal}")
        return config

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents; weights that go on from pictures take more in."""
        return self.out_dim if self.conditioning == "channels" else self.in_dim

    @property
    def conditioning(self) -> Conditioning:
        """How known frames are taken."""
        if self.model_type == "t2v" and self.in_dim == 48:  # only Wan 2.2 TI2V has so many
            return "clean_tokens"
        return KINDS[self.model_type]

    def transformer(self, image: ImageFacts | None = None) -> TransformerConfig:
        """Return the same numbers by their names in the diffusers layout; `image` is what the image encoder gives."""
        more: dict[str, Any] = {}
        if image is not None:
            more = {"image_dim": image.width, "added_kv_proj_dim": self.dim}
            more["pos_embed_seq_len"] = 2 * image.tokens if self.model_type == "flf2v" else None
        if self.conditioning == "control":
            layers = self.vace_layers or range(0, self.num_layers, 2)
            more = {"vace_layers": tuple(layers), "vace_in_channels": self.vace_in_dim or self.in_dim}
        return TransformerConfig.from_dict(
            {
                **more,
                "num_attention_heads": self.num_heads,
                "attention_head_dim": self.dim // self.num_heads,
                "in_channels": self.in_dim,
                "out_channels": self.out_dim,
                "text_dim": self.text_dim,
                "freq_dim": self.freq_dim,
                "ffn_dim": self.ffn_dim,
                "num_layers": self.num_layers,
                "eps": self.eps,
                "patch_size": self.patch_size,
                "cross_attn_norm": self.cross_attn_norm,
            }
        )


def open_original(folder: Path) -> Checkpoint:
    """Describe a checkpoint in the original layout; ValueError for variants and settings that are not supported."""
    two = any((folder / name).is_dir() for name in EXPERT_FOLDERS)
    places = [folder / name for name in EXPERT_FOLDERS] if two else [folder]
    configs = [OriginalConfig.from_file(place / "config.json") for place in places]
    first = configs[0]
    sees = first.conditioning == "channels" and not two  # Wan 2.2 I2V has no image encoder
    image = image_facts(folder / IMAGE_ENCODER) if sees else None
    networks = [config.transformer(image) for config in configs]
    missing: list[str] = []
    transformers = []
    for place, config in zip(places, networks, strict=True):
        files, gone = find(place, "diffusion_pytorch_model")
        missing += gone
        transformers.append(
            Component(
                name=place.name if two else "transformer",
                build=partial(WanTransformer, config),
                files=files,
                keys=names.original_transformer_keys,
                other_keys=names.transformer_keys,
                keep_float32=WanTransformer.keep_float32,
                blocks="blocks",
            )
        )
    vae_file = folder / VAES[first.latent_channels]
    text_file = folder / TEXT_ENCODER
    tokenizer = folder / "google" / "umt5-xxl"
    needed = [vae_file, text_file, tokenizer, *([folder / IMAGE_ENCODER] if sees else [])]
    missing += [str(path) for path in needed if not path.exists()]
    vae_config = _vae_config(vae_file, first.latent_channels)
    options = {"order": 2, "solver": "bh2"}
    boundary = BOUNDARY.get(first.model_type)
    spec = spec_of(folder.name, networks, vae_config, "flow_linear", options, boundary, first.conditioning)
    return Checkpoint(
        folder=folder,
        spec=replace(spec, text_length=first.text_len),
        transformers=tuple(transformers),
        vae=vae_component(vae_config, (vae_file,), names.original_vae_keys),
        text_encoder=Component(
            name="text_encoder",
            build=lambda: build_text_encoder(_text_config(text_file)),  # the file is read only then
            files=(text_file,),
            keys=names.original_text_encoder_keys,
            blocks="encoder.block",
        ),
        tokenizer=tokenizer,
        costs=lambda: WanCosts(networks[0], vae_config, _text_config(text_file)),
        missing=tuple(missing),
        image_encoder=None if image is None else image_encoder(folder / IMAGE_ENCODER, image),
        image_size=None if image is None else image.size(2 if first.model_type == "flf2v" else 1),
        channels=channels(spec),
    )


def _vae_config(file: Path, z_dim: int) -> VAEConfig:
    """Read the widths off the weights where they are there: the original layout has no VAE config."""
    mean, std = LATENT_STATISTICS[z_dim]
    numbers: dict[str, Any] = {"z_dim": z_dim, "latents_mean": mean, "latents_std": std}
    if z_dim == 48:
        numbers |= {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        }
    if file.exists():
        shapes = _shapes(file, {"encoder.conv1.weight": 5, "decoder.head.0.gamma": 4, "conv2.weight": 5})
        if (found := shapes["conv2.weight"][0]) != z_dim:
            raise ValueError(f"{file} has {found} latent channels, config.json in_dim {z_dim}: fetch both again")
        numbers["base_dim"] = shapes["encoder.conv1.weight"][0]
        numbers["decoder_base_dim"] = shapes["decoder.head.0.gamma"][0]
    return VAEConfig(**numbers)


def _text_config(file: Path) -> dict[str, Any]:
    """Read the encoder's numbers off the weights: the original layout has no config for it."""
    table, position = "token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"
    query, up = "blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight"
    shapes = _shapes(file, {table: 2, position: 2, query: 2, up: 2})
    buckets, heads = shapes[position]
    return {
        "model_type": "umt5",
        "vocab_size": shapes[table][0],
        "d_model": shapes[table][1],
        "d_kv": shapes[query][0] // heads,
        "d_ff": shapes[up][0],
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def _shapes(file: Path, needed: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a file; ValueError unless those needed have so many dimensions, none 0."""
    found = {name: shape for name, (shape, _) in tensor_shapes(file).items()}
    for name, dimensions in needed.items():
        shape = found.get(name, ())
        if len(shape) != dimensions or 0 in shape:
            state = f"has {name} of shape {list(shape)}" if name in found else f"lacks {name}"
            raise ValueError(f"{file} {state}; it is not the published file: fetch it again")
    return found


@dataclass(frozen=True)
class ImageFacts:
    """What the image encoder's weights tell of it: D, tokens of a picture, cells of a patch, blocks, MLP width."""

    width: int
    tokens: int
    patch: int
    blocks: int
    ffn: int

    @property
    def edge(self) -> int:
        """Height and width of the pictures that it takes, in pixels."""
        return math.isqrt(self.tokens - 1) * self.patch

    def size(self, pictures: int) -> ImageSize:
        """Return how so many pictures are shown to it: as its published preprocessor in the diffusers layout says."""
        return ImageSize(pictures, self.edge, (self.edge, self.edge), IMAGE_MEAN, IMAGE_STD)


def image_facts(file: Path) -> ImageFacts:
    """Read the image encoder's numbers off its weights; the published ones where they are missing."""
    if not file.exists():
        return ImageFacts(width=1280, tokens=257, patch=14, blocks=32, ffn=5120)
    positions, patch, up = "visual.pos_embedding", "visual.patch_embedding.weight", "visual.transformer.0.mlp.0.weight"
    shapes = _shapes(file, {positions: 3, patch: 4, up: 2})
    blocks = {name.split(".")[2] for name in shapes if name.startswith("visual.transformer.")}
    return ImageFacts(shapes[positions][2], shapes[positions][1], shapes[patch][2], len(blocks), shapes[up][0])


class Third(nn.Module):
    """One of q, k and v: some rows of the matrix that the published file has for all three."""

    def __init__(self, fused: nn.Linear, start: int) -> None:
        super().__init__()
        self.fused, self.start = fused, start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = slice(self.start, self.start + self.fused.in_features)
        return F.linear(x, self.fused.weight[rows], self.fused.bias[rows])


def image_encoder(file: Path, facts: ImageFacts) -> Component:
    """Return the picture half of the CLIP model in the published file; its text half is left there."""

    def build() -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(
            hidden_size=facts.width, intermediate_size=facts.ffn, num_hidden_layers=facts.blocks,
            num_attention_heads=max(1, facts.width // IMAGE_HEAD), image_size=facts.edge, patch_size=facts.patch,
            hidden_act="gelu",
        )  # fmt: skip
        module = CLIPVisionModel(config)
        for layer in getattr(module, "vision_model", module).encoder.layers:
            fused = nn.Linear(facts.width, 3 * facts.width)
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                setattr(layer.self_attn, name, Third(fused, i * facts.width))
        return module

    unused = frozenset(name for name in tensor_shapes(file) if not name.startswith("visual.")) if file.exists() else ()
    return Component(
        name="image_encoder",
        build=build,
        files=(file,),
        keys=names.original_image_encoder_keys,
        ignored=frozenset({*unused, "visual.head"}),
        prepare=number_positions,
    )
