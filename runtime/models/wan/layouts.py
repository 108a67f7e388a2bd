"""Wan's two published layouts, described from their configs: the diffusers one, and the original repositories'.

A checkpoint's own files (its scheduler's shift, its runtime.json) win over the named specs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from runtime.models.spec import Checkpoint, ModelSpec
from runtime.models.wan import weights as names
from runtime.models.wan.specs import LATENT_STATISTICS, PUBLISHED, TEXT_LENGTH, VARIANTS
from runtime.models.wan.transformer import TransformerConfig, WanTransformer
from runtime.models.wan.vae import VAEConfig, WanVAE
from runtime.weights import Component, find, header, read_json, tensors

EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")  # of the original layout
ORIGINAL_BOUNDARY = 0.875
ORIGINAL_VAES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
ORIGINAL_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"


def recognise(folder: Path) -> bool:
    """Tell whether a folder holds a Wan model in the diffusers or the original layout."""
    index = folder / "model_index.json"
    if index.exists():
        return "Wan" in str(read_json(index).get("_class_name", ""))
    return any((folder / name).exists() for name in (*ORIGINAL_VAES, *EXPERT_FOLDERS))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Describe a Wan checkpoint; ValueError for pipelines and settings that are not supported."""
    return _open_diffusers(folder) if (folder / "model_index.json").exists() else _open_original(folder)


def _open_diffusers(folder: Path) -> Checkpoint:
    index = read_json(folder / "model_index.json")
    if index["_class_name"] != "WanPipeline":
        raise ValueError(f"{folder} holds a {index['_class_name']}; supported is WanPipeline: give a text-to-video model")
    experts = [name for name in ("transformer", "transformer_2") if (index.get(name) or [None])[0] is not None]
    schedule, shift, options, sampler = _read_scheduler(folder / "scheduler" / "scheduler_config.json")
    missing: list[str] = []
    transformers = []
    for name in experts:
        config = TransformerConfig.from_dict(_config(folder / name / "config.json"))
        files, gone = find(folder / name, "diffusion_pytorch_model")
        missing += gone
        transformers.append((config, Component(
            name=name,
            build=partial(WanTransformer, config, integer_time=schedule == "flow_linear"),
            files=files,
            keys=names.transformer_keys,
            keep_float32=WanTransformer.keep_float32,
        )))
    vae_config = VAEConfig.from_dict(_config(folder / "vae" / "config.json"))
    vae_files, gone = find(folder / "vae", "diffusion_pytorch_model")
    text_files, gone_text = find(folder / "text_encoder", "model")
    missing += [*gone, *gone_text]
    boundary = index.get("boundary_ratio")
    if len(experts) == 2 and boundary is None:
        raise ValueError(f"{folder} has two experts and no boundary_ratio in model_index.json; expected one in (0, 1)")
    spec = _spec(folder.name, [config for config, _ in transformers], vae_config, schedule, options, boundary)
    spec = replace(spec, defaults=replace(spec.defaults, shift=shift or spec.defaults.shift, sampler=sampler))
    text_config = _config(folder / "text_encoder" / "config.json")
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        missing.append(str(tokenizer))
    return Checkpoint(
        folder=folder,
        spec=spec,
        transformers=tuple(component for _, component in transformers),
        vae=_vae(vae_config, vae_files, names.vae_keys),
        text_encoder=Component(
            name="text_encoder",
            build=partial(_build_text_encoder, text_config),
            files=text_files,
            keys=partial(_tied_keys, text_files),
            ignored=frozenset({"shared.weight", "encoder.embed_tokens.weight"}),
        ),
        tokenizer=tokenizer,
        missing=tuple(missing),
    )


def _config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; it says how the network is built: fetch the model again")
    return read_json(file)


def _vae(config: VAEConfig, files: tuple[Path, ...], keys: Any) -> Component:
    return Component(
        name="vae", build=partial(WanVAE, config), files=files, keys=keys, prepare=lambda module: module.prepare()
    )


def _spec(
    folder_name: str,
    configs: list[TransformerConfig],
    vae: VAEConfig,
    schedule: str,
    options: Mapping[str, Any],
    boundary: float | None,
) -> ModelSpec:
    first = configs[0]
    variant = VARIANTS.get((first.width, first.num_layers, len(configs)))
    if first.in_channels != vae.z_dim or first.out_channels != vae.z_dim:
        raise ValueError(
            f"the transformer's config has {first.in_channels} channels in and {first.out_channels} out, the VAE's "
            f"config {vae.z_dim}; a text-to-video model has one number for all three: fetch the configs again"
        )
    if boundary is not None and schedule == "flow_linear":
        # The published code compares whole-number times, so the switch lies at the next thousandth.
        boundary = math.ceil(boundary * 1000) / 1000
    return ModelSpec(
        family="wan",
        name=variant or folder_name,
        latent_channels=vae.z_dim,
        stride=(vae.scale_factor_temporal, vae.scale_factor_spatial, vae.scale_factor_spatial),
        patch=first.patch_size,
        text_length=TEXT_LENGTH,
        max_positions=min(config.rope_max_seq_len for config in configs),
        schedule=schedule,
        sampler_options=options,
        defaults=PUBLISHED[variant or "wan2.1-t2v-1.3b"],
        boundary=boundary if len(configs) == 2 else None,
    )


def _read_scheduler(file: Path) -> tuple[str, float | None, dict[str, Any], str]:
    """Return (schedule, shift, sampler options, sampler) of a published scheduler; ValueError for other settings."""
    config = _config(file)
    kind = config.get("_class_name", "")

    def demand(**wanted: Any) -> None:
        for key, value in wanted.items():
            if (config.get(key, value) or None) != (value or None):
                raise ValueError(f"{file} has {key} = {config[key]!r}; supported is {value!r}")

    if kind == "UniPCMultistepScheduler":
        if config.get("prediction_type") != "flow_prediction" or not config.get("use_flow_sigmas"):
            raise ValueError(f"{file} is not a flow-matching schedule; supported: flow_prediction with use_flow_sigmas")
        demand(
            predict_x0=True, thresholding=False, lower_order_final=True, final_sigmas_type="zero", solver_p=None,
            use_dynamic_shifting=False, shift_terminal=None, use_karras_sigmas=False, use_exponential_sigmas=False,
            use_beta_sigmas=False, num_train_timesteps=1000,
        )
        options = {
            "order": int(config.get("solver_order", 2)),
            "solver": config.get("solver_type", "bh2"),
            "skip_corrector": tuple(config.get("disable_corrector", ())),
        }
        return "flow_linear", float(config.get("flow_shift", 1.0)), options, "unipc"
    if kind == "FlowMatchEulerDiscreteScheduler":
        demand(
            use_dynamic_shifting=False, invert_sigmas=False, shift_terminal=None, use_karras_sigmas=False,
            use_exponential_sigmas=False, use_beta_sigmas=False, stochastic_sampling=False, num_train_timesteps=1000,
        )
        return "flow_euler", float(config.get("shift", 1.0)), {}, "euler"
    raise ValueError(
        f"{file} names the scheduler {kind!r}; supported: UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler"
    )


def _build_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    if config.get("model_type") != "umt5":
        raise ValueError(f"the text encoder is a {config.get('model_type')!r}; Wan has 'umt5': fetch its config again")
    encoder = UMT5EncoderModel(UMT5Config(**config))
    encoder.encoder.embed_tokens = encoder.shared  # tied as published, also where nothing has been loaded yet
    return encoder


def _tied_keys(files: tuple[Path, ...], module: nn.Module) -> Mapping[str, Any]:
    """The token table is published under either of its two names, or both."""
    keys = names.text_encoder_keys(module)
    published = {name for file in files for name in header(file)}
    if "shared.weight" not in published and "encoder.embed_tokens.weight" in published:
        keys["encoder.embed_tokens.weight"] = keys.pop("shared.weight")
    return keys


def _open_original(folder: Path) -> Checkpoint:
    experts = [folder / name for name in EXPERT_FOLDERS if (folder / name).is_dir()] or [folder]
    missing: list[str] = []
    transformers = []
    for place in experts:
        config = _original_config(_config(place / "config.json"))
        files, gone = find(place, "diffusion_pytorch_model")
        missing += gone
        transformers.append((config, Component(
            name="transformer" if place == folder else place.name,
            build=partial(WanTransformer, config),
            files=files,
            keys=names.original_transformer_keys,
            keep_float32=WanTransformer.keep_float32,
        )))
    vae_file = next((folder / name for name in ORIGINAL_VAES if (folder / name).exists()), folder / ORIGINAL_VAES[0])
    text_file = folder / ORIGINAL_TEXT_ENCODER
    tokenizer = folder / "google" / "umt5-xxl"
    missing += [str(path) for path in (vae_file, text_file, tokenizer) if not path.exists()]
    configs = [config for config, _ in transformers]
    vae_config = _original_vae_config(vae_file)
    options = {"order": 2, "solver": "bh2"}
    spec = _spec(folder.name, configs, vae_config, "flow_linear", options, ORIGINAL_BOUNDARY)
    return Checkpoint(
        folder=folder,
        spec=spec,
        transformers=tuple(component for _, component in transformers),
        vae=_vae(vae_config, (vae_file,), names.original_vae_keys),
        text_encoder=Component(
            name="text_encoder",
            build=lambda: _build_text_encoder(_original_text_config(text_file)),
            files=(text_file,),
            keys=names.original_text_encoder_keys,
        ),
        tokenizer=tokenizer,
        missing=tuple(missing),
    )


def _original_config(given: Mapping[str, Any]) -> TransformerConfig:
    """Read the original repositories' transformer config."""
    if given.get("model_type", "t2v") not in ("t2v", "ti2v"):
        raise ValueError(f"the model is of type {given['model_type']!r}; supported: t2v, ti2v: give a text-to-video model")
    return TransformerConfig(
        num_attention_heads=given["num_heads"],
        attention_head_dim=given["dim"] // given["num_heads"],
        in_channels=given["in_dim"],
        out_channels=given["out_dim"],
        text_dim=given.get("text_dim", 4096),
        freq_dim=given["freq_dim"],
        ffn_dim=given["ffn_dim"],
        num_layers=given["num_layers"],
        eps=given["eps"],
    )


def _original_vae_config(file: Path) -> VAEConfig:
    """Read the widths off the weights: the original layout has no VAE config."""
    residual = file.name == "Wan2.2_VAE.pth"
    fixed: dict[str, Any] = {"dim_mult": (1, 2, 4, 4), "temperal_downsample": (False, True, True)}
    if residual:
        fixed |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                  "scale_factor_spatial": 16, "temperal_downsample": (False, True, True)}
    if not file.exists():
        return VAEConfig()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors((file,))}
    z_dim = shapes["conv2.weight"][0]
    mean, std = LATENT_STATISTICS[z_dim]
    return VAEConfig(
        z_dim=z_dim,
        base_dim=shapes["encoder.conv1.weight"][0],
        decoder_base_dim=shapes["decoder.head.0.gamma"][0],
        latents_mean=mean,
        latents_std=std,
        **fixed,
    )


def _original_text_config(file: Path) -> dict[str, Any]:
    """Read the encoder's numbers off the weights: the original layout has no config for it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors((file,))}
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return {
        "model_type": "umt5",
        "vocab_size": shapes["token_embedding.weight"][0],
        "d_model": shapes["token_embedding.weight"][1],
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }
