"""The formulas of FLOPs and parameters, against torch's FlopCounterMode over diffusers, transformers and ourselves.

FlopCounterMode counts two per multiplication of matrix products, attention and convolutions, as the formulas do; but
attention only where its kernel is registered or decomposed, so most of this runs on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from runtime.models import open_checkpoint, published
from runtime.models.costs import Shape, Weights
from runtime.models.wan.costs import WanCosts
from runtime.models.wan.published import NETWORKS, UMT5_XXL, vae_config
from runtime.models.wan.transformer import TransformerConfig, WanTransformer
from runtime.models.wan.vae import WanVAE
from runtime.models.wan.vae_config import VAEConfig
from runtime.weights import shapes
from tests import published as tiny

TEXT = {**UMT5_XXL, "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
SMALL_VAE = {"base_dim": 8, "z_dim": 4, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
RESIDUAL = {
    **SMALL_VAE, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
    "scale_factor_spatial": 16, "decoder_base_dim": 16,
}  # fmt: skip


def counted(call: Callable[[], object]) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def total(weights: Weights) -> int:
    return weights.outer + weights.outer_float32 + weights.blocks * (weights.block + weights.block_float32)


def numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.mark.parametrize("name", {str(network): name for name, network in NETWORKS.items()}.values())
def test_published_transformers_have_the_flops_and_parameters_that_diffusers_counts(name: str) -> None:
    found = published(name)
    assert found is not None
    spec, costs = found
    given = dict(NETWORKS[name])
    layers = given.get("vace_layers", ())
    if "image_dim" in given:
        given["added_kv_proj_dim"] = given["num_attention_heads"] * 128
    with torch.device("meta"):
        theirs = WanVACETransformer3DModel(**given) if layers else WanTransformer3DModel(**given)
    assert total(costs.transformer) == numbers(theirs)
    latents = (3, 16, 24)
    x, text, time = meta(1, given.get("in_channels", 16), *latents), meta(1, 512, 4096), meta(1, dtype=torch.int64)
    more = {}
    if "image_dim" in given:
        more["encoder_hidden_states_image"] = meta(2 if "pos_embed_seq_len" in given else 1, 257, 1280)
    if layers:
        more = {"control_hidden_states": meta(1, 96, *latents), "control_hidden_states_scale": torch.ones(len(layers))}
    flops = counted(lambda: theirs(x, time, text, **more))
    mine = costs.forward(Shape(latents=latents, text=spec.text_length), published=True)
    assert mine.flops == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"])
def test_published_autoencoders_have_the_flops_that_diffusers_counts(name: str) -> None:
    found = published(name)
    assert found is not None
    spec, costs = found
    config = vae_config(spec.latent_channels)
    keys = ("base_dim", "decoder_base_dim", "z_dim", "is_residual", "in_channels", "out_channels", "patch_size")
    with torch.device("meta"):
        theirs = AutoencoderKLWan(
            **{key: getattr(config, key) for key in keys}, latents_mean=[0.0] * config.z_dim,
            latents_std=[1.0] * config.z_dim, scale_factor_spatial=config.scale_factor_spatial,
        )  # fmt: skip
    latents = (4, 6, 8)
    down, across = spec.stride[1:]
    decode = counted(lambda: theirs.decode(meta(1, config.z_dim, *latents)))
    encode = counted(lambda: theirs.encode(meta(1, 3, 13, 6 * down, 8 * across)))
    assert costs.decode(latents, None, 2, published=True).flops == pytest.approx(decode, rel=0.01)
    assert costs.encode(latents, None, 2, published=True).flops == pytest.approx(encode, rel=0.01)


@pytest.mark.parametrize(("config", "tokens"), [(TEXT, 20), (UMT5_XXL, 512)])
def test_text_encoders_have_the_flops_and_parameters_that_transformers_counts(config: dict, tokens: int) -> None:
    with torch.device("meta"):
        theirs = UMT5EncoderModel(UMT5Config(**config, feed_forward_proj="gated-gelu", is_encoder_decoder=False))
    costs = WanCosts(TransformerConfig(), VAEConfig(), config)
    assert total(costs.text_encoder) == numbers(theirs)
    ids = meta(1, tokens, dtype=torch.int64)
    flops = counted(lambda: theirs(ids))
    assert costs.text(tokens, 2).flops == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("rows", [1, 2])
def test_executed_transformer_flops_are_those_of_our_own_network(rows: int) -> None:
    config = TransformerConfig(num_attention_heads=4, attention_head_dim=16, ffn_dim=96, num_layers=3, text_dim=32)
    with torch.device("meta"):
        ours = WanTransformer(config)
    texts = [meta(11 + 3 * row, 32) for row in range(rows)]
    latents = (3, 8, 12)
    with torch.inference_mode():
        projected = ours.project(texts, 40, latents)
    costs = WanCosts(config, VAEConfig(), TEXT)
    shape = Shape(latents=latents, text=projected.keys[0].shape[1], rows=rows)
    x, sigma = meta(1, 16, *latents), meta(1, dtype=torch.float64)
    assert costs.forward(shape).flops == pytest.approx(counted(lambda: ours(x, sigma, projected)), rel=0.01)
    assert costs.project(shape).flops == pytest.approx(counted(lambda: ours.project(texts, 40, latents)), rel=0.01)


@pytest.mark.parametrize("config", [SMALL_VAE, RESIDUAL], ids=["2.1", "2.2"])
@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_executed_autoencoder_flops_are_those_of_our_own_network(
    config: dict, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where frames before the clip are skipped.

    There attention is not counted, and is taken off; nor are convolutions that add in place, so they do not.
    """
    kernel = import_module("runtime.kernels.causal_conv3d")
    monkeypatch.setattr(kernel, "_adds_in_place", lambda dtype: False)
    numbers = VAEConfig(**config)
    ours = WanVAE(numbers).eval()
    ours.prepare()
    latents = (frames, 4, 6)
    costs = WanCosts(TransformerConfig(), numbers, TEXT)
    down = numbers.stride[1]

    def without_attention(operations: tuple) -> float:
        return sum(each.flops * each.count for each in operations if each.kind != "attention")

    with torch.backends.mkldnn.flags(enabled=False):  # the counter does not know oneDNN's sums in place
        decode = counted(lambda: list(ours.decode_stream(torch.zeros(1, 4, *latents))))
        encode = counted(lambda: ours.encode(torch.zeros(1, 3, 4 * frames - 3, 4 * down, 6 * down)))
    assert without_attention(costs.decode(latents, None, 4).operations) == pytest.approx(decode, rel=0.01)
    assert without_attention(costs.encode(latents, None, 4).operations) == pytest.approx(encode, rel=0.01)


def test_tiles_cost_what_their_halos_repeat() -> None:
    costs = WanCosts(TransformerConfig(), VAEConfig(), TEXT)
    whole, tiled = costs.decode((5, 60, 104), None, 2), costs.decode((5, 60, 104), (512, 512), 2)
    cells = costs._cuts((5, 60, 104), (512, 512), True)
    repeated = sum(h * w for h, w in cells) / (60 * 104)
    assert 1.0 < repeated < 2.0
    assert tiled.flops == pytest.approx(repeated * whole.flops, rel=0.05)
    # The trunk is not repeated: at most a quarter more for a 720p frame in two by two.
    whole, tiled = (costs.decode((21, 90, 160), tile, 2) for tile in (None, costs.tile_of(720, 1280, (2, 2))))
    assert 1.0 < tiled.flops / whole.flops < 1.25
    parked = costs.decode((21, 90, 160), costs.tile_of(720, 1280, (2, 2)), 2, parked=True)
    assert parked.flops == tiled.flops
    assert parked.live < 0.5 * whole.live < tiled.live


@pytest.mark.parametrize("residual", [False, True])
def test_parameters_on_disk_are_those_of_the_formulas(residual: bool, tmp_path: Path) -> None:
    tiny.write(tiny.Tiny(residual=residual, vae_width=8), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    costs = checkpoint.costs()

    def stored(part: str) -> int:
        files = next(each.files for each in checkpoint.components if each.name == part)
        return sum(torch.Size(shape).numel() for file in files for shape, _ in shapes(file).values())

    assert total(costs.transformer) == stored("transformer")
    assert total(costs.text_encoder) == stored("text_encoder")
    # the folded upsampling kernels have 16 taps where 9 are stored
    assert stored("vae") < total(costs.vae) < 1.2 * stored("vae")
