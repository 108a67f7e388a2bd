"""Wan's two published layouts, described from their configs: the diffusers one, and the original repositories'.

A checkpoint's own files (its scheduler's shift, its runtime.json) win over the named specs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from runtime.models.spec import Channels, Checkpoint, Conditioning, ImageSize, ModelSpec, config_from
from runtime.models.wan import weights as names
from runtime.models.wan.conditioning import control_channels, picture_channels
from runtime.models.wan.costs import WanCosts
from runtime.models.wan.specs import CAPTIONS, LATENT_STATISTICS, OTHER_VARIANTS, PUBLISHED, TEXT_LENGTH, VARIANTS
from runtime.models.wan.transformer import TransformerConfig, WanTransformer
from runtime.models.wan.vae import VAEConfig, WanVAE
from runtime.weights import Component, Slot, find, read_json
from runtime.weights import shapes as tensor_shapes

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline")
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")  # of the original layout
ORIGINAL_BOUNDARY = 0.875
ORIGINAL_VAES = {16: "Wan2.1_VAE.pth", 48: "Wan2.2_VAE.pth"}  # latent channels -> file
ORIGINAL_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"


def recognise(folder: Path) -> bool:
    """Tell whether a folder holds a Wan model in the diffusers or the original layout."""
    index = folder / "model_index.json"
    if index.exists():
        return "Wan" in str(read_json(index).get("_class_name", ""))
    config = folder / "config.json"
    if config.exists() and "WanModel" in str(read_json(config).get("_class_name", "")):
        return True
    parts = (*ORIGINAL_VAES.values(), ORIGINAL_TEXT_ENCODER, *EXPERT_FOLDERS)
    return any((folder / name).exists() for name in parts)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Describe a Wan checkpoint; ValueError for pipelines and settings that are not supported."""
    return _open_diffusers(folder) if (folder / "model_index.json").exists() else _open_original(folder)


def _open_diffusers(folder: Path) -> Checkpoint:
    index = read_json(folder / "model_index.json")
    if index["_class_name"] not in PIPELINES:
        raise ValueError(f"{folder} holds a {index['_class_name']}; supported: {', '.join(PIPELINES)}")
    experts = [name for name in ("transformer", "transformer_2") if (index.get(name) or [None])[0] is not None]
    schedule, shift, options, sampler = _read_scheduler(folder / "scheduler" / "scheduler_config.json")
    missing: list[str] = []
    transformers = []
    for name in experts:
        config = TransformerConfig.from_dict(_config(folder / name / "config.json"))
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
                    keep_float32=WanTransformer.keep_float32,
                    blocks="blocks",
                ),
            )
        )
    vae_config = VAEConfig.from_dict(_config(folder / "vae" / "config.json"))
    vae_files, gone = find(folder / "vae", "diffusion_pytorch_model")
    text_files, gone_text = find(folder / "text_encoder", "model")
    missing += [*gone, *gone_text]
    boundary = index.get("boundary_ratio")
    if len(experts) == 2 and boundary is None:
        raise ValueError(f"{folder} has two experts and no boundary_ratio in model_index.json; expected one in (0, 1)")
    conditioning = _conditioning(transformers[0][0], vae_config, bool(index.get("expand_timesteps")))
    spec = _spec(
        folder.name, [config for config, _ in transformers], vae_config, schedule, options, boundary, conditioning
    )
    image_encoder, image_size = None, None
    if (index.get("image_encoder") or [None])[0] is not None:
        image_encoder, lacking = _image_encoder(folder / "image_encoder")
        missing += lacking
        two = transformers[0][0].pos_embed_seq_len is not None
        image_size = _image_size(_config(folder / "image_processor" / "preprocessor_config.json"), 2 if two else 1)
    spec = replace(
        spec,
        defaults=replace(spec.defaults, shift=shift or spec.defaults.shift, sampler=sampler),
    )
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
            blocks="encoder.block",
        ),
        tokenizer=tokenizer,
        costs=partial(WanCosts, transformers[0][0], vae_config, text_config),
        missing=tuple(missing),
        image_encoder=image_encoder,
        image_size=image_size,
        channels=_channels(spec),
    )


def _conditioning(config: TransformerConfig, vae: VAEConfig, expand_timesteps: bool) -> Conditioning:
    """Tell from the configs how known frames are taken."""
    if config.vace_layers:
        return "control"
    if config.in_channels == 2 * vae.z_dim + vae.stride[0]:
        return "channels"
    return "clean_tokens" if expand_timesteps else "blend"


def _channels(spec: ModelSpec) -> Channels | None:
    if spec.conditioning == "control":
        return control_channels
    return picture_channels if spec.conditioning == "channels" else None


def _image_encoder(folder: Path) -> tuple[Component, tuple[str, ...]]:
    files, gone = find(folder, "model")
    config = _config(folder / "config.json")

    def build() -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionModel(CLIPVisionConfig(**config))

    def keys(module: nn.Module) -> dict[str, Slot]:
        """Older versions of transformers say vision_model. before each name, in the file, the module, or both."""
        published = {name.removeprefix("vision_model."): name for file in files for name in tensor_shapes(file)}
        found = {name.removeprefix("vision_model."): name for name, _ in module.named_parameters()}
        return {published.get(bare, bare): Slot(name) for bare, name in found.items()}

    def prepare(module: nn.Module) -> None:
        for name, buffer in list(module.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.shape[-1], device=next(module.parameters()).device)
            module.get_submodule(owner).register_buffer(leaf, positions.expand(buffer.shape), persistent=False)

    extra = frozenset({"vision_model.embeddings.position_ids", "embeddings.position_ids"})
    return Component(name="image_encoder", build=build, files=files, keys=keys, ignored=extra, prepare=prepare), gone


def _image_size(config: Mapping[str, Any], pictures: int) -> ImageSize:
    """Read a published preprocessor_config.json, in either of its two ways of writing a size."""
    edge, crop = config["size"], config["crop_size"]
    edge = edge["shortest_edge"] if isinstance(edge, dict) else edge
    rows, columns = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    return ImageSize(pictures, edge, (rows, columns), tuple(config["image_mean"]), tuple(config["image_std"]))


def _config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; it says how the network is built: fetch the model again")
    return read_json(file)


def _vae(config: VAEConfig, files: tuple[Path, ...], keys: Any) -> Component:
    return Component(
        name="vae",
        build=partial(WanVAE, config),
        files=files,
        keys=keys,
        prepare=lambda module: cast(WanVAE, module).prepare(),
    )


def _spec(
    folder_name: str,
    configs: list[TransformerConfig],
    vae: VAEConfig,
    schedule: str,
    options: Mapping[str, Any],
    boundary: float | None,
    conditioning: Conditioning,
) -> ModelSpec:
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
    published = {name for file in files for name in tensor_shapes(file)}
    if "shared.weight" not in published and "encoder.embed_tokens.weight" in published:
        keys["encoder.embed_tokens.weight"] = keys.pop("shared.weight")
    return keys


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

    @classmethod
    def from_file(cls, file: Path) -> OriginalConfig:
        """Read a published config; ValueError for missing and unknown keys, and for variants not supported."""
        given = _config(file)
        if (kind := given.get("model_type", "t2v")) not in ("t2v", "ti2v"):
            raise ValueError(f"{file} has model_type {kind!r}; supported: t2v, ti2v: give a text-to-video model")
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
        if config.in_dim not in ORIGINAL_VAES:
            raise ValueError(f"{file} has in_dim {config.in_dim}; supported: {', '.join(map(str, ORIGINAL_VAES))}")
        return config

    @property
    def transformer(self) -> TransformerConfig:
        """The same numbers by their names in the diffusers layout."""
        return TransformerConfig.from_dict(
            {
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


def _open_original(folder: Path) -> Checkpoint:
    two = any((folder / name).is_dir() for name in EXPERT_FOLDERS)
    places = [folder / name for name in EXPERT_FOLDERS] if two else [folder]
    configs = [OriginalConfig.from_file(place / "config.json") for place in places]
    missing: list[str] = []
    transformers = []
    for place, config in zip(places, configs, strict=True):
        files, gone = find(place, "diffusion_pytorch_model")
        missing += gone
        transformers.append(
            Component(
                name=place.name if two else "transformer",
                build=partial(WanTransformer, config.transformer),
                files=files,
                keys=names.original_transformer_keys,
                keep_float32=WanTransformer.keep_float32,
                blocks="blocks",
            )
        )
    vae_file = folder / ORIGINAL_VAES[configs[0].in_dim]
    text_file = folder / ORIGINAL_TEXT_ENCODER
    tokenizer = folder / "google" / "umt5-xxl"
    missing += [str(path) for path in (vae_file, text_file, tokenizer) if not path.exists()]
    vae_config = _original_vae_config(vae_file, configs[0].in_dim)
    options = {"order": 2, "solver": "bh2"}
    conditioning: Conditioning = "clean_tokens" if configs[0].in_dim == 48 else "blend"  # only Wan 2.2 TI2V has 48
    networks = [config.transformer for config in configs]
    spec = _spec(folder.name, networks, vae_config, "flow_linear", options, ORIGINAL_BOUNDARY, conditioning)
    return Checkpoint(
        folder=folder,
        spec=replace(spec, text_length=configs[0].text_len),
        transformers=tuple(transformers),
        vae=_vae(vae_config, (vae_file,), names.original_vae_keys),
        text_encoder=Component(
            name="text_encoder",
            build=lambda: _build_text_encoder(_original_text_config(text_file)),  # the file is read only then
            files=(text_file,),
            keys=names.original_text_encoder_keys,
            blocks="encoder.block",
        ),
        tokenizer=tokenizer,
        costs=lambda: WanCosts(configs[0].transformer, vae_config, _original_text_config(text_file)),
        missing=tuple(missing),
    )


def _original_vae_config(file: Path, z_dim: int) -> VAEConfig:
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


def _original_text_config(file: Path) -> dict[str, Any]:
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
