"""Layers in 8 bits: the numbers of their definition, ranked by what they cost, taken only where a budget allows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import runtime
from runtime import budget, precision, rungs, sensitivity
from runtime.__main__ import main
from runtime.caches import Savings
from runtime.checkpoints import Checkpoints
from runtime.denoising import Cancelled
from runtime.lora import Lora
from runtime.models.costs import Weights
from runtime.models.layers import AttentionFp8, LinearFp8, feed_forward, in_8_bits
from tests.published import Tiny, relative, write
from tests.test_lora import published as lora_tensors

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "steps": 6, "seed": 3, "prompt": "a red ball"}
PROMPTS = ("a red ball rolls left", "a blue cube spins", "a green ring rises", "a white star falls")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    folder = tmp_path_factory.mktemp("model")
    write(Tiny(), folder)
    return runtime.load(folder, device="cpu")


@pytest.fixture(scope="module")
def measured(model: runtime.Model) -> budget.Calibrated:
    return rungs.calibrate(model, runtime.Request(**SMALL), PROMPTS, fp8=True)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    places = tmp_path / "beside.json", tmp_path / "stored.json"
    monkeypatch.setattr(budget, "files", lambda model: places)
    return places


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this device gained time by 8 bits."""
    monkeypatch.setattr(precision, "gains", lambda device: True)


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of e4m3 under a scale per row: 3 bits behind the leading one, 2^-9 the smallest step."""
    scale = rows.abs().amax(1, keepdim=True) / 448
    values = (rows / scale).double()
    step = 2.0 ** (values.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return ((values / step).round() * step).clamp(-448, 448).float() * scale


@given(rows=st.integers(1, 9), inner=st.integers(1, 40), outer=st.integers(1, 20), gelu=st.booleans())
def test_a_layer_multiplies_the_numbers_of_8_bits(rows: int, inner: int, outer: int, gelu: bool) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + inner * 30 + outer)
    linear = nn.Linear(inner, outer).requires_grad_(False)
    linear.weight.normal_(generator=generator)
    x = torch.randn(2, rows, inner, generator=generator)
    seen = nn.functional.gelu(x, approximate="tanh") if gelu else x
    expected = rounded(seen.flatten(0, 1)) @ rounded(linear.weight).T + linear.bias
    found = LinearFp8(linear)(x, gelu=gelu)
    # A number that lies in the middle of two of e4m3's may go either way, by the last bit of the scale.
    assert (found.flatten(0, 1) - expected).abs().mean() <= 5e-3 * expected.abs().mean() + 1e-6


def test_a_feed_forward_may_have_one_layer_of_each_kind() -> None:
    first, second = nn.Linear(24, 40).requires_grad_(False), nn.Linear(40, 24).requires_grad_(False)
    x, h, gate = torch.randn(1, 6, 24), torch.randn(1, 6, 24), torch.rand(1, 1, 24)
    exact = feed_forward(x, first, second, h, gate) - h
    for one, other in ((LinearFp8(first), second), (first, LinearFp8(second)), (LinearFp8(first), LinearFp8(second))):
        error = (feed_forward(x, one, other, h, gate) - h - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.1


def test_a_narrow_transformer_shares_all_else_and_leaves_the_first_as_it_was(model: runtime.Model) -> None:
    network, request = model.transformers[0], runtime.Request(**SMALL)
    before = runtime.generate(model, request).frames
    names = precision.candidates(network)[:3]
    narrow = cast(nn.Module, precision.to_fp8(network, names, {}))
    kinds = {name: type(module) for name, module in narrow.named_modules() if in_8_bits(module)}
    assert kinds.keys() == set(names) and set(kinds.values()) == {LinearFp8, AttentionFp8}
    own = dict(cast(nn.Module, network).named_parameters())
    shared = {name for name, parameter in narrow.named_parameters() if parameter is own.get(name)}
    assert own.keys() - shared == {f"{name}.weight" for name in names if name in precision.weighty(network)}
    assert np.array_equal(runtime.generate(model, request).frames, before)


def test_the_layer_that_8_bits_hurt_most_comes_last(tmp_path: Path) -> None:
    write(Tiny(), tmp_path)
    tiny = runtime.load(tmp_path, device="cpu")
    linear = cast(nn.Linear, cast(nn.Module, tiny.transformers[0]).get_submodule("blocks.1.ffn_out"))
    linear.weight[:, 0] = 1e5 * linear.weight[:, 0].sign()  # beside these all others are rounded to nothing
    cast(nn.Linear, cast(nn.Module, tiny.transformers[0]).get_submodule("blocks.1.ffn_in")).weight[0] = 0
    request = runtime.Request(prompt="a cat", seed=1, steps=3).resolved(tiny.spec)
    ranking = sensitivity.rank(tiny, [request])
    assert ranking[-1][0] == "transformer.blocks.1.ffn_out"
    assert ranking[-1][1] == min(decibel for _, decibel in ranking)
    assert {name for name, _ in ranking} == set(tiny.fp8_layers)
    numbers = sensitivity.counts(tiny, ranking, 64)
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == len(ranking)


def test_without_such_products_a_calibration_says_what_they_cost_and_chooses_none(
    model: runtime.Model, measured: budget.Calibrated, files: tuple[Path, Path]
) -> None:
    assert all(rung.fp8 == 0 for rung in measured.rungs)
    assert measured.fp8[-1].fp8 == len(measured.ranking) == len(model.fp8_layers)
    assert all(20 < rung.psnr < 100 for rung in measured.fp8)
    assert budget.write(model, measured) == files[0]
    assert budget.read(files[0]) == [measured]
    told = rungs.table(measured)
    assert f"more and more of {len(measured.ranking)} layers in 8 bits, simulated here" in told
    kept = replace(measured, rungs=measured.fp8)  # as if a GPU had found them faster
    budget.write(model, kept)
    video = runtime.generate(model, runtime.Request(**SMALL, quality=1.0))
    assert not any("fp8" in line for line in video.receipt.approximations)
    assert np.array_equal(video.frames, runtime.generate(model, runtime.Request(**SMALL)).frames)


def test_calibrations_of_two_devices_stand_side_by_side(
    model: runtime.Model, measured: budget.Calibrated, files: tuple[Path, Path]
) -> None:
    other = replace(measured, device="NVIDIA H200", created="2999-01-01T00:00:00+00:00")
    for entry in (measured, other, measured):
        budget.write(model, entry)
    assert sorted(entry.device for entry in budget.read(files[0])) == ["NVIDIA H200", "cpu"]
    assert budget.find(model, measured.setting) == (measured, ())
    files[0].unlink()
    budget.write(model, other)
    assert budget.find(model, measured.setting) == (other, ())


def test_rungs_with_bits_are_kept_where_they_gain(measured: budget.Calibrated) -> None:
    narrow = list(measured.fp8)
    quick = rungs.worth_it([*measured.rungs, *narrow], {0: 1.0} | {rung.fp8: 0.7 for rung in narrow})
    assert any(rung.fp8 for rung in quick)
    floors = [rung.floor for rung in quick]
    assert floors == sorted(floors)
    slow = rungs.worth_it([*measured.rungs, *narrow], {0: 1.0} | {rung.fp8: 1.0 for rung in narrow})
    assert slow == measured.rungs


def test_a_budget_takes_bits_where_they_keep_it_and_stays_full_where_not(
    model: runtime.Model, measured: budget.Calibrated, files: Any, able: None
) -> None:
    narrow = replace(measured.fp8[-1], floor=30.0)
    budget.write(model, replace(measured, rungs=(narrow,)))
    video = runtime.generate(model, runtime.Request(**SMALL, quality=30.0))
    count = len(measured.ranking)
    assert video.receipt.approximations == [f"{count} layers in fp8, calibrated to keep 30.0 dB"]
    assert video.receipt.quality is not None
    assert video.receipt.quality["rung"]["fp8"] == count
    assert video.receipt.quality["windows"] == [{"computed": SMALL["steps"], "estimated_psnr": narrow.psnr}]
    exact = runtime.generate(model, runtime.Request(**SMALL))
    assert not np.array_equal(video.frames, exact.frames)
    full = runtime.generate(model, runtime.Request(**SMALL, quality=31.0))
    assert np.array_equal(full.frames, exact.frames)
    assert any("keeps 31 dB" in note and "is made exactly" in note for note in full.receipt.notes)


def test_attention_in_8_bits_is_taken_where_a_step_is_faster(
    model: runtime.Model, able: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a device with such products took so long for a step, attention in full and in 8 bits."""
    request = runtime.Request(**SMALL).resolved(model.spec)
    attention = {name for name in model.fp8_layers if name.endswith(".attention")}
    assert len(attention) == len(model.transformers[0].blocks)
    for times, kept in (((1.0, 0.9), attention), ((1.0, 1.0), set())):
        left = list(times)
        monkeypatch.setattr(sensitivity, "seconds", lambda asked, place, left=left: left.pop(0))
        ranking = dict(sensitivity.rank(model, [request]))
        assert ranking.keys() == {name for name in model.fp8_layers if name in kept or name not in attention}
        assert all(10 < ranking[name] < 80 for name in kept)


def test_weights_in_8_bits_take_attention_so_where_it_gains(
    model: runtime.Model, measured: budget.Calibrated, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = runtime.load(model.checkpoint.folder, device="cpu", precision="fp8")
    budget.write(model, replace(measured, rungs=(), fp8=(replace(measured.fp8[-1], floor=20.0),)))
    videos, layers = [], []
    for gains in (False, True):
        monkeypatch.setattr(precision, "gains", lambda device, gains=gains: gains)
        videos.append(runtime.generate(narrow, runtime.Request(**SMALL, quality=20.0)))
        layers.append(len(narrow.narrow_layers if not gains else narrow.fp8_layers))
        assert f"{layers[-1]} layers in fp8, calibrated to keep 20.0 dB" in videos[-1].receipt.approximations
        assert any("measured on cpu, simulated, and not" in note for note in videos[-1].receipt.notes)
    assert layers[0] < layers[1]
    assert not np.array_equal(videos[0].frames, videos[1].frames)


@pytest.mark.parametrize("at", [1, 4])
def test_a_resumed_run_in_8_bits_equals_an_uninterrupted_one(
    model: runtime.Model, measured: budget.Calibrated, files: Any, able: None, tmp_path: Path, at: int
) -> None:
    both = replace(measured.rungs[0], floor=20.0, fp8=measured.fp8[0].fp8)
    budget.write(model, replace(measured, rungs=(both,)))
    request = runtime.Request(**SMALL, quality=20.0)
    whole = runtime.generate(model, request)
    assert len(whole.receipt.approximations) == 2

    def stop(step: int, *_: object) -> None:
        runtime.generate(model, runtime.Request(**SMALL))  # an exact one in between disturbs nothing
        if step == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        runtime.generate(model, request, on_step=stop, checkpoints=Checkpoints(tmp_path, "key", steps=1))
    again = runtime.generate(model, request, checkpoints=Checkpoints(tmp_path, "key"))
    assert np.array_equal(again.frames, whole.frames)
    assert again.receipt.quality == whole.receipt.quality


def test_two_experts_are_loaded_in_8_bits_behind_their_loras(tmp_path: Path) -> None:
    write(Tiny(experts=2), tmp_path / "model")
    save_file(lora_tensors(), tmp_path / "lora.safetensors")
    loras = [Lora(tmp_path / "lora.safetensors", 0.5)]
    full = runtime.load(tmp_path / "model", device="cpu", loras=loras)
    narrow = runtime.load(tmp_path / "model", device="cpu", loras=loras, precision="fp8")
    assert len(narrow.fp8_layers) == 2 * 2 * 7 and len(narrow.narrow_layers) == 2 * 2 * 6
    assert narrow.fp8_layers == full.fp8_layers
    request = runtime.Request(prompt="a cat", seed=1, quality="fast").resolved(full.spec)
    video = runtime.generate(narrow, request)
    same = rungs.make(full, request, Savings(None, narrow.narrow_layers))
    assert np.array_equal(video.frames, same.frames)
    assert video.receipt.approximations == ["24 linear layers in fp8, as the model was loaded"]
    assert any("its weights in 8 bits" in note for note in video.receipt.notes)

    def held(model: runtime.Model) -> int:
        return sum(each.nbytes for network in model.transformers for each in cast(nn.Module, network).parameters())

    wide = model_bytes(full)
    assert held(full) - held(narrow) == wide * 3 // 4 - 4 * rows_of(full)  # float32 to a byte, and a scale per row
    assert {held(full), held(narrow)} == {2 * each.bytes(4) for each in weights_of(full)}
    with pytest.raises(ValueError, match="its weights in 8 bits, which is not exact; ask for another"):
        runtime.generate(narrow, replace(request, quality="exact"))


def weights_of(model: runtime.Model) -> tuple[Weights, Weights]:
    """What the planner counts for an expert, in full and in 8 bits."""
    return model.costs.transformer, model.costs.transformer.in_fp8()


@pytest.mark.slow
def test_compiled_blocks_in_8_bits_equal_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path / "cache"))
    write(Tiny(layers=1), tmp_path / "model")
    request = runtime.Request(prompt="a cat", seed=1, steps=2, quality="fast")
    eager, compiled = (
        runtime.load(tmp_path / "model", device="cpu", precision="fp8", engine=engine)
        for engine in ("eager", "inductor")
    )
    for model in (eager, compiled):  # attention too
        model.transformers = model.in_fp8(frozenset(model.fp8_layers))
    eager, compiled = (runtime.generate(model, request) for model in (eager, compiled))
    assert relative(compiled.latents, eager.latents) <= 1e-5
    assert compiled.receipt.notes == eager.receipt.notes


def linears(model: runtime.Model) -> list[nn.Linear]:
    """The layers of a model in full that may be in 8 bits."""
    networks = [cast(nn.Module, network) for network in model.transformers]
    return [
        cast(nn.Linear, network.get_submodule(name))
        for network, plain in zip(networks, model.transformers, strict=True)
        for name in precision.weighty(plain)
    ]


def model_bytes(model: runtime.Model) -> int:
    return sum(linear.weight.nbytes for linear in linears(model))


def rows_of(model: runtime.Model) -> int:
    return sum(linear.out_features for linear in linears(model))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"precision": "int4"}, "precision is 'int4'; legal: full, fp8"),
        ({"precision": "fp8", "engine": "tensorrt"}, "run by the engines eager, cuda_graph, inductor"),
        ({"precision": "fp8", "offload": runtime.offload.Offload(blocks=1)}, "keep all blocks"),
    ],
)
def test_what_cannot_be_in_8_bits_is_refused(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        runtime.load("demo", device="cpu", **more)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["generate", "a red ball", "--size", "32x32", "--frames", "5", "--steps", "2", "--device", "cpu"]
    made += ["-o", str(tmp_path / "ball.gif"), "--precision", "fp8", "--quiet"]
    assert main(made) == 2
    assert "ask for another: --quality high" in capsys.readouterr().err
    assert main([*made, "--quality", "fast", "--measure"]) == 2
    assert "no exact twin can be made; legal: --precision full" in capsys.readouterr().err
    assert main([*made, "--quality", "fast"]) == 0
    assert (tmp_path / "ball.gif").stat().st_size > 0
