"""The build verb: engines ahead of time, and the store's list, check and prune; exit codes and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import runtime
from runtime.__main__ import main
from runtime.cli import builds
from runtime.engines import inductor, tensorrt
from runtime.engines.store import MANIFEST, Key, Store
from runtime.lora import Lora
from tests.published import Tiny, write

TINY = Tiny(layers=1, head_dim=16, experts=2, boundary=0.9, seed=90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write(TINY, folder)
    return folder


def fill(count: int) -> list[str]:
    """Put entries of 1 MiB into the store."""
    names = []
    for number in range(count):
        key = Key("tensorrt", {"shapes": "[]", "gpu": f"sm{number}", "dtype": "bfloat16", "libraries": "x 1"})
        Store().fetch(key, lambda folder: (folder / "engine.plan").write_bytes(bytes(2**20)), lambda folder: None)
        names.append(key.name)
    return names


def test_build_for_a_gpu_that_is_not_here(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra [tensorrt-rtx] is not installed")
    pytest.importorskip("onnxscript", reason="the extra [tensorrt-rtx] is not installed whole")
    command = ["build", "--model", str(folder), "--size", "64x64,96x64", "--frames", "17", "--gpu", "sm89"]
    assert main(command) == 0
    made = capsys.readouterr().out.splitlines()
    assert len(made) == 2 and all("MiB for sm89 in" in line for line in made)  # two experts
    assert main(["build", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "2 entries" in listed and listed.count("64x64, up to 17 frames; 96x64, up to 17 frames") == 2
    assert listed.count("sm89, bfloat16, tensorrt_rtx ") == 2
    assert main(["build", "--check"]) == 0
    assert capsys.readouterr().out.count(": whole") == 2


def test_an_engine_with_loras_is_the_one_that_such_a_model_takes(folder: Path, tmp_path: Path) -> None:
    """At their strengths; another strength, or none, is another engine, which is said."""
    trt = pytest.importorskip("tensorrt_rtx", reason="the extra [tensorrt-rtx] is not installed")
    pytest.importorskip("onnxscript", reason="the extra [tensorrt-rtx] is not installed whole")
    name = "transformer.blocks.0.attn1.to_q"
    low = {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}
    save_file(low, tmp_path / "style.safetensors")
    command = ["build", "--model", str(folder), "--size", "64x64", "--frames", "5", "--gpu", "sm89"]
    assert main([*command, "--lora", f"{tmp_path / 'style.safetensors'}:0.5"]) == 0
    for strength, found in ((0.5, True), (0.6, False), (None, False)):
        loras = [] if strength is None else [Lora(tmp_path / "style.safetensors", strength)]
        model = runtime.load(folder, dtype="bfloat16", loras=loras)
        asked = trt, model.transformers[0], "sm89", f"{model.fingerprint} expert 0", "bfloat16", 32, 8
        if found:
            assert tensorrt.choose(*asked)[1] == 0
        else:
            with pytest.raises(ValueError, match="Profiles there are: none. .* with each --lora that is asked for"):
                tensorrt.choose(*asked)
    assert main([*command, "--lora", str(tmp_path / "gone.safetensors")]) == 2


def test_weights_stream_where_the_gpu_has_no_room_for_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a property of the engine, so it is chosen when that is built; each expert has the GPU's memory alone."""
    model = runtime.load(folder)
    size = model.costs.transformer.bytes(4)
    assert not builds.outgrown(model)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for total, outgrown in ((size * 2, False), (size, True)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda total=total: (total, total))
        assert builds.outgrown(model) == outgrown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "sm90"], "no TensorRT here builds for 'sm90'; legal: "),
        (["--gpu", "banana"], "no TensorRT here builds for 'banana'; legal: "),
        ([], "no NVIDIA GPU to build for; say which it will be, such as --gpu sm89"),
        (["--gpu", "sm89", "--engine", "eager"], "engine is 'eager'; what can be built ahead: inductor, tensorrt"),
        (["--gpu", "sm89", "--engine", "inductor"], "leave --gpu out"),
        (["--gpu", "sm89", "--size", "65x64"], "take 64x64 or 66x64"),
        (["--gpu", "sm89", "--size", "64x64", "--frames", "6"], "take 5 or 9"),
        (["--gpu", "sm89", "--refit"], "on its GPU only; leave --refit"),
        (["--gpu", "sm89", "--dtype", "int8"], "dtype is 'int8'; legal: "),
        (["--prune", "--keep", "-1"], "--keep is -1; legal: GiB, 0 or more"),
    ],
)
def test_what_cannot_be_built(
    folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra [tensorrt-rtx] is not installed")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["build", "--model", str(folder), *options]) == 2
    assert said in capsys.readouterr().err
    assert Store().entries() == []


def test_a_library_that_is_missing(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.engines.builder.importable", lambda name: None)
    assert main(["build", "--model", str(folder), "--gpu", "sm89"]) == 2
    assert "pip install 'dit-runtime[tensorrt-rtx]'" in capsys.readouterr().err


def test_generate_with_tensorrt_needs_a_gpu(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["-o", str(tmp_path / "x.png"), "--frames", "1", "--steps", "1", "--device", "cpu", "--quiet"]
    assert main(["generate", "a ball", "--model", str(folder), "--engine", "tensorrt", *options]) == 2
    assert "take --device cuda, or --engine eager or inductor" in capsys.readouterr().err


def test_build_compiles_every_kind_of_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler makes of them is proven elsewhere; here, which kinds a build asks for, each once."""
    asked = []

    def note(self: inductor.Compiled, block: object, arguments: tuple, sizes: tuple[str, ...]) -> object:
        asked.append(sizes[0])
        return lambda parameters, h, *others: block(h, *others)

    monkeypatch.setattr(inductor.Compiled, "load", note)
    assert main(["build", "--model", str(folder), "--engine", "inductor"]) == 0
    # One row; then two, the first block's input still shared by both. Two experts of one block each.
    assert asked == ["float32 1 L 32", "float32 1 L 32"] * 2


def test_check_and_prune(capsys: pytest.CaptureFixture) -> None:
    names = fill(3)
    store = Store()
    (store.folder / names[0] / "engine.plan").write_bytes(bytes(2**20 - 1) + b"1")
    (store.folder / names[1] / MANIFEST).unlink()
    assert main(["build", "--check"]) == 2
    said = capsys.readouterr().err
    assert "2 of 3 entries are damaged" in said and f"{names[0]} has engine.plan corrupted" in said
    assert f"{names[1]} has no manifest" in said and "--prune removes them" in said
    assert main(["build", "--prune"]) == 0
    assert sorted(capsys.readouterr().out.split()) == sorted(["removed", names[0], "removed", names[1]])
    assert [entry.name for entry in store.entries()] == [names[2]]
    assert main(["build", "--prune"]) == 0 and capsys.readouterr().out == "nothing to remove\n"
    assert main(["build", "--prune", "--keep", "0.0001"]) == 0
    assert names[2] in capsys.readouterr().out and store.entries() == []
    assert main(["build", "--check"]) == 0 and capsys.readouterr().out == "the store is empty\n"
