"""Tiles give the same numbers as the whole frame: both autoencoders, both ways, any size, any tile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from runtime.models.tiles import spans, tiles
from runtime.models.wan.vae import WanVAE, diffusers_keys
from runtime.models.wan.vae_config import VAEConfig
from tests.published import Tiny, relative, vae, write

BOTH = {"2.1": Tiny(), "2.1 deep": Tiny(res_blocks=2), "2.2": Tiny(residual=True, channels=8)}


def build(tiny: Tiny) -> WanVAE:
    """A random autoencoder, prepared as after loading."""
    published = vae(tiny, 5)
    ours = WanVAE(VAEConfig.from_dict(dict(published.config)))
    tensors = published.state_dict()
    ours.load_state_dict({name: tensors[key] for key, name in diffusers_keys(ours.config, ours).items()})
    ours.requires_grad_(False).prepare()
    return ours


# Other tile sizes, other orders of float32 sums; random weights amplify that more than trained ones (last test).
ROUNDING = 3e-5
NETWORKS = {name: build(tiny) for name, tiny in BOTH.items()}


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from(sorted(BOTH)), height=st.integers(1, 30), width=st.integers(1, 30), frames=st.integers(1, 3),
    extra=st.tuples(st.integers(4, 12), st.integers(4, 12)), seed=st.integers(0, 99),
)  # fmt: skip
def test_decoding_in_tiles(name: str, height: int, width: int, frames: int, extra: tuple[int, int], seed: int) -> None:
    network = NETWORKS[name]
    scale, halo = network.stride[1], network.decoder.reach()
    shape = (1, network.config.z_dim, frames, height, width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tile = tuple((2 * halo + more) * scale for more in extra)
    whole = torch.cat(list(network.decode_stream(latents)), dim=2)
    cut = torch.cat(list(network.decode_stream(latents, tile)), dim=2)
    assert relative(cut, whole) <= ROUNDING


@settings(deadline=None, max_examples=15)
@given(
    name=st.sampled_from(sorted(BOTH)), height=st.integers(1, 32), width=st.integers(1, 32), chunks=st.integers(0, 1),
    extra=st.tuples(st.integers(4, 12), st.integers(4, 12)), seed=st.integers(0, 99),
)  # fmt: skip
def test_encoding_in_tiles(name: str, height: int, width: int, chunks: int, extra: tuple[int, int], seed: int) -> None:
    network = NETWORKS[name]
    time, scale, _ = network.stride
    halo = network.encoder.reach()
    shape = (1, 3, 1 + chunks * time, height * scale, width * scale)
    frames = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    tile = tuple((2 * halo + more) * scale for more in extra)
    assert relative(network.encode(frames, tile), network.encode(frames)) <= ROUNDING


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_the_halo_is_as_small_as_the_layers_allow(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two cells less, the tiles differ: the halo is not simply large."""
    network = NETWORKS[name]
    halo = getattr(network, part).reach()
    scale = network.stride[1]
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(getattr(network, part), "reach", lambda: halo - 2)
    tile = ((2 * halo + 1) * scale,) * 2
    if part == "decoder":
        latents = torch.randn(1, network.config.z_dim, 1, 6, 3 * halo, generator=generator)
        (whole,), (cut,) = network.decode_stream(latents), network.decode_stream(latents, tile)
    else:
        frames = torch.rand(1, 3, 1, 2 * scale, 3 * halo * scale, generator=generator) * 2 - 1
        whole, cut = network.encode(frames), network.encode(frames, tile)
    assert not torch.equal(whole, cut)


def test_published_halo() -> None:
    """Wan 2.1: 12 cells of the published decoder's first level up, 43 pixels of its encoder before the last one."""
    with torch.device("meta"):
        network = WanVAE(VAEConfig())
    assert network.decoder.reach() == 6
    assert network.encoder.reach() == 6


@pytest.mark.parametrize("name", BOTH)
def test_decoding_begins_where_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames are those of the whole clip, since all that they depend on is decoded, and no more."""
    network = NETWORKS[name]
    memory = network.decoder.memory()
    latents = torch.randn(1, network.config.z_dim, memory + 5, 2, 3, generator=torch.Generator().manual_seed(2))
    whole = list(network.decode_stream(latents))
    for start in (0, 1, memory, memory + 1, memory + 4):
        assert (
            relative(*(torch.cat(x, dim=2) for x in (list(network.decode_stream(latents, None, start)), whole[start:])))
            <= ROUNDING
        )
    monkeypatch.setattr(network.decoder, "memory", lambda: memory - 1)
    assert not torch.equal(next(network.decode_stream(latents, None, memory + 4)), whole[-1])


@pytest.mark.parametrize("name", BOTH)
def test_a_tile_takes_several_frames_in_its_turn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]
    halo, scale = network.decoder.reach(), network.stride[1]
    latents = torch.randn(1, network.config.z_dim, 5, 3 * halo, 3, generator=torch.Generator().manual_seed(3))
    tile = ((2 * halo + 2) * scale,) * 2
    alone = list(network.decode_stream(latents, tile))
    frames = torch.cat(alone, dim=2)
    again = network.encode(frames, tile)
    monkeypatch.setattr(network, "_at_once", lambda cuts: 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, network.decode_stream(latents, tile), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], network.decode_stream(latents, tile, 1), strict=True))
    assert torch.equal(again, network.encode(frames, tile))


@pytest.mark.parametrize("cut", [False, True])
def test_the_last_frame_leaves_nothing_to_be_remembered(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture, whose first frame is its last, remembers nothing at all: the more tiles, the less memory."""
    network, histories = NETWORKS["2.1"], []
    empty = network.decoder.empty_history

    def watched() -> list:
        histories.append(empty())
        return histories[-1]

    monkeypatch.setattr(network.decoder, "empty_history", watched)
    scale, halo = network.stride[1], network.decoder.reach()
    tile = ((2 * halo + 4) * scale,) * 2 if cut else None
    stream = network.decode_stream(torch.randn(1, network.config.z_dim, 2, 2 * halo + 8, 9), tile)
    next(stream)
    assert all(any(ring.frames is not None for ring in history) for history in histories)
    next(stream)
    assert len(histories) > 2 or not cut
    assert all(ring.frames is None for history in histories for ring in history)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BOTH)
def test_histories_wait_in_the_hosts_memory(name: str) -> None:
    network = build(BOTH[name]).cuda()
    halo, scale = network.decoder.reach(), network.stride[1]
    latents = torch.randn(1, network.config.z_dim, 11, 3 * halo, 3, generator=torch.Generator().manual_seed(3))
    whole = torch.cat(list(network.decode_stream(latents)), dim=2).cpu()
    cut = torch.cat(list(network.decode_stream(latents, ((2 * halo + 2) * scale,) * 2)), dim=2)
    assert relative(cut, whole) <= 1e-3  # TF32 or not, whole and cut pick their own convolutions


@settings(deadline=None)
@given(length=st.integers(1, 300), halo=st.integers(0, 20), extra=st.integers(1, 100))
def test_spans_cover_once_and_fit(length: int, halo: int, extra: int) -> None:
    cut = spans(length, 2 * halo + extra, halo)
    assert [cell for span in cut for cell in range(span.start, span.stop)] == list(range(length))
    for span in cut:
        assert span.high - span.low <= 2 * halo + extra
        assert span.low == max(span.start - halo, 0)
        assert span.high == min(span.stop + halo, length)


def test_one_tile_without_a_size() -> None:
    (tile,) = tiles((7, 9), None, 13)
    assert (tile.rows.low, tile.rows.high, tile.columns.low, tile.columns.high) == (0, 7, 0, 9)


def test_public_functions_take_a_tile(tmp_path: Path) -> None:
    write(Tiny(), tmp_path)
    model = runtime.load(tmp_path)
    latents = torch.randn(4, 2, 20, 40, generator=torch.Generator().manual_seed(0))
    whole, cut = runtime.decode(model, latents).frames, runtime.decode(model, latents, tile=(160, 200)).frames
    assert np.abs(whole.astype(int) - cut.astype(int)).max() <= 1
    again = runtime.encode(model, whole)
    assert relative(runtime.encode(model, whole, tile=(160, 240)), again) <= 1e-5
    with pytest.raises(ValueError, match="tile is 64x64 pixels .* legal: at least"):
        runtime.decode(model, latents, tile=(64, 64))
    with pytest.raises(ValueError, match="tile is"):
        runtime.encode(model, whole, tile=(64, 640))


def test_the_demo_weights_in_tiles() -> None:
    """On trained weights: at most 1e-5 of the largest value, decoding and encoding."""
    network = runtime.load("demo").vae
    latents = torch.randn(1, 32, 2, 20, 40, generator=torch.Generator().manual_seed(1))
    whole, cut = (torch.cat(list(network.decode_stream(latents, tile)), dim=2) for tile in (None, (160, 200)))
    assert relative(cut, whole) <= 1e-5
    assert relative(network.encode(whole, (160, 240)), network.encode(whole)) <= 1e-5
