"""Wan's VAE against diffusers' implementation of it, and against itself in chunks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from runtime.models.wan.vae import WanVAE, diffusers_keys
from runtime.models.wan.vae_blocks import History, Ring
from runtime.models.wan.vae_config import VAEConfig
from runtime.models.wan.vae_networks import Decoder

TOLERANCE = 1e-4  # of the largest number; what a different order of float32 sums may change

WAN21 = {"base_dim": 8, "num_res_blocks": 1}
WAN22 = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "num_res_blocks": 1,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
WAN22_PUBLISHED = WAN22 | {"base_dim": 160, "decoder_base_dim": 256, "num_res_blocks": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "2.1": WAN21,
    "2.1-two-blocks": WAN21 | {"base_dim": 6, "num_res_blocks": 2},
    "2.1-wide-early-time": WAN21 | {"base_dim": 20, "temperal_downsample": [True, True, False]},
    "2.1-split-time": WAN21 | {"temperal_downsample": [True, False, True], "dim_mult": [1, 1, 2, 3], "base_dim": 10},
    "2.1-other-decoder": WAN21 | {"decoder_base_dim": 14},
    "2.2": WAN22,
    "2.2-two-blocks": WAN22 | {"base_dim": 4, "decoder_base_dim": 6, "num_res_blocks": 2},
    "2.2-early-time": WAN22 | {"temperal_downsample": [True, True, False], "z_dim": 5},
    "2.2-split-time": WAN22 | {"temperal_downsample": [True, False, True], "decoder_base_dim": None},
}


def reference(name: str, seed: int = 0) -> AutoencoderKLWan:
    """A seeded reference model whose gains and biases are random too."""
    given = dict(CONFIGS[name])
    torch.manual_seed(seed)
    if "z_dim" in given:
        given |= {"latents_mean": [0.1] * given["z_dim"], "latents_std": [1.5] * given["z_dim"]}
    model = AutoencoderKLWan(**given).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
        elif key.endswith("bias"):
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def ours(model: AutoencoderKLWan, prepare: bool = True) -> WanVAE:
    """The same weights in our structure, loaded strictly onto a module built without memory."""
    config = VAEConfig.from_dict(dict(model.config))
    with torch.device("meta"):
        vae = WanVAE(config)
    keys, weights = diffusers_keys(config, vae), model.state_dict()
    assert keys.keys() == weights.keys()
    vae.load_state_dict({keys[name]: tensor.clone() for name, tensor in weights.items()}, strict=True, assign=True)
    if prepare:
        vae.prepare()
    return vae


def statistics(model: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = torch.tensor([model.config.latents_mean, model.config.latents_std]).view(2, -1, 1, 1, 1)
    return mean, std


def decode(vae: WanVAE, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(vae.decode_stream(latents)), dim=2)


def assert_near(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert given.shape == expected.shape
    assert given.dtype == torch.float32
    assert (given - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_and_encoding_match_diffusers(name: str) -> None:
    model = reference(name)
    vae = ours(model)
    mean, std = statistics(model)
    for frames, (height, width), batch in ((1, (2, 3), 1), (5, (3, 2), 2), (17, (2, 4), 1)):
        latents = torch.randn(batch, model.config.z_dim, 1 + (frames - 1) // 4, height, width)
        pixels = model.decode(latents * std + mean).sample
        assert_near(decode(vae, latents), pixels)
        clip = 2 * torch.rand(batch, 3, frames, height * vae.stride[1], width * vae.stride[2]) - 1
        assert pixels.shape == clip.shape
        assert_near(vae.encode(clip), (model.encode(clip).latent_dist.mode() - mean) / std)


@pytest.mark.parametrize("name", ["2.1-two-blocks", "2.2"])
def test_preparing_changes_only_the_order_of_sums(name: str) -> None:
    model = reference(name)
    plain, prepared = ours(model, prepare=False), ours(model)
    prepared.prepare()  # once more is harmless
    latents = torch.randn(1, 16, 3, 2, 3)
    assert_near(decode(prepared, latents), decode(plain, latents))
    clip = decode(plain, latents)
    assert_near(prepared.encode(clip), plain.encode(clip))


@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_bfloat16_is_near_float32(name: str) -> None:
    model = reference(name)
    exact, half = ours(model), ours(model.bfloat16())
    latents = torch.randn(1, 16, 3, 3, 2)
    expected = decode(exact, latents)
    given = decode(half, latents)
    assert given.dtype == torch.float32
    assert (given - expected).square().mean().sqrt() <= 0.03 * expected.square().mean().sqrt()


@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_decoding_streams(name: str) -> None:
    vae = ours(reference(name))
    latents = torch.randn(1, 16, 4, 3, 2)
    chunks = list(vae.decode_stream(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4]
    assert all(chunk.abs().max() <= 1 for chunk in chunks)
    whole = torch.cat(chunks, dim=2)
    assert torch.equal(decode(vae, latents[:, :, :2]), whole[:, :, :5]), "frames do not depend on later ones"
    assert torch.equal(decode(vae, latents), whole), "a decode leaves nothing behind"
    one, other = vae.decode_stream(latents), vae.decode_stream(latents.flip(2))
    both = [(a, b) for a, b in zip(one, other, strict=True)]
    assert torch.equal(torch.cat([a for a, _ in both], dim=2), whole), "two streams do not disturb each other"


@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_encoding_streams(name: str) -> None:
    vae = ours(reference(name))
    clip = 2 * torch.rand(1, 3, 9, 32, 48) - 1
    whole = vae.encode(clip)
    assert torch.equal(vae.encode(clip[:, :, :5]), whole[:, :, :2]), "latents do not depend on later frames"
    assert torch.equal(vae.encode(clip), whole), "an encode leaves nothing behind"

    buffer = torch.empty(1, 4, 32, 48, 3)  # one buffer for all chunks, as a reader may have

    def chunks():
        for start, stop in ((0, 1), (1, 5), (5, 9)):
            view = buffer[:, : stop - start].permute(0, 4, 1, 2, 3)
            yield view.copy_(clip[:, :, start:stop])
            buffer.fill_(float("nan"))

    assert torch.equal(torch.cat(list(vae.encode_stream(chunks())), dim=2), whole)


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 4), chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_ring_holds_the_newest_frames_in_place(size: int, chunks: list[int]) -> None:
    ring, clip = Ring(size), torch.arange(sum(chunks) * 6.0).view(1, 1, -1, 3, 2)
    assert ring.newest() is None
    places = set()
    for start, count in zip(itertools.accumulate(chunks, initial=0), chunks, strict=False):
        ring.remember(clip[:, :, start : start + count])
        newest = ring.newest()
        assert torch.equal(newest, clip[:, :, : start + count][:, :, -size:])
        places.add(ring.frames.data_ptr())
    assert len(places) == 1


class Chunk(torch.nn.Module):
    """A later chunk through the decoder, its rings given as tensors, as an engine would hold them."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, z: torch.Tensor, rings: list[torch.Tensor]) -> torch.Tensor:
        history = self.decoder.empty_history()
        for ring, frames in zip(history, rings, strict=True):
            ring.frames, ring.filled = frames, ring.size
        return decoded(self.decoder, z, history, False)


def decoded(decoder: Decoder, z: torch.Tensor, history: History, first: bool) -> torch.Tensor:
    return decoder.branch(decoder.trunk(z, history, first), history, first)


@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_a_chunk_exports_with_its_rings(name: str) -> None:
    vae = ours(reference(name))
    z = torch.randn(1, vae.config.z_dim, 1, 3, 2).contiguous(memory_format=torch.channels_last_3d)
    history = vae.decoder.empty_history()
    with torch.no_grad():
        for first in (True, False, False):
            decoded(vae.decoder, z.clone(), history, first)
        rings = [ring.frames for ring in history if ring.frames is not None]
        copies = [frames.clone() for frames in rings]
        program = torch.export.export(Chunk(vae), (z.clone(), [frames.clone() for frames in rings]))
        given = program.module()(z.clone(), copies)
        assert_near(given, decoded(vae.decoder, z.clone(), history, False))
    for exported, eager in zip(copies, rings, strict=True):
        assert_near(exported, eager)


def test_results_carry_no_graph_and_may_be_changed() -> None:
    vae = ours(reference("2.1"))
    latents = torch.randn(1, 16, 2, 2, 2, requires_grad=True)
    for chunk in vae.decode_stream(latents):
        assert not chunk.requires_grad
        chunk.mul_(2)
    assert torch.is_grad_enabled()
    assert not vae.encode(torch.zeros(1, 3, 1, 16, 16)).requires_grad


def test_published_names_and_shapes() -> None:
    for name, config in (("2.1", {}), ("2.2", WAN22_PUBLISHED | {"z_dim": 48})):
        config = config | ({"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48} if name == "2.2" else {})
        with torch.device("meta"):
            model = AutoencoderKLWan(**config)
            vae = WanVAE(VAEConfig.from_dict(dict(model.config)))
        shapes = {key: tensor.shape for key, tensor in vae.state_dict().items()}
        keys = diffusers_keys(vae.config)
        assert {key: shapes[keys[key]] for key in keys} == {k: t.shape for k, t in model.state_dict().items()}
        assert sorted(keys.values()) == sorted(shapes)


def test_strides() -> None:
    assert VAEConfig().stride == (4, 8, 8)
    assert VAEConfig.from_dict(WAN22).stride == (4, 16, 16)
    assert VAEConfig(temperal_downsample=(False, False, True), scale_factor_temporal=2).stride == (2, 8, 8)
    with torch.device("meta"):
        assert WanVAE(VAEConfig()).stride == (4, 8, 8)


def test_the_demo_checkpoint_is_understood() -> None:
    path = Path(runtime.__file__).parent / "demo" / "vae" / "config.json"
    config = VAEConfig.from_dict(json.loads(path.read_text()))
    assert config.stride == (4, 8, 8)
    assert isinstance(config.latents_mean, tuple)


def test_defaults_are_the_published_ones() -> None:
    with torch.device("meta"):
        published = dict(AutoencoderKLWan().config)
    assert VAEConfig.from_dict(published) == VAEConfig()
    assert VAEConfig.from_dict({"clip_output": False, "_name_or_path": "x"}) == VAEConfig()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_dims": 96}, "base_dims"),
        ({"attn_scales": [0.5]}, r"attn_scales \[0.5\]; supported is none"),
        ({"z_dim": 8}, "latents_mean: 16; expected 8"),
        ({"latents_std": [1.0]}, "latents_std: 1; expected 16"),
        ({"temperal_downsample": [True]}, "temperal_downsample: 1; expected 3"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal: 8; expected 4"),
        ({"scale_factor_spatial": 8, "patch_size": 2, "in_channels": 12}, "scale_factor_spatial: 8; expected 16"),
        ({"patch_size": 2, "scale_factor_spatial": 16}, "in_channels: 3; expected a multiple of 4"),
    ],
)
def test_configs_that_contradict_themselves(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(given)


def test_frames_that_do_not_fit() -> None:
    vae = ours(reference("2.1"))
    for count, nearest in ((0, "1"), (2, "1 or 5"), (8, "5 or 9"), (20, "17 or 21")):
        with pytest.raises(ValueError, match=rf"{count} frames; expected .* nearest {nearest}$"):
            vae.encode(torch.zeros(1, 3, count, 16, 16))
    with pytest.raises(ValueError, match=r"height 20; expected a multiple of 8: nearest 16 or 24"):
        vae.encode(torch.zeros(1, 3, 1, 20, 16))
    with pytest.raises(ValueError, match=r"width 4; expected a multiple of 8: nearest 8"):
        vae.encode(torch.zeros(1, 3, 1, 16, 4))
    with pytest.raises(ValueError, match=r"frames have shape \[3, 1, 16, 16\]; expected \[B, 3, F, height, width\]"):
        vae.encode(torch.zeros(3, 1, 16, 16))
    with pytest.raises(ValueError, match=r"chunk 1 holds 2 frames; expected 4"):
        list(vae.encode_stream(torch.zeros(1, 3, 3, 16, 16).split([1, 2], dim=2)))
    with pytest.raises(ValueError, match=r"latents have shape \[1, 8, 2, 4, 4\]; expected \[B, 16, T, H, W\]"):
        vae.decode_stream(torch.zeros(1, 8, 2, 4, 4))
