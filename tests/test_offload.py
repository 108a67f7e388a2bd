"""Blocks that come and go: the same numbers as when they stay, in less memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime
from benchmarks.measure import fresh_process
from runtime.__main__ import main
from runtime.offload import SLOTS, Offload, Streamed
from tests.peaks import peak_within
from tests.published import Tiny, write

REQUEST = runtime.Request(prompt="a red ball", negative_prompt="blue", seed=3, steps=4)


@pytest.fixture(scope="module", params=[1, 2], ids=["one expert", "two experts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    write(Tiny(layers=5, experts=request.param, boundary=0.8), place, max_shard_size="40KB")
    return place


@pytest.mark.parametrize("blocks", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("text", ["released", "streamed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_blocks_give_the_same_bytes(folder: Path, blocks: int, text: str, dtype: str) -> None:
    whole = runtime.generate(runtime.load(folder, dtype=dtype), REQUEST)
    model = runtime.load(folder, dtype=dtype, offload=Offload(text, blocks))
    lists = [network.blocks for network in model.transformers]  # type: ignore[attr-defined]
    assert all(isinstance(each, Streamed) for each in lists)
    assert len(lists[0].shelf.slots) == min(blocks + SLOTS, 5)
    for _ in range(2):  # the second request finds the slots as the first left them
        video = runtime.generate(model, dataclasses.replace(REQUEST, prompt="a red ball"))
        assert torch.equal(video.latents, whole.latents)
        assert "text_encoder" not in model.__dict__


def test_a_missing_or_misshapen_block_is_named_before_anything_runs(tmp_path: Path) -> None:
    write(Tiny(layers=2), tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    kept = tensors.pop("blocks.1.ffn.net.2.bias")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"blocks.1.ffn.net.2.bias .* is missing"):
        runtime.load(tmp_path, offload=Offload("released", 0))
    save_file({**tensors, "blocks.1.ffn.net.2.bias": kept[:-1].clone()}, file)
    with pytest.raises(ValueError, match=r"blocks.1.ffn.net.2.bias .* has shape"):
        runtime.load(tmp_path, offload=Offload("released", 0))


def test_a_file_that_goes_away_is_an_error_and_not_a_wrong_video(tmp_path: Path) -> None:
    write(Tiny(layers=4), tmp_path)
    model = runtime.load(tmp_path, offload=Offload("released", 0))
    assert model.fingerprint  # read once, from the whole file
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="fetch the model again"):
        runtime.generate(model, REQUEST)
    file.write_bytes(content)
    assert runtime.generate(model, REQUEST).latents is not None


def test_other_engines_refuse_blocks_that_come_and_go() -> None:
    with pytest.raises(ValueError, match="engine 'eager'"):
        runtime.load("demo", engine="inductor", offload=Offload("resident", 0))


def test_the_receipt_says_it(folder: Path) -> None:
    receipt = json.loads(
        runtime.generate(runtime.load(folder, offload=Offload("streamed", 1)), REQUEST).receipt.to_json()
    )
    assert receipt["offload"] == {"text": "streamed", "blocks": 1}


MEDIUM = Tiny(heads=8, head_dim=64, layers=12, ffn=2048, channels=16, text_dim=16, vae_width=8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs a system that tells peak memory")
def test_a_budget_is_kept_in_a_process_of_its_own(tmp_path: Path) -> None:
    write(MEDIUM, tmp_path)
    runtime.load_within("demo", REQUEST, memory="64GiB")  # so that this machine is calibrated
    whole, _, foreseen = fresh_process(peak_within, str(tmp_path), None)
    assert foreseen is not None
    assert foreseen["weights_bytes"]["transformer"] > 200e6
    assert max(foreseen["peak_bytes"][stage] for stage in ("text", "denoise", "decode")) == pytest.approx(
        whole, rel=0.15
    )
    budget = whole - 100 * 2**20
    kept, loading, foreseen = fresh_process(peak_within, str(tmp_path), f"{budget / 2**20:.0f}MiB")
    assert foreseen is not None
    assert foreseen["choices"]["offload"]["transformer"] == "streamed"
    assert max(kept, loading) <= budget
    assert foreseen["memory"] == pytest.approx(budget, rel=0.01)


def test_the_command_line_keeps_a_budget_or_says_what_would_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", "a ball", "--frames", "5", "--steps", "1", "-o", str(tmp_path / "a.gif")]
    alone = [sys.executable, "-m", "runtime", *asked, "--memory", "4GiB", "--receipt", str(tmp_path / "r.json")]
    ran = subprocess.run(alone, capture_output=True, text=True, check=True)  # since a process's peak is measured
    assert "foreseen seconds: text" in ran.stdout
    receipt = json.loads((tmp_path / "r.json").read_text())
    assert receipt["predicted"]["memory"] == 4 * 2**30
    assert receipt["predicted"]["choices"]["engine"] == receipt["engine"] == "eager"
    for stage in ("text", "denoise", "decode"):
        if stage != "text":  # whose seconds round to nothing
            assert receipt["predicted"]["seconds"][stage] > 0
        assert receipt["stages"][stage]["seconds"] > 0
        assert receipt["predicted"]["peak_bytes"][stage] == pytest.approx(
            receipt["stages"][stage]["peak_bytes"], rel=0.5
        )
    assert main([*asked, "--memory", "64MiB"]) == 2
    assert "160x96 with 5 frames of demo take at least" in capsys.readouterr().err
    assert main([*asked, "--blocks", "2", "--text-encoder", "streamed", "--receipt", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["offload"] == {"text": "streamed", "blocks": 2}
    assert main([*asked, "--blocks", "-1"]) == 2
