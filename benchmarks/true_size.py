"""Published models with random weights of their true size, made on the device: `--model wan2.1-t2v-1.3b@random`.

On disk is a folder of configs, a few KiB. Both sides get the same numbers, so that their results can be compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from runtime import weights
from runtime.model import DEMO, Model, choose_dtype, vae_dtype
from runtime.models import open_checkpoint
from runtime.models.spec import Autoencoder, Checkpoint, Transformer
from runtime.models.wan.published import ALIASES, BOUNDARIES, NETWORKS, UMT5_XXL, published, vae_config
from runtime.weights import Component

SUFFIX = "@random"
SEEDS = {"text_encoder": 1, "transformer": 2, "transformer_2": 3, "vae": 4}
TEXT_ONLY = ("t2v", "ti2v")  # the others take more than a prompt


def write_configs(folder: Path, name: str) -> None:
    """Write the configs of a published model, as a checkpoint without weights; ValueError for other names."""
    name = ALIASES.get(name, name)
    if name not in NETWORKS or not any(kind in name for kind in TEXT_ONLY):
        legal = [each for each in NETWORKS if any(kind in each for kind in TEXT_ONLY)]
        raise ValueError(f"there is no {name}{SUFFIX}; legal: {', '.join(f'{each}{SUFFIX}' for each in legal)}")
    found = published(name)
    assert found is not None
    defaults, channels = found[0].defaults, found[0].latent_channels
    experts = ("transformer", "transformer_2") if name in BOUNDARIES else ("transformer",)
    vae = {key: value for key, value in asdict(vae_config(channels)).items() if value is not None}
    scheduler = {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "num_train_timesteps": 1000, "flow_shift": defaults.shift,
    }  # fmt: skip
    text = UMT5_XXL | {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False}
    index: dict[str, Any] = {"_class_name": "WanPipeline", "boundary_ratio": BOUNDARIES.get(name)}
    index |= {expert: ["diffusers", "WanTransformer3DModel"] for expert in experts}
    index["expand_timesteps"] = "ti2v" in name
    parts = {f"{expert}/config.json": NETWORKS[name] for expert in experts}
    parts |= {"vae/config.json": vae, "text_encoder/config.json": text, "scheduler/scheduler_config.json": scheduler}
    for file, content in (parts | {"model_index.json": index}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")


def load(folder: Path, device: torch.device, dtype: str, engine: str) -> Model:
    """Return the model of a folder of configs, its weights random."""
    checkpoint, kind = open_checkpoint(folder), choose_dtype(dtype, device)
    transformers = tuple(cast(Transformer, prepared(part, device, kind)) for part in checkpoint.transformers)
    vae = autoencoder(checkpoint, device, vae_dtype(device, kind))
    model = RandomModel(checkpoint, transformers, vae, device, kind, engine)
    model.text_encoder = prepared(checkpoint.text_encoder, device, kind)
    model.fingerprint = model.text_fingerprint = f"random {checkpoint.spec.name}"
    return model


class RandomModel(Model):
    """A model without files: its autoencoder in another dtype has the same numbers, rounded."""

    def autoencoder(self, device: torch.device, dtype: torch.dtype) -> Autoencoder:
        if device.type == self.device.type and dtype == self.vae_dtype:
            return self.vae
        if self._other_vae is None or self._other_vae[:2] != (device, dtype):
            self._other_vae = None  # its memory goes first
            self._other_vae = device, dtype, autoencoder(self.checkpoint, device, dtype)
        return self._other_vae[2]


def autoencoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """Return the autoencoder; its numbers are drawn in float32, so that they are the same in every dtype."""
    module = made(checkpoint.vae, device, torch.float32)
    for place, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            kind = torch.float32 if checkpoint.vae.keep_float32(f"{place}.{name}") else dtype
            setattr(owner, name, nn.Parameter(parameter.to(kind), requires_grad=False))
    checkpoint.vae.prepare(module)
    return cast(Autoencoder, module)


def prepared(component: Component, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a component as it is after loading."""
    module = made(component, device, dtype)
    component.prepare(module)
    return module


@torch.no_grad()
def made(component: Component, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a component's module with random weights that keep the numbers' size from layer to layer."""
    with torch.device("meta"):
        module = component.build()
    module.requires_grad_(False).eval()
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    weights.allocate(module, component, device, dtype, names)
    generator = torch.Generator(device).manual_seed(SEEDS[component.name])
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        gain = ("norm" in name and name.endswith("weight")) or "gamma" in name or name.endswith(("q_norm", "k_norm"))
        if gain:
            parameter.mul_(0.2).add_(1.0)
        elif parameter.dim() > 1 and "modulation" not in name:
            parameter.mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.mul_(0.2)
    return module


def fill_peer(
    folder: Path, device: torch.device, dtype: str, build: Callable[[str], Any], loaded: Model | None = None
) -> dict[str, Any]:
    """Return a pipeline's networks, made by `build(name)`, with our weights under their published names.

    Those of a loaded model are shared as far as they are still as published, so that both fit into the memory.
    """
    checkpoint, kind = open_checkpoint(folder), choose_dtype(dtype, device)
    there: dict[str, Any] = {}
    if loaded is not None:
        parts = zip(checkpoint.transformers, loaded.transformers, strict=True)
        there = {"text_encoder": loaded.text_encoder} | {part.name: network for part, network in parts}
    found = {}
    for component in checkpoint.components:
        ours = there.get(component.name)
        if ours is None:
            ours = made(component, device, torch.float32 if component.name == "vae" else kind)
        if component.name == "text_encoder":  # under the published names here too
            found[component.name] = text_encoder_of(ours, build(component.name)).to(device)
            continue
        places, theirs = dict(ours.named_parameters(remove_duplicate=False)), build(component.name)
        kept = set(getattr(theirs, "_keep_in_fp32_modules", None) or ())  # its own choice, not the same as ours
        tensors = {}
        shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
        for name, slot in component.keys(ours).items():
            tensor = slot.within(places[slot.name]).reshape(shapes[name])
            tensors[name] = tensor if kept & set(name.split(".")) or component.name == "vae" else tensor.to(kind)
        theirs.load_state_dict(tensors, assign=True)
        found[component.name] = theirs.to(device).requires_grad_(False).eval()
    return found


def text_encoder_of(ours: nn.Module, theirs: Any) -> Any:
    """Return a peer's empty text encoder with the weights of ours, which both hold then."""
    tensors = dict(ours.state_dict())
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    theirs.load_state_dict(tensors, assign=True)
    return theirs.requires_grad_(False).eval()
