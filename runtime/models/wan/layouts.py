"""Wan's checkpoints in the diffusers layout, described from their configs; original.py has the repositories' own.

A checkpoint's own files (its scheduler's shift, its runtime.json) win over the named specs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from runtime.models.spec import Channels, Checkpoint, Conditioning, ImageSize, ModelSpec
from runtime.models.wan import weights as names
from runtime.models.wan.conditioning import control_channels, picture_channels
from runtime.models.wan.costs import WanCosts
from runtime.models.wan.specs import CAPTIONS, OTHER_VARIANTS, PUBLISHED, TEXT_LENGTH, VARIANTS
from runtime.models.wan.text_encoder import build_text_encoder
from runtime.models.wan.transformer import TransformerConfig, WanTransformer
from runtime.models.wan.vae import WanVAE
from runtime.models.wan.vae_config import VAEConfig
from runtime.weights import Component, Slot, find, read_json
from runtime.weights import shapes as tensor_shapes

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline", "WanDMDPipeline")
RECIPES = {"WanDMDPipeline": "fastwan-3"}  # of pipelines whose weights are distilled


def open_diffusers(folder: Path) -> Checkpoint:
    """Describe a checkpoint in the diffusers layout; ValueError for pipelines and settings that are not supported."""
    index = read_json(folder / "model_index.json")
    if index["_class_name"] not in PIPELINES:
        raise ValueError(f"{folder} holds a {index['_class_name']}; supported: {', '.join(PIPELINES)}")
    experts = [name for name in ("transformer", "transformer_2") if (index.get(name) or [None])[0] is not None]
    schedule, shift, options, sampler = _read_scheduler(folder / "scheduler" / "scheduler_config.json")
    missing: list[str] = []
    transformers = []
    for name in experts:
        config = TransformerConfig.from_dict(read_config(folder / name / "config.json"))
        files, gone = find(folder / name, "diffusion_pytorch_model")
        missing += gone
        transformers.append(
            (
                config,
                Component(
                    name=name,
                    build=partial(WanTransformer, config, integer_time=schedule == "flow_linear"),
                    files=files,
                    keys=names.transformer_keys,
                    other_keys=names.original_transformer_keys,
                    keep_float32=WanTransformer.keep_float32,
                    blocks="blocks",
                ),
            )
        )
    vae_config = VAEConfig.from_dict(read_config(folder / "vae" / "config.json"))
    vae_files, gone = find(folder / "vae", "diffusion_pytorch_model")
    text_files, gone_text = find(folder / "text_encoder", "model")
    missing += [*gone, *gone_text]
    boundary = index.get("boundary_ratio")
    if len(experts) == 2 and boundary is None:
        raise ValueError(f"{folder} has two experts and no boundary_ratio in model_index.json; expected one in (0, 1)")
    conditioning = conditioning_of(transformers[0][0], vae_config, bool(index.get("expand_timesteps")))
    spec = spec_of(
        folder.name, [config for config, _ in transformers], vae_config, schedule, options, boundary, conditioning
    )
    image_encoder, image_size = None, None
    if (index.get("image_encoder") or [None])[0] is not None:
        image_encoder, lacking = _image_encoder(folder / "image_encoder")
        missing += lacking
        two = transformers[0][0].pos_embed_seq_len is not None
        image_size = _image_size(read_config(folder / "image_processor" / "preprocessor_config.json"), 2 if two else 1)
    spec = replace(
        spec,
        defaults=replace(
            spec.defaults, shift=shift or spec.defaults.shift, sampler=sampler, recipe=RECIPES.get(index["_class_name"])
        ),
    )
    text_config = read_config(folder / "text_encoder" / "config.json")
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        missing.append(str(tokenizer))
    return Checkpoint(
        folder=folder,
        spec=spec,
        transformers=tuple(component for _, component in transformers),
        vae=vae_component(vae_config, vae_files, names.vae_keys),
        text_encoder=Component(
            name="text_encoder",
            build=partial(build_text_encoder, text_config),
            files=text_files,
            keys=partial(_tied_keys, text_files),
            ignored=frozenset({"shared.weight", "encoder.embed_tokens.weight"}),
            blocks="encoder.block",
        ),
        tokenizer=tokenizer,
        costs=partial(WanCosts, transformers[0][0], vae_config, text_config),
        missing=tuple(missing),
        image_encoder=image_encoder,
        image_size=image_size,
        channels=channels(spec),
    )


def conditioning_of(config: TransformerConfig, vae: VAEConfig, expand_timesteps: bool) -> Conditioning:
    """Tell from the configs how known frames are taken."""
    if config.vace_layers:
        return "control"
    if config.in_channels == 2 * vae.z_dim + vae.stride[0]:
        return "channels"
    return "clean_tokens" if expand_timesteps else "blend"


def channels(spec: ModelSpec) -> Channels | None:
    """Return how known frames become channels, for weights that take them so."""
    if spec.conditioning == "control":
        return control_channels
    return picture_channels if spec.conditioning == "channels" else None


def _image_encoder(folder: Path) -> tuple[Component, tuple[str, ...]]:
    files, gone = find(folder, "model")
    config = read_config(folder / "config.json")

    def build() -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionModel(CLIPVisionConfig(**config))

    def keys(module: nn.Module) -> dict[str, Slot]:
        """Older versions of transformers say vision_model. before each name, in the file, the module, or both."""
        published = {name.removeprefix("vision_model."): name for file in files for name in tensor_shapes(file)}
        found = {name.removeprefix("vision_model."): name for name, _ in module.named_parameters()}
        return {published.get(bare, bare): Slot(name) for bare, name in found.items()}

    extra = frozenset({"vision_model.embeddings.position_ids", "embeddings.position_ids"})
    return Component(
        name="image_encoder", build=build, files=files, keys=keys, ignored=extra, prepare=number_positions
    ), gone


def number_positions(module: nn.Module) -> None:
    """Fill the buffers of an image encoder, which hold nothing but the numbers of its positions."""
    for name, buffer in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        positions = torch.arange(buffer.shape[-1], device=next(module.parameters()).device)
        module.get_submodule(owner).register_buffer(leaf, positions.expand(buffer.shape), persistent=False)


def _image_size(config: Mapping[str, Any], pictures: int) -> ImageSize:
    """Read a published preprocessor_config.json, in either of its two ways of writing a size."""
    edge, crop = config["size"], config["crop_size"]
    edge = edge["shortest_edge"] if isinstance(edge, dict) else edge
    rows, columns = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    return ImageSize(pictures, edge, (rows, columns), tuple(config["image_mean"]), tuple(config["image_std"]))


def read_config(file: Path) -> dict[str, Any]:
    """Return what a network's config says; FileNotFoundError where it is missing."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; it says how the network is built: fetch the model again")
    return read_json(file)


def vae_component(config: VAEConfig, files: tuple[Path, ...], keys: Any) -> Component:
    """Return how the autoencoder is built and loaded."""
    return Component(
        name="vae",
        build=partial(WanVAE, config),
        files=files,
        keys=keys,
        keep_float32=WanVAE.keep_float32,
        prepare=lambda module: cast(WanVAE, module).prepare(),
    )


def spec_of(
    folder_name: str,
    configs: list[TransformerConfig],
    vae: VAEConfig,
    schedule: str,
    options: Mapping[str, Any],
    boundary: float | None,
    conditioning: Conditioning,
) -> ModelSpec:
    """Return the facts of a checkpoint; ValueError where its configs do not fit each other."""
    first = configs[0]
    variants = OTHER_VARIANTS.get(conditioning, VARIANTS)
    variant = variants.get((first.width, first.num_layers, len(configs)))
    more = vae.z_dim + vae.stride[0] if conditioning == "channels" else 0
    if first.in_channels != vae.z_dim + more or first.out_channels != vae.z_dim:
        raise ValueError(
            f"the transformer's config has {first.in_channels} channels in and {first.out_channels} out, the VAE's "
            f"config {vae.z_dim}; a text-to-video model has one number for all three, one that goes on from pictures "
            "twice that and 4 more in: fetch the configs again"
        )
    if boundary is not None and schedule == "flow_linear":
        # The published code compares whole-number times, so the switch lies at the next thousandth.
        boundary = math.ceil(boundary * 1000) / 1000
    return ModelSpec(
        family="wan",
        name=variant or folder_name,
        latent_channels=vae.z_dim,
        stride=vae.stride,
        patch=first.patch_size,
        text_length=TEXT_LENGTH,
        max_positions=min(config.rope_max_seq_len for config in configs),
        schedule=schedule,
        sampler_options=options,
        defaults=PUBLISHED[variant or "wan2.1-t2v-1.3b"],
        boundary=boundary if len(configs) == 2 else None,
        conditioning=conditioning,
        captions=CAPTIONS,
    )


def _read_scheduler(file: Path) -> tuple[str, float | None, dict[str, Any], str]:
    """Return (schedule, shift, sampler options, sampler) of a published scheduler; ValueError for other settings."""
    config = read_config(file)
    kind = config.get("_class_name", "")

    def demand(**wanted: Any) -> None:
        for key, value in wanted.items():
            if (config.get(key, value) or None) != (value or None):
                raise ValueError(f"{file} has {key} = {config[key]!r}; supported is {value!r}")

    if kind == "UniPCMultistepScheduler":
        if config.get("prediction_type") != "flow_prediction" or not config.get("use_flow_sigmas"):
            raise ValueError(f"{file} is not a flow-matching schedule; supported: flow_prediction with use_flow_sigmas")
        demand(
            predict_x0=True,
            thresholding=False,
            lower_order_final=True,
            final_sigmas_type="zero",
            solver_p=None,
            use_dynamic_shifting=False,
            shift_terminal=None,
            use_karras_sigmas=False,
            use_exponential_sigmas=False,
            use_beta_sigmas=False,
            num_train_timesteps=1000,
        )
        options = {
            "order": int(config.get("solver_order", 2)),
            "solver": config.get("solver_type", "bh2"),
            "skip_corrector": tuple(config.get("disable_corrector", ())),
        }
        return "flow_linear", float(config.get("flow_shift", 1.0)), options, "unipc"
    if kind == "FlowMatchEulerDiscreteScheduler":
        demand(
            use_dynamic_shifting=False,
            invert_sigmas=False,
            shift_terminal=None,
            use_karras_sigmas=False,
            use_exponential_sigmas=False,
            use_beta_sigmas=False,
            stochastic_sampling=False,
            num_train_timesteps=1000,
        )
        return "flow_euler", float(config.get("shift", 1.0)), {}, "euler"
    raise ValueError(
        f"{file} names the scheduler {kind!r}; supported: UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler"
    )


def _tied_keys(files: tuple[Path, ...], module: nn.Module) -> Mapping[str, Any]:
    """The token table is published under either of its two names, or both."""
    keys = names.text_encoder_keys(module)
    published = {name for file in files for name in tensor_shapes(file)}
    if "shared.weight" not in published and "encoder.embed_tokens.weight" in published:
        keys["encoder.embed_tokens.weight"] = keys.pop("shared.weight")
    return keys
