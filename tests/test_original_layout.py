"""The original Wan repositories' layout: the same model as in the diffusers layout, and what is said of bad files."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import save_file

import runtime
from runtime.denoising import prepare_context
from runtime.engines.eager import build
from runtime.models import open_checkpoint
from runtime.models.wan.specs import LATENT_STATISTICS
from runtime.text import run_encoder
from tests import published
from tests.published import DEMO, Tiny, relative

State = dict[str, torch.Tensor]

T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
EXPERTS = ("high_noise_model", "low_noise_model")
PROMPT = "a red ball rolls left over green grass"


@dataclass(frozen=True)
class Case:
    """A model, written in both layouts."""

    tiny: Tiny
    shards: int = 1
    vae_file: str = "Wan2.1_VAE.pth"
    build: Callable[[Tiny], DiffusionPipeline] = published.pipeline
    kind: str = "t2v"


WIDE = Tiny(channels=16, res_blocks=2, shift=5.0, text_length=512, seed=100)
PICTURES = {  # what goes on from pictures, or is told where
    "i2v": Case(WIDE, build=partial(published.channels_pipeline, images=1), kind="i2v"),
    "flf2v": Case(WIDE, build=partial(published.channels_pipeline, images=2), kind="flf2v"),
    "i2v-two-experts": Case(replace(WIDE, experts=2), build=published.channels_pipeline, kind="i2v"),
    "vace": Case(WIDE, build=published.control_pipeline, kind="vace"),
}
CASES = {
    "wan2.1": Case(Tiny(channels=16, res_blocks=2, shift=5.0, seed=60)),
    "sharded": Case(Tiny(channels=16, res_blocks=2, shift=5.0, layers=3, ffn=40, cross_norm=False, seed=70), shards=3),
    "two-experts": Case(Tiny(channels=16, res_blocks=2, shift=5.0, experts=2, seed=80), shards=2),
    "wan2.2-vae": Case(Tiny(channels=48, res_blocks=2, shift=5.0, residual=True, seed=90), vae_file="Wan2.2_VAE.pth"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[WanPipeline, Path, Path]]:
    """Per case the reference pipeline, the folder in the diffusers layout, and the one in the original layout."""
    root = tmp_path_factory.mktemp("original")
    return {
        name: (write(case, root / name), root / name / "diffusers", root / name / "original")
        for name, case in (CASES | PICTURES).items()
    }


def write(case: Case, root: Path) -> DiffusionPipeline:
    tiny = case.tiny
    pipe = case.build(tiny)
    mean, std = LATENT_STATISTICS[tiny.channels]  # the original layout has no place for others
    pipe.vae.register_to_config(latents_mean=list(mean), latents_std=list(std))
    pipe.text_encoder.bfloat16().float()  # numbers that the original's bfloat16 file holds exactly
    pipe.save_pretrained(root / "diffusers")
    (root / "diffusers" / "runtime.json").write_text(json.dumps({"text_length": tiny.text_length}))
    folder = root / "original"
    experts = [pipe.transformer, pipe.transformer_2][: tiny.experts]
    for expert, name in zip(experts, EXPERTS if tiny.experts == 2 else ("",), strict=True):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config_of(tiny, **KINDS.get(case.kind, {}))))
        save_shards(original_transformer(expert.state_dict()), folder / name, case.shards)
    torch.save(original_vae(pipe.vae.state_dict(), tiny.residual), folder / case.vae_file)
    text = original_text(pipe.text_encoder.state_dict())
    torch.save({name: tensor.bfloat16() for name, tensor in text.items()}, folder / T5)
    shutil.copytree(DEMO / "tokenizer", folder / "google" / "umt5-xxl")
    if (encoder := getattr(pipe, "image_encoder", None)) is not None:
        torch.save(original_clip(encoder.state_dict()), folder / CLIP)
    return pipe


KINDS = {  # keys of the published configs beside those of text-to-video
    "i2v": {"model_type": "i2v", "in_dim": 36, "cross_attn_norm": True},
    "flf2v": {"model_type": "flf2v", "in_dim": 36, "cross_attn_norm": True},
    "vace": {"model_type": "vace", "vace_layers": [0, 2], "vace_in_dim": 96, "num_layers": 3, "cross_attn_norm": True},
}


def config_of(tiny: Tiny, **changed: object) -> dict:
    """Return the keys of a published config.json, and those of its code's defaults that tiny models need changed."""
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": tiny.heads * tiny.head_dim,
        "eps": 1e-06,
        "ffn_dim": tiny.ffn,
        "freq_dim": 32,
        "in_dim": tiny.channels,
        "model_type": "ti2v" if tiny.residual else "t2v",
        "num_heads": tiny.heads,
        "num_layers": tiny.layers,
        "out_dim": tiny.channels,
        "text_len": tiny.text_length,
    }
    return {**config, "text_dim": tiny.text_dim, "cross_attn_norm": tiny.cross_norm, **changed}


def save_shards(state: State, folder: Path, count: int) -> None:
    if count == 1:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        return
    weight_map = {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(state.items())[i::count])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def renamed(state: State, pairs: dict[str, str]) -> State:
    """Replace parts of names, in order; the tensors become contiguous copies."""
    result = {}
    for name, tensor in state.items():
        for old, new in pairs.items():
            name = name.replace(old, new)
        result[name] = tensor.clone()
    assert len(result) == len(state)
    return result


def original_transformer(state: State) -> State:
    """Rename a diffusers transformer's state to the names of the original `wan/modules/model.py`."""
    state = {("head.modulation" if name == "scale_shift_table" else name): t for name, t in state.items()}
    state = {re.sub(r"(vace_blocks.*)proj_out", r"\1after_proj", name): t for name, t in state.items()}
    return renamed(state, {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "proj_out": "head.head", "scale_shift_table": "modulation", "attn1": "self_attn", "attn2": "cross_attn",
        "image_embedder.norm2": "image_embedder.last",
        "to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v", ".norm2.": ".norm3.",
        "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "add_k_proj": "k_img", "add_v_proj": "v_img",
        "norm_added_k": "norm_k_img", "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.last": "img_emb.proj.4",
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos", "proj_in": "before_proj",
    })  # fmt: skip


def original_clip(state: State) -> State:
    """Rename a transformers CLIP vision model's state to the names of `wan/modules/clip.py`, and fuse q, k and v."""
    state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items() if "position_ids" not in name}
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("self_attn.q_proj", "attn.to_qkv")] = torch.cat(parts)
    state["embeddings.class_embedding"] = state["embeddings.class_embedding"][None, None]
    state["embeddings.position_embedding.weight"] = state["embeddings.position_embedding.weight"][None]
    found = renamed(state, {
        "embeddings.class_embedding": "cls_embedding", "embeddings.patch_embedding": "patch_embedding",
        "embeddings.position_embedding.weight": "pos_embedding", "pre_layrnorm": "pre_norm",
        "post_layernorm": "post_norm", "encoder.layers": "transformer", "self_attn.out_proj": "attn.proj",
        "layer_norm": "norm", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
    })  # fmt: skip
    others = {"visual.head": torch.zeros(2, 2), "textual.token_embedding.weight": torch.zeros(3, 2)}
    return {f"visual.{name}": tensor for name, tensor in found.items()} | others | {"log_scale": torch.zeros(())}


def original_vae(state: State, residual: bool) -> State:
    """Rename a diffusers VAE's state, of the published depth, to the names of `vae.py` (2.1) or `vae2_2.py`."""
    moved = {}
    for name, tensor in state.items():
        part, *path = name.split(".")
        if path[0] == "down_blocks" and residual:  # two residual blocks, then the downsampler
            place = {"resnets": int(path[3]) if path[3].isdigit() else 0, "downsampler": 2}[path[2]]
            rest = path[4:] if path[2] == "resnets" else path[3:]
            name = ".".join([part, "downsamples", path[1], "downsamples", str(place), *rest])
        elif path[0] == "down_blocks":
            name = ".".join([part, "downsamples", *path[1:]])
        elif path[0] == "up_blocks":  # three residual blocks, then the upsampler
            place = int(path[3]) if path[2] == "resnets" else 3
            rest = path[3:] if path[2] == "upsampler" else path[4:]
            number = [path[1], "upsamples", str(place)] if residual else [str(4 * int(path[1]) + place)]
            name = ".".join([part, "upsamples", *number, *rest])
        moved[name] = tensor
    blocks = {"norm1": "residual.0", ".conv1.": ".residual.2.", "norm2": "residual.3", ".conv2.": ".residual.6."}
    return renamed(moved, {
        **blocks, "conv_shortcut": "shortcut", "mid_block.resnets.0": "middle.0", "mid_block.attentions.0": "middle.1",
        "mid_block.resnets.1": "middle.2", "norm_out": "head.0", "conv_out": "head.2", "conv_in": "conv1",
        "post_quant_conv": "conv2", "quant_conv": "conv1",
    })  # fmt: skip


def original_text(state: State) -> State:
    """Rename a transformers UMT5 encoder's state to the names of the original `wan/modules/t5.py`."""
    state = {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    return renamed(state, {
        "shared": "token_embedding", "encoder.final_layer_norm": "norm", "encoder.block": "blocks",
        "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2",
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding", "layer.0.SelfAttention": "attn",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0", "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
    })  # fmt: skip


# The renaming above, against others' knowledge of the names.


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", [*CASES, *PICTURES])
def test_transformer_names_against_diffusers_converter(written: dict, name: str) -> None:
    state = dict(written[name][0].transformer.state_dict())
    state.pop("condition_embedder.image_embedder.pos_embed", None)  # which that converter does not know
    assert same(convert_wan_transformer_to_diffusers(original_transformer(state)), state)


def test_vae_names_against_diffusers_converter(written: dict) -> None:
    state = written["wan2.1"][0].vae.state_dict()
    assert same(convert_wan_vae_to_diffusers(original_vae(state, residual=False)), state)


def test_wan22_vae_names_against_published_code(written: dict) -> None:
    """diffusers' converter knows only 2.1's nesting, so names and shapes are those that `vae2_2.py` constructs."""
    pipe = written["wan2.2-vae"][0]
    ours = {name: tuple(t.shape) for name, t in original_vae(pipe.vae.state_dict(), residual=True).items()}
    assert ours == published_vae22(pipe.vae.config.base_dim, pipe.vae.config.decoder_base_dim, 48)


def published_vae22(width: int, decoder_width: int, z: int) -> dict[str, tuple[int, ...]]:
    """Walk the constructors of the published `wan/modules/vae2_2.py`: name -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, into: int, out: int, *kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, *kernel), (out,)

    def residual_block(name: str, into: int, out: int) -> None:
        shapes[f"{name}.residual.0.gamma"], shapes[f"{name}.residual.3.gamma"] = (into, 1, 1, 1), (out, 1, 1, 1)
        conv(f"{name}.residual.2", into, out, 3, 3, 3)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.shortcut", into, out, 1, 1, 1)

    def ends(part: str, middle: int, last: int, first: tuple[int, int], out: int) -> None:
        conv(f"{part}.conv1", *first, 3, 3, 3)
        residual_block(f"{part}.middle.0", middle, middle)
        shapes[f"{part}.middle.1.norm.gamma"] = (middle, 1, 1)
        conv(f"{part}.middle.1.to_qkv", middle, 3 * middle, 1, 1)
        conv(f"{part}.middle.1.proj", middle, middle, 1, 1)
        residual_block(f"{part}.middle.2", middle, middle)
        shapes[f"{part}.head.0.gamma"] = (last, 1, 1, 1)
        conv(f"{part}.head.2", last, out, 3, 3, 3)

    multiples, time_down = (1, 2, 4, 4), (False, True, True)
    for part, list_name, base, count in (
        ("encoder", "downsamples", width, 2),
        ("decoder", "upsamples", decoder_width, 3),
    ):
        down = part == "encoder"
        widths = [base * m for m in ((1, *multiples) if down else (4, *multiples[::-1]))]
        for i, (into, out) in enumerate(itertools.pairwise(widths)):
            block = f"{part}.{list_name}.{i}.{list_name}"
            for j in range(count):
                residual_block(f"{block}.{j}", into if j == 0 else out, out)
            if i < 3:
                conv(f"{block}.{count}.resample.1", out, out, 3, 3)
                if (time_down if down else time_down[::-1])[i]:
                    conv(f"{block}.{count}.time_conv", out, out if down else 2 * out, 3, 1, 1)
    ends("encoder", 4 * width, 4 * width, (12, width), 2 * z)
    ends("decoder", 4 * decoder_width, decoder_width, (z, 4 * decoder_width), 12)
    conv("conv1", 2 * z, 2 * z, 1, 1, 1)
    conv("conv2", z, z, 1, 1, 1)
    return shapes


def test_latent_statistics_are_those_of_diffusers() -> None:
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert LATENT_STATISTICS[16] == (tuple(defaults["latents_mean"].default), tuple(defaults["latents_std"].default))


def published_t5(state: State, ids: torch.Tensor, heads: int) -> torch.Tensor:
    """Run the published `wan/modules/t5.py` on tensors by its own names: ids [S] -> [S, D]."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return state[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)

    distance = torch.arange(len(ids))[None] - torch.arange(len(ids))[:, None]  # key minus query
    near = distance.abs()
    far = (8 + torch.log(near.float() / 8) / math.log(128 / 8) * 8).long().clamp(max=15)
    bucket = (distance > 0).long() * 16 + torch.where(near < 8, near, far)  # 16 buckets a direction, 8 of them exact
    x = state["token_embedding.weight"][ids]
    for i in range(len({name.split(".")[1] for name in state if name.startswith("blocks.")})):
        block = f"blocks.{i}"
        h = norm(x, f"{block}.norm1")
        q, k, v = (F.linear(h, state[f"{block}.attn.{n}.weight"]).unflatten(1, (heads, -1)) for n in "qkv")
        scores = torch.einsum("inc,jnc->nij", q, k)  # not scaled
        scores = scores + state[f"{block}.pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        y = torch.einsum("nij,jnc->inc", scores.softmax(dim=-1), v).flatten(1)
        x = x + F.linear(y, state[f"{block}.attn.o.weight"])
        h = norm(x, f"{block}.norm2")
        gate = F.gelu(F.linear(h, state[f"{block}.ffn.gate.0.weight"]), approximate="tanh")
        x = x + F.linear(F.linear(h, state[f"{block}.ffn.fc1.weight"]) * gate, state[f"{block}.ffn.fc2.weight"])
    return norm(x, "norm")


def test_text_encoder_against_published_code(written: dict) -> None:
    folder = written["wan2.1"][2]
    state = {name: tensor.float() for name, tensor in torch.load(folder / T5, weights_only=True).items()}
    ids = torch.randint(len(state["token_embedding.weight"]), (150,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours = runtime.load(folder).text_encoder(ids[None])[0]
        theirs = published_t5(state, ids, heads=3)
    assert relative(ours, theirs) <= 1e-5


# One model, two layouts.


@pytest.fixture(scope="module", params=CASES)
def pair(written: dict, request: pytest.FixtureRequest) -> tuple[Tiny, runtime.Model, runtime.Model]:
    """The same weights, loaded from the original layout and from the diffusers layout."""
    _, diffusers, original = written[request.param]
    return CASES[request.param].tiny, runtime.load(original), runtime.load(diffusers)


def test_spec_is_the_same(pair: tuple) -> None:
    tiny, ours, theirs = pair
    for key in ("latent_channels", "stride", "patch", "text_length", "max_positions", "schedule", "boundary"):
        assert getattr(ours.spec, key) == getattr(theirs.spec, key), key
    assert ours.spec.schedule == "flow_linear"
    assert ours.spec.defaults.sampler == "unipc"
    assert ours.spec.defaults.shift == theirs.spec.defaults.shift == 5.0
    assert ours.spec.boundary == (0.875 if tiny.experts == 2 else None)
    assert {key: theirs.spec.sampler_options[key] for key in ours.spec.sampler_options} == ours.spec.sampler_options


def test_networks_are_the_same(pair: tuple) -> None:
    tiny, ours, theirs = pair
    assert len(ours.transformers) == len(theirs.transformers) == tiny.experts
    generator = torch.Generator().manual_seed(1)
    shape = (tiny.channels, 2, 4, 6)
    x = torch.randn((1, *shape), generator=generator)
    text = torch.randn((7, tiny.text_dim), generator=generator)
    sigma = torch.tensor([0.7], dtype=torch.float64)
    velocities = []
    for model in (ours, theirs):
        context = prepare_context(model, [text], shape)
        with torch.no_grad():
            velocities.append([build(expert, i)(x, sigma, context) for i, expert in enumerate(model.transformers)])
    assert all(torch.equal(a, b) for a, b in zip(*velocities, strict=True))
    if tiny.experts == 2:
        assert not torch.equal(*velocities[0])

    latents = torch.randn((tiny.channels, 3, 2, 2), generator=generator)
    assert np.array_equal(runtime.decode(ours, latents).frames, runtime.decode(theirs, latents).frames)
    _, height, width = (2 * n for n in ours.spec.stride)
    frames = torch.randint(256, (5, height, width, 3), generator=generator, dtype=torch.uint8).numpy()
    assert torch.equal(runtime.encode(ours, frames), runtime.encode(theirs, frames))
    assert torch.equal(run_encoder(ours, PROMPT).tokens, run_encoder(theirs, PROMPT).tokens)


def test_whole_request_is_the_same(pair: tuple) -> None:
    _, ours, theirs = pair
    request = runtime.Request(
        prompt=PROMPT, negative_prompt="blurry", width=32, height=64, num_frames=5, steps=6, guidance=4.0, seed=3
    )
    videos = [runtime.generate(model, request) for model in (ours, theirs)]
    assert torch.equal(videos[0].latents, videos[1].latents)
    assert np.array_equal(videos[0].frames, videos[1].frames)
    assert videos[0].receipt.request["shift"] == 5.0


@pytest.mark.parametrize("name", PICTURES)
def test_whole_request_of_pictures_is_the_same(written: dict, name: str) -> None:
    _, diffusers, original = written[name]
    ours, theirs = runtime.load(original), runtime.load(diffusers)
    for key in ("conditioning", "latent_channels", "stride", "text_length", "schedule"):
        assert getattr(ours.spec, key) == getattr(theirs.spec, key), key
    assert ours.spec.boundary == (0.9 if name == "i2v-two-experts" else None)
    assert ours.checkpoint.image_size == theirs.checkpoint.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    request = runtime.Request(
        prompt=PROMPT, width=48, height=32, num_frames=5, steps=4, guidance=4.0, shift=5.0, seed=3,
        clips=(runtime.Clip(pictures[0]), runtime.Clip(pictures[1], at="end")),
    )  # fmt: skip
    videos = [runtime.generate(model, request) for model in (ours, theirs)]
    if name == "i2v-two-experts":  # the tiny pipeline's experts take turns elsewhere
        theirs = replace(theirs, checkpoint=replace(theirs.checkpoint, spec=replace(theirs.spec, boundary=0.9)))
        videos[1] = runtime.generate(theirs, request)
    difference = relative(videos[0].latents, videos[1].latents)
    assert difference <= (1e-5 if name in ("i2v", "flf2v") else 0.0)  # q, k and v are one product there


def test_a_lost_image_encoder_is_named(written: dict, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["i2v"][2], tmp_path / "model"))
    (folder / CLIP).unlink()
    checkpoint = open_checkpoint(folder)
    assert str(folder / CLIP) in checkpoint.missing
    with torch.device("meta"):  # described by the published numbers
        assert checkpoint.transformers[0].build().config.image_dim == 1280
    with pytest.raises((ValueError, FileNotFoundError), match="models_clip"):
        runtime.load(folder)


# The published numbers, from the config alone.

PUBLISHED = {  # dim, heads, blocks, ffn, channels, type, experts -> shift, stride
    "wan2.1-t2v-1.3b": (1536, 12, 30, 8960, 16, "t2v", 1, 5.0, (4, 8, 8)),
    "wan2.1-t2v-14b": (5120, 40, 40, 13824, 16, "t2v", 1, 5.0, (4, 8, 8)),
    "wan2.2-t2v-a14b": (5120, 40, 40, 13824, 16, "t2v", 2, 12.0, (4, 8, 8)),
    "wan2.2-ti2v-5b": (3072, 24, 30, 14336, 48, "ti2v", 1, 5.0, (4, 16, 16)),
}
VAE_NUMBERS = {16: (194, 126_892_531), 48: (196, 704_688_668)}  # tensors and parameters in the published files


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(tmp_path: Path, name: str) -> None:
    """Described from config.json and the VAE's shapes; the weights and the text encoder are not read."""
    dim, heads, blocks, ffn, channels, kind, experts, shift, stride = PUBLISHED[name]
    config = {
        "_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": dim, "eps": 1e-06, "ffn_dim": ffn,
        "freq_dim": 256, "in_dim": channels, "model_type": kind, "num_heads": heads, "num_layers": blocks,
        "out_dim": channels, "text_len": 512,
    }  # fmt: skip
    for place in EXPERTS if experts == 2 else ("",):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "config.json").write_text(json.dumps(config))
        (tmp_path / place / "diffusion_pytorch_model.safetensors").write_bytes(b"not read")
    widths = (160, 256) if channels == 48 else (96, 96)
    write_vae_stub(tmp_path, channels, *widths)
    (tmp_path / T5).write_bytes(b"not read")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    checkpoint = open_checkpoint(tmp_path)
    spec = checkpoint.spec
    assert checkpoint.missing == ()
    assert spec.name == name
    assert (spec.defaults.shift, spec.stride, spec.text_length) == (shift, stride, 512)
    assert spec.boundary == (0.875 if experts == 2 else None)
    assert [part.name for part in checkpoint.transformers] == (list(EXPERTS) if experts == 2 else ["transformer"])
    with torch.device("meta"):
        built = [part.build() for part in (*checkpoint.transformers, checkpoint.vae)]
    assert built[0].config.attention_head_dim == 128
    assert built[0].config.text_dim == 4096
    assert len(checkpoint.transformers[0].keys(built[0])) == 15 + 27 * blocks
    vae = built[-1]
    assert (vae.config.base_dim, vae.config.decoder_base_dim) == widths
    assert (len(checkpoint.vae.keys(vae)), sum(p.numel() for p in vae.parameters())) == VAE_NUMBERS[channels]
    with pytest.raises(ValueError, match=T5):
        checkpoint.text_encoder.build()


def write_vae_stub(folder: Path, channels: int, width: int, decoder_width: int) -> None:
    """Write those tensors of a VAE whose shapes its config is read off, without their bytes."""
    file = "Wan2.2_VAE.pth" if channels == 48 else "Wan2.1_VAE.pth"
    torch.save(
        {
            "encoder.conv1.weight": torch.zeros(1).expand(width, 12 if channels == 48 else 3, 3, 3, 3),
            "decoder.head.0.gamma": torch.zeros(1).expand(decoder_width, 1, 1, 1),
            "conv2.weight": torch.zeros(1).expand(channels, channels, 1, 1, 1),
        },
        folder / file,
    )


def test_pth_files_are_memory_mapped_and_read_when_needed(written: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def spied(file: Path, *args: object, **options: object) -> object:
        assert options["mmap"] is True
        assert options["weights_only"] is True
        read.append(Path(file).name)
        return load(file, *args, **options)

    load = torch.load
    monkeypatch.setattr(torch, "load", spied)
    folder = written["wan2.1"][2]
    open_checkpoint(folder)
    model = runtime.load(folder)
    assert set(read) == {"Wan2.1_VAE.pth"}
    read.clear()
    assert model.text_encoder is not None
    assert set(read) == {T5}


# What is wrong with a folder is named.


@pytest.fixture
def folder(written: dict, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of one case's original layout, to be damaged; "wan2.1" where a test asks for no other."""
    return Path(shutil.copytree(written[getattr(request, "param", "wan2.1")][2], tmp_path / "model"))


LOST = [
    ("wan2.1", "Wan2.1_VAE.pth"),
    ("wan2.1", T5),
    ("wan2.1", "google/umt5-xxl"),
    ("wan2.1", "config.json"),
    ("wan2.1", "diffusion_pytorch_model.safetensors"),
    ("sharded", "diffusion_pytorch_model-00002-of-00003.safetensors"),
    ("wan2.2-vae", "Wan2.2_VAE.pth"),
    ("two-experts", "Wan2.1_VAE.pth"),
    ("two-experts", "high_noise_model/config.json"),
    ("two-experts", "low_noise_model/config.json"),
    ("two-experts", "low_noise_model/diffusion_pytorch_model-00001-of-00002.safetensors"),
]


@pytest.mark.parametrize(("folder", "lost"), LOST, indirect=["folder"])
def test_missing_file_is_named(folder: Path, lost: str) -> None:
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if path.name != "config.json":
        assert open_checkpoint(folder).missing == (str(path),)
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        runtime.load(folder)


@pytest.mark.parametrize("folder", ["two-experts"], indirect=True)
@pytest.mark.parametrize("lost", EXPERTS)
def test_missing_expert_is_named(folder: Path, lost: str) -> None:
    shutil.rmtree(folder / lost)
    with pytest.raises(FileNotFoundError, match=lost):
        runtime.load(folder)


def test_all_missing_files_are_named_at_once(folder: Path) -> None:
    lost = ["diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", T5]
    for name in lost:
        (folder / name).unlink()
    assert open_checkpoint(folder).missing == tuple(str(folder / name) for name in lost)
    with pytest.raises(FileNotFoundError) as caught:
        runtime.load(folder)
    assert all(name in str(caught.value) for name in lost)


class Code:
    """Unpickling this would write a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


def refuses(folder: Path, file: str) -> str:
    """Return what is said of a bad .pth: the VAE's when the model is described, the text encoder's when it is used."""
    if file == T5:
        model = runtime.load(folder)
        with pytest.raises(ValueError, match=re.escape(str(folder / file))) as caught:
            assert model.text_encoder
    else:
        with pytest.raises(ValueError, match=re.escape(str(folder / file))) as caught:
            open_checkpoint(folder)
        with pytest.raises(ValueError, match=re.escape(str(folder / file))):
            runtime.load(folder)
    return str(caught.value)


@pytest.mark.fault(4)
@pytest.mark.parametrize("file", ["Wan2.1_VAE.pth", T5])
@pytest.mark.parametrize("zipped", [True, False])
def test_pth_with_code_is_refused_and_does_not_run(folder: Path, tmp_path: Path, file: str, zipped: bool) -> None:
    state = torch.load(folder / file, weights_only=True)
    trace = tmp_path / "ran"
    torch.save({**state, "conv9.weight": Code(trace)}, folder / file, _use_new_zipfile_serialization=zipped)
    assert "carries code" in refuses(folder, file)
    assert not trace.exists()


@pytest.mark.fault(1)
@pytest.mark.parametrize("file", ["Wan2.1_VAE.pth", T5])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_pth(folder: Path, file: str, keep: float) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(keep * len(whole))])
    assert "fetch it again" in refuses(folder, file)


def test_damaged_pth_is_read_or_refused(folder: Path) -> None:
    """A changed byte in the pickled part: no other error than ValueError comes out, whatever the unpickler raises."""
    file = folder / "Wan2.1_VAE.pth"
    whole, generator, refusals = file.read_bytes(), random.Random(0), []
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(2000)] = generator.randrange(256)
        file.write_bytes(damaged)
        try:
            open_checkpoint(folder)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(str(file) in said for said in refusals)


@pytest.mark.parametrize("file", ["Wan2.1_VAE.pth", T5])
@pytest.mark.parametrize(
    "content", [[1, 2], {"state_dict": {}}, {"a": torch.zeros(2)}, {}, torch.zeros(3)], ids=lambda c: type(c).__name__
)
def test_pth_with_other_content(folder: Path, file: str, content: object) -> None:
    torch.save(content, folder / file)
    refuses(folder, file)


@pytest.mark.fault(2)
@pytest.mark.parametrize("file", ["Wan2.1_VAE.pth", T5])
def test_tensors_that_do_not_fit_are_named(folder: Path, file: str) -> None:
    state = torch.load(folder / file, weights_only=True)
    shape = {"Wan2.1_VAE.pth": "encoder.middle.1.proj.bias", T5: "blocks.1.norm2.weight"}[file]
    gone = {"Wan2.1_VAE.pth": "decoder.upsamples.3.time_conv.weight", T5: "blocks.1.ffn.gate.0.weight"}[file]
    state[shape], state["extra.weight"] = torch.zeros(3), torch.zeros(2)
    del state[gone]
    torch.save(state, folder / file)
    with pytest.raises(ValueError, match=r"unexpected extra\.weight") as caught:
        assert runtime.load(folder).text_encoder
    assert f"missing {gone}" in str(caught.value)
    assert f"{shape} has shape [3]" in str(caught.value)


def test_vae_of_another_model_is_refused(folder: Path) -> None:
    write_vae_stub(folder, 48, 160, 256)
    (folder / "Wan2.2_VAE.pth").replace(folder / "Wan2.1_VAE.pth")
    assert "48 latent channels" in refuses(folder, "Wan2.1_VAE.pth")


NEEDED = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim")


@pytest.mark.parametrize("key", NEEDED)
def test_config_without_a_needed_key(folder: Path, key: str) -> None:
    config = config_of(CASES["wan2.1"].tiny)
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json lacks {key};"):
        runtime.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("model_type", kind) for kind in ("s2v", "animate")],
        *[(key, value) for key in ("dim", "num_heads", "num_layers") for value in (0, -2, "24", 2.5, None, True)],
        ("num_heads", 5), ("in_dim", 36), ("qk_norm", False), ("window_size", [4, 4]), ("vace_layers", [0, 1]),
    ],
)  # fmt: skip
def test_config_value_that_is_not_supported_is_named(folder: Path, key: str, value: object) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(CASES["wan2.1"].tiny, **{key: value})))
    with pytest.raises(ValueError, match=key):
        open_checkpoint(folder)


def test_config_with_all_keys_of_the_published_code(folder: Path) -> None:
    extra = {"patch_size": [1, 2, 2], "qk_norm": True, "window_size": [-1, -1], "_name_or_path": "x"}
    (folder / "config.json").write_text(json.dumps(config_of(CASES["wan2.1"].tiny, **extra)))
    assert runtime.load(folder).spec.patch == (1, 2, 2)


def test_config_with_the_published_keys_alone_means_the_published_text(folder: Path) -> None:
    config = config_of(CASES["wan2.1"].tiny)
    for key in ("text_dim", "cross_attn_norm", "model_type", "text_len"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.text_length == 512
    with torch.device("meta"):
        assert checkpoint.transformers[0].build().config.text_dim == 4096
