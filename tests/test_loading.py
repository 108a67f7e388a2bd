"""Loading: what is refused and how, dtypes and shards, memory, names."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime
from runtime.models import open_checkpoint
from tests.published import Tiny, relative, write

SHARD = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write(Tiny(), folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def edit(file: Path, **values: object) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | values))


def truncate(folder: Path) -> None:
    with (folder / SHARD).open("r+b") as handle:
        handle.truncate(5000)


def wrong_shapes(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    for i, name in enumerate(sorted(tensors)):
        if i < 7:
            tensors[name] = tensors[name].new_zeros(3, 5, 7)
    save_file(tensors, folder / SHARD)


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    del tensors["proj_out.weight"]
    tensors["surprise"] = torch.zeros(1)
    save_file(tensors, folder / SHARD)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SHARD), folder / "transformer/diffusion_pytorch_model.bin")
    (folder / SHARD).unlink()


def index_outside(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
        file.write_text(json.dumps({"weight_map": {"proj_out.weight": name}}))

    return damage


def deeper_config(folder: Path) -> None:
    edit(folder / "transformer/config.json", num_layers=3)


def written(content: bytes, folder: Path) -> None:
    (folder / SHARD).write_bytes(content)


def header(kind: str = "F32", shape: Sequence[int] = (1,), b: Sequence[int] | None = None) -> bytes:
    """Return a safetensors file of the tensor "a", which is right by default, and of "b" at given offsets."""
    told = {"a": {"dtype": kind, "shape": list(shape), "data_offsets": [0, 4]}}
    if b is not None:
        told["b"] = {"dtype": kind, "shape": list(shape), "data_offsets": list(b)}
    text = json.dumps(told).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


def endless_header(folder: Path) -> None:
    with (folder / SHARD).open("wb") as handle:
        handle.write((2**26).to_bytes(8, "little"))
        handle.truncate(2**27)


DAMAGES: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "truncated": (truncate, ValueError, "damaged or truncated"),
    "no shard": (lambda f: (f / SHARD).unlink(), FileNotFoundError, "lacks .*diffusion_pytorch_model.safetensors"),
    "no VAE": (lambda f: shutil.rmtree(f / "vae"), FileNotFoundError, "vae/config.json is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), FileNotFoundError, "lacks .*tokenizer"),
    "index up": (index_outside("../../evil.safetensors"), ValueError, "outside its folder"),
    "index absolute": (index_outside("/etc/passwd"), ValueError, "outside its folder"),
    "index names a missing shard": (index_outside("gone.safetensors"), FileNotFoundError, "gone.safetensors"),
    "shapes": (wrong_shapes, ValueError, r"(has shape \[3, 5, 7\].*){5} and 2 more"),
    "missing tensor": (without_tensor, ValueError, "unexpected surprise; missing proj_out.weight"),
    "config against weights": (deeper_config, ValueError, r"do not fit.*missing blocks\.2\."),
    "endless header": (endless_header, ValueError, "header of .* bytes, legal"),
    **{
        f"safetensors with {name}": (partial(written, content), ValueError, "damaged or truncated")
        for name, content in {
            "nothing": b"", "7 bytes": b"1234567", "a cut header": (99).to_bytes(8, "little") + b"{",
            "a header beyond all": (2**63).to_bytes(8, "little") + b"{}", "no JSON": b"\3" + bytes(7) + b"{a}",
            "bytes behind": header() + bytes(8), "an overlap": header(b=[2, 6]) + bytes(2),
            "another type": header(kind="F99"), "a shape too large": header(shape=[2**40, 2**40]),
            "a shape of other bytes": header(shape=[3]), "a list": b"\2" + bytes(7) + b"[]",
        }.items()
    },
    "pickle": (pickled, ValueError, "is a pickle.*save_file"),
    "unknown pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), ValueError, "not a model of a known family"
    ),
    "another task": (
        lambda f: edit(f / "model_index.json", _class_name="WanAnimatePipeline"), ValueError, "supported: WanPipeline"
    ),
    "image layers": (
        lambda f: edit(f / "transformer/config.json", image_dim=8, added_kv_proj_dim=5),
        ValueError,
        "added_kv_proj_dim 5",
    ),
    "unknown key": (lambda f: edit(f / "transformer/config.json", window=3), ValueError, "not known: window"),
    "scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="epsilon"), ValueError, "flow-matching"
    ),
    "karras": (
        lambda f: edit(f / "scheduler/scheduler_config.json", use_karras_sigmas=True), ValueError, "use_karras_sigmas"
    ),
    "other scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"), ValueError, "DDIMScheduler"
    ),
    "no JSON": (lambda f: (f / "vae/config.json").write_text("{"), ValueError, "is not JSON"),
    "runtime.json": (lambda f: edit(f / "runtime.json", colour="red"), ValueError, "not known: colour"),
    "channels": (lambda f: edit(f / "transformer/config.json", in_channels=20), ValueError, "20 channels in"),
}  # fmt: skip


@pytest.mark.fault(1, 2, 5)
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_in_one_sentence(folder: Path, name: str) -> None:
    damage, kind, sentence = DAMAGES[name]
    damage(folder)
    with pytest.raises(kind, match=sentence):
        runtime.load(folder)


@pytest.mark.fault(5)
@pytest.mark.parametrize("name", ["transformer/config.json", SHARD, "vae", "tokenizer/new.json"])
@pytest.mark.parametrize("target", ["elsewhere", "/etc/hostname"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str, target: str) -> None:
    """Of a file, of weights, of a whole folder, and one that nobody reads; within the folder links are followed."""
    outside, link = folder.parent / "elsewhere", folder / name
    if link.exists():
        link.rename(outside)
    link.symlink_to(Path(target) if Path(target).is_absolute() else Path("../" * len(Path(name).parts)) / target)
    with pytest.raises(ValueError, match=f"{name} is a link to .*, outside the model's folder; legal"):
        runtime.load(folder)
    if outside.exists():
        link.unlink()
        outside.rename(folder / "own")
        link.symlink_to(folder / "own")
        assert runtime.load(folder).spec.latent_channels


def header(text: str, body: bytes = b"") -> bytes:
    """Return a safetensors file with that header."""
    return struct.pack("<Q", len(text)) + text.encode() + body


def entry(kind: str = "F32", shape: str = "[1]", place: str = "[0,4]") -> str:
    return f'{{"dtype":"{kind}","shape":{shape},"data_offsets":{place}}}'


FILES = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header of 200 MB": struct.pack("<Q", 200_000_000) + b"{}",
    "no JSON": header("not json"),
    "no object": header("[]"),
    "no UTF-8": struct.pack("<Q", 2) + b"\xff\xfe",
    "bytes behind the end": header(f'{{"a":{entry()}}}', b"\0" * 8),
    "bytes missing": header(f'{{"a":{entry()}}}', b"\0" * 2),
    "overlapping": header(f'{{"a":{entry()},"b":{entry()}}}', b"\0" * 4),
    "unknown dtype": header(f'{{"a":{entry("F3")}}}', b"\0" * 4),
    "shape beyond its bytes": header(f'{{"a":{entry(shape="[2]")}}}', b"\0" * 4),
    "shape that overflows": header(f'{{"a":{entry(shape="[9223372036854775807,9223372036854775807]")}}}', b"\0" * 4),
    "GGUF": b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\0" * 64,
    "a web page": b"<!DOCTYPE html><html></html>",
}


@pytest.mark.fault(1, 6)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_in_one_sentence(folder: Path, name: str) -> None:
    (folder / SHARD).write_bytes(FILES[name])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors.*damaged or truncated") as caught:
        runtime.load(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.fault(3)
def test_a_header_of_very_many_tensors_is_refused(folder: Path) -> None:
    many = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    (folder / SHARD).write_bytes(header(json.dumps(many)))
    with pytest.raises(ValueError, match="do not fit|damaged") as caught:
        runtime.load(folder)
    assert len(str(caught.value)) < 2000


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


@pytest.mark.fault(4)
def test_a_pickle_never_runs(folder: Path, tmp_path: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "ran")}, folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        runtime.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_shards_of_any_dtype(published: Path, tmp_path: Path, kind: str) -> None:
    """The same weights, rounded to `kind` and cut into shards, load as those rounded weights."""
    folder = Path(shutil.copytree(published, tmp_path / "model"))
    tensors = {name: t.to(getattr(torch, kind)) for name, t in load_file(folder / SHARD).items()}
    (folder / SHARD).unlink()
    names, where = sorted(tensors), {}
    for i in range(3):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[i::3]}
        save_file(part, folder / "transformer" / shard)
        where |= dict.fromkeys(part, shard)
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    loaded = runtime.load(folder).transformers[0]
    assert loaded.head.weight.dtype == torch.float32
    assert torch.equal(loaded.head.weight, tensors["proj_out.weight"].float())
    qkv = torch.cat([tensors[f"blocks.1.attn1.to_{letter}.weight"] for letter in "qkv"])
    assert torch.equal(loaded.blocks[1].self_attention.qkv.weight, qkv.float())


def test_bfloat16_keeps_the_time_path_in_float32(published: Path) -> None:
    model = runtime.load(published, dtype="bfloat16")
    kinds = {name: p.dtype for name, p in model.transformers[0].named_parameters()}
    assert kinds["blocks.0.ffn_in.weight"] == torch.bfloat16
    assert (
        kinds["modulation"] == kinds["time_projection.weight"] == kinds["blocks.0.cross_norm.weight"] == torch.float32
    )
    request = runtime.Request(prompt="a red ball", seed=1)
    exact = runtime.generate(runtime.load(published), request).latents
    assert relative(runtime.generate(model, request).latents, exact) < 0.1


MEMORY = """
import sys, torch
from pathlib import Path
from runtime import weights
from runtime.models import open_checkpoint

def read(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

part = open_checkpoint(Path(sys.argv[1])).transformers[0]
torch.zeros(1000) @ torch.zeros(1000)
before = read("VmRSS")
module = weights.load(part, torch.device("cpu"), getattr(torch, sys.argv[2]))
target = sum(p.numel() * p.element_size() for p in module.parameters())
print((read("VmHWM") - before) / target)
"""


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_peak_memory_of_loading(published: Path, tmp_path: Path, stored: str, wanted: str) -> None:
    """At most 1.15 times the weights in their target dtype, over shards, with one tensor larger than a window."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    folder = Path(shutil.copytree(published, tmp_path / "model"))
    config = {"num_attention_heads": 8, "attention_head_dim": 96, "num_layers": 6, "ffn_dim": 6144}
    edit(folder / "transformer/config.json", **config)
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        shapes = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, freq_dim=32, **config).state_dict()
    (folder / SHARD).unlink()
    names, where = sorted(shapes), {}
    for i in range(2):
        shard = f"diffusion_pytorch_model-{i}.safetensors"
        part = {name: torch.zeros(shapes[name].shape, dtype=getattr(torch, stored)) for name in names[i::2]}
        save_file(part, folder / "transformer" / shard)
        where |= dict.fromkeys(part, shard)
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, folder, wanted], capture_output=True, text=True, check=True, timeout=120
    )
    assert 0.8 < float(run.stdout) <= 1.15


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.write_text("{")
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be read"):
        runtime.generate(runtime.load(folder), runtime.Request(prompt="never encoded before", steps=1))


def test_names(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert runtime.load("demo").spec.name == "demo"
    with pytest.raises(FileNotFoundError, match="no model 'nobody/nothing'.*hf download nobody/nothing"):
        runtime.load("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        runtime.load("wan2.1-t2v-1.3b")
    with pytest.raises(ValueError, match="is a file"):
        runtime.load(published / "model_index.json")
    with pytest.raises(ValueError, match="not a model of a known family"):
        runtime.load(tmp_path)


def test_a_repository_in_the_local_cache(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache holds links to blobs, so the files' real places are outside the folder."""
    root = tmp_path / "hub" / "models--some--repo"
    snapshot = root / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(snapshot.name)
    (root / "blobs").mkdir()
    for i, file in enumerate(sorted(p for p in published.rglob("*") if p.is_file())):
        shutil.copy(file, root / "blobs" / str(i))
        link = snapshot / file.relative_to(published)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(root / "blobs" / str(i))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code = "import runtime, sys; print(runtime.load('some/repo').spec.latent_channels)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")},
    )
    assert run.stdout.strip() == "4", run.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"device": "cuda:7"}, "shows 0 NVIDIA GPUs" if not torch.cuda.is_available() else "cuda:7"),
        ({"device": "tpu"}, "legal: auto, cpu, cuda"),
        ({"dtype": "int8"}, "legal: auto, float32"),
        ({"engine": "warp"}, "legal: cuda_graph, eager"),
    ],
)
def test_bad_arguments(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        runtime.load("demo", **arguments)


def test_describing_reads_no_weights(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.family == "wan"
    assert checkpoint.missing == ()
