"""Names of Wan's published tensors -> places in our modules: the diffusers layout, and the original repositories'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from torch import nn

from runtime.models.wan.transformer import WanTransformer
from runtime.models.wan.vae import WanVAE, diffusers_keys
from runtime.weights import Slot


def transformer_keys(module: nn.Module) -> dict[str, Slot]:
    """Return where each tensor of the published diffusers layout belongs; q, k and v share one matrix here."""
    config = cast(WanTransformer, module).config
    width = config.width
    keys = {
        "patch_embedding.weight": Slot("patch_embedding.weight", shape=(width, config.in_channels, *config.patch_size)),
        "patch_embedding.bias": Slot("patch_embedding.bias"),
        "scale_shift_table": Slot("head_modulation", shape=(1, 2, width)),
    }
    linears = {
        "condition_embedder.time_embedder.linear_1": "time_in",
        "condition_embedder.time_embedder.linear_2": "time_out",
        "condition_embedder.time_proj": "time_projection",
        "condition_embedder.text_embedder.linear_1": "text_in",
        "condition_embedder.text_embedder.linear_2": "text_out",
        "proj_out": "head",
    }
    names = [(f"blocks.{i}", f"blocks.{i}") for i in range(config.num_layers)]
    names += [(f"vace_blocks.{i}", f"control.blocks.{i}") for i in range(len(config.vace_layers))]
    for i, (theirs, ours) in enumerate(names):
        keys[f"{theirs}.scale_shift_table"] = Slot("modulation", i, i + 1, shape=(1, 6, width))
        for number, name in ((1, "self_attention"), (2, "cross_attention")):
            keys[f"{theirs}.attn{number}.norm_q.weight"] = Slot(f"{ours}.{name}.q_norm")
            keys[f"{theirs}.attn{number}.norm_k.weight"] = Slot(f"{ours}.{name}.k_norm")
            linears[f"{theirs}.attn{number}.to_out.0"] = f"{ours}.{name}.out"
        for part in ("weight", "bias"):
            for j, letter in enumerate("qkv"):
                rows = (j * width, (j + 1) * width)
                keys[f"{theirs}.attn1.to_{letter}.{part}"] = Slot(f"{ours}.self_attention.qkv.{part}", *rows)
            for j, letter in enumerate("kv"):
                rows = (j * width, (j + 1) * width)
                keys[f"{theirs}.attn2.to_{letter}.{part}"] = Slot(f"{ours}.cross_attention.kv.{part}", *rows)
                if config.image_dim:
                    slot = Slot(f"{ours}.cross_attention.image_kv.{part}", *rows)
                    keys[f"{theirs}.attn2.add_{letter}_proj.{part}"] = slot
            if config.cross_attn_norm:
                keys[f"{theirs}.norm2.{part}"] = Slot(f"{ours}.cross_norm.{part}")
        if config.image_dim:
            keys[f"{theirs}.attn2.norm_added_k.weight"] = Slot(f"{ours}.cross_attention.image_k_norm")
        linears[f"{theirs}.attn2.to_q"] = f"{ours}.cross_attention.q"
        linears[f"{theirs}.ffn.net.0.proj"] = f"{ours}.ffn_in"
        linears[f"{theirs}.ffn.net.2"] = f"{ours}.ffn_out"
    if config.image_dim:
        theirs = "condition_embedder.image_embedder"
        linears |= {f"{theirs}.ff.net.0.proj": "image_in.first", f"{theirs}.ff.net.2": "image_in.second"}
        linears |= {f"{theirs}.norm1": "image_in.norm_in", f"{theirs}.norm2": "image_in.norm_out"}
        if config.pos_embed_seq_len is not None:
            keys[f"{theirs}.pos_embed"] = Slot("image_in.positions")
    if config.vace_layers:
        shape = width, config.vace_in_channels, *config.patch_size
        keys["vace_patch_embedding.weight"] = Slot("control.patch_embedding.weight", shape=shape)
        keys["vace_patch_embedding.bias"] = Slot("control.patch_embedding.bias")
        linears["vace_blocks.0.proj_in"] = "control.begin"
        linears |= {f"vace_blocks.{i}.proj_out": f"control.ends.{i}" for i in range(len(config.vace_layers))}
    for theirs, ours in linears.items():
        keys[f"{theirs}.weight"], keys[f"{theirs}.bias"] = Slot(f"{ours}.weight"), Slot(f"{ours}.bias")
    return keys


def vae_keys(module: nn.Module) -> dict[str, Slot]:
    """Return where each tensor of the published diffusers VAE belongs."""
    vae = cast(WanVAE, module)
    return {published: Slot(name) for published, name in diffusers_keys(vae.config, vae).items()}


def text_encoder_keys(module: nn.Module) -> dict[str, Slot]:
    """Return where each tensor of a UMT5 encoder as `transformers` saves it belongs: under its own name."""
    return {name: Slot(name) for name, _ in module.named_parameters()}


ORIGINAL_TRANSFORMER = (
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"add_([kv])_proj", r"\1_img"),
    (r"norm_added_k", "norm_k_img"),
    (r"(vace_blocks\.\d+)\.proj_in", r"\1.before_proj"),
    (r"(vace_blocks\.\d+)\.proj_out", r"\1.after_proj"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"scale_shift_table", "modulation"),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"to_out\.0", "o"),
    (r"to_([qkv])\.", r"\1."),
    (r"norm2\.", "norm3."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
)

ORIGINAL_TEXT_ENCODER = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm", "norm"),
    (r"^encoder\.block\.", "blocks."),
    (r"layer\.0\.layer_norm", "norm1"),
    (r"layer\.1\.layer_norm", "norm2"),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
    (r"layer\.0\.SelfAttention", "attn"),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
)

ORIGINAL_VAE = (
    (r"^post_quant_conv", "conv2"),
    (r"^quant_conv", "conv1"),
    (r"(en|de)coder\.conv_in", r"\1coder.conv1"),
    (r"norm_out", "head.0"),
    (r"conv_out", "head.2"),
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.1", "middle.2"),
    (r"conv_shortcut", "shortcut"),
    (r"(middle\.[02]|samples\.\d+)\.norm1", r"\1.residual.0"),
    (r"(middle\.[02]|samples\.\d+)\.conv1", r"\1.residual.2"),
    (r"(middle\.[02]|samples\.\d+)\.norm2", r"\1.residual.3"),
    (r"(middle\.[02]|samples\.\d+)\.conv2", r"\1.residual.6"),
)


def _renamed(keys: Mapping[str, Slot], rules: tuple[tuple[str, str], ...]) -> dict[str, Slot]:
    renamed = {}
    for name, slot in keys.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = slot
    return renamed


def original_transformer_keys(module: nn.Module) -> dict[str, Slot]:
    """Return where each tensor of the original repositories' transformer belongs."""
    return _renamed(transformer_keys(module), ORIGINAL_TRANSFORMER)


ORIGINAL_IMAGE_ENCODER = (
    (r"^embeddings\.class_embedding", "cls_embedding"),
    (r"^embeddings\.patch_embedding", "patch_embedding"),
    (r"^embeddings\.position_embedding\.weight", "pos_embedding"),
    (r"^pre_layrnorm", "pre_norm"),
    (r"^post_layernorm", "post_norm"),
    (r"^encoder\.layers", "transformer"),
    (r"self_attn\.[qkv]_proj\.fused", "attn.to_qkv"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"layer_norm", "norm"),
    (r"mlp\.fc1", "mlp.0"),
    (r"mlp\.fc2", "mlp.2"),
)


def original_image_encoder_keys(module: nn.Module) -> dict[str, Slot]:
    """Return where each tensor of the original repositories' image encoder belongs; q, k and v are one there."""
    keys = {}
    for name, parameter in module.named_parameters():
        alone = name.endswith(("class_embedding", "position_embedding.weight"))
        slot = Slot(name, shape=(1,) * (3 - parameter.ndim) + tuple(parameter.shape)) if alone else Slot(name)
        keys[name.removeprefix("vision_model.")] = slot
    return {f"visual.{name}": slot for name, slot in _renamed(keys, ORIGINAL_IMAGE_ENCODER).items()}


def original_text_encoder_keys(module: nn.Module) -> dict[str, Slot]:
    """Return where each tensor of the original repositories' UMT5 encoder belongs."""
    return _renamed(text_encoder_keys(module), ORIGINAL_TEXT_ENCODER)


def original_vae_keys(module: nn.Module) -> dict[str, Slot]:
    """Return where each tensor of the original repositories' VAE belongs; its blocks are numbered in one sequence."""
    config = cast(WanVAE, module).config
    flat = {}
    for name, slot in vae_keys(module).items():
        flat[_flat_name(name, config.num_res_blocks, config.is_residual)] = slot
    return _renamed(flat, ORIGINAL_VAE)


def _flat_name(name: str, depth: int, residual: bool) -> str:
    """Rename the down and up blocks of a VAE tensor to the original's numbering."""
    if match := re.match(r"encoder\.down_blocks\.(\d+)\.(.*)", name):
        number, rest = match.groups()
        if not residual:  # published flat already
            return f"encoder.downsamples.{number}.{rest}"
        rest = re.sub(r"resnets\.(\d+)", r"downsamples.\1", rest).replace("downsampler", f"downsamples.{depth}")
        return f"encoder.downsamples.{number}.{rest}"
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(.*)", name):
        number, rest = int(match[1]), match[2]
        rest = re.sub(r"upsamplers\.0|upsampler", f"resnets.{depth + 1}", rest)
        inner = re.match(r"resnets\.(\d+)\.(.*)", rest)
        assert inner, name
        if residual:
            return f"decoder.upsamples.{number}.upsamples.{inner[1]}.{inner[2]}"
        return f"decoder.upsamples.{number * (depth + 2) + int(inner[1])}.{inner[2]}"
    return name
