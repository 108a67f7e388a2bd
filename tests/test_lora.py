"""LoRA files are merged as diffusers merges them, in each style of names; what does not fit is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import runtime
import runtime.offload
from runtime.lora import Lora
from runtime.model import change_loras
from tests.published import Tiny, write

RANK = 3
MODULES = {  # diffusers' name -> (the original's, rows, columns)
    "blocks.0.attn1.to_q": ("blocks.0.self_attn.q", 24, 24),
    "blocks.1.attn1.to_v": ("blocks.1.self_attn.v", 24, 24),
    "blocks.0.attn1.to_out.0": ("blocks.0.self_attn.o", 24, 24),
    "blocks.1.attn2.to_k": ("blocks.1.cross_attn.k", 24, 24),
    "blocks.0.ffn.net.0.proj": ("blocks.0.ffn.0", 32, 24),
    "blocks.0.ffn.net.2": ("blocks.0.ffn.2", 24, 32),
    "condition_embedder.text_embedder.linear_1": ("text_embedding.0", 24, 16),
}


def halves(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator))
        for name, (_, rows, columns) in MODULES.items()
    }


def published(prefix: str = "transformer.", seed: int = 1) -> dict[str, torch.Tensor]:
    """A LoRA as diffusers writes it."""
    found = {}
    for name, (down, up) in halves(seed).items():
        found |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    return found


def original() -> dict[str, torch.Tensor]:
    """The same by the original names, with an alpha that makes up for a larger half."""
    found = {}
    for name, (down, up) in halves(1).items():
        key = f"diffusion_model.{MODULES[name][0]}"
        found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": 2 * up, f"{key}.alpha": torch.tensor(1.5)}
    return found


def kohya() -> dict[str, torch.Tensor]:
    """The same with underscores for dots."""
    found = {}
    for name, tensor in original().items():
        module, dot, role = name.removeprefix("diffusion_model.").partition(".lora_" if ".lora_" in name else ".alpha")
        found[f"lora_unet_{module.replace('.', '_')}{dot}{role}"] = tensor
    return found


STYLES = {"diffusers": published, "original": original, "kohya": kohya}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("lora")
    for experts in (1, 2):
        write(Tiny(experts=experts), root / str(experts))
    return {1: root / "1", 2: root / "2"}


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    file = folder / f"lora-{len(list(folder.glob('*.safetensors')))}.safetensors"
    save_file(tensors, file)
    return file


def weights(model: runtime.Model, number: int = 0) -> dict[str, torch.Tensor]:
    """A transformer's weights by diffusers' names."""
    network: Any = model.transformers[number]
    parameters = dict(network.named_parameters())
    keys = model.checkpoint.transformers[number].keys(network)
    return {name: slot.within(parameters[slot.name]) for name, slot in keys.items()}


def load(folder: Path, *loras: Lora) -> runtime.Model:
    return runtime.load(folder, device="cpu", loras=loras)


@pytest.mark.parametrize("style", STYLES)
def test_merged_as_diffusers_merges(folders: dict[int, Path], tmp_path: Path, style: str) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folders[1])
    pipe.load_lora_weights(str(saved(tmp_path, published())), adapter_name="one")
    pipe.load_lora_weights(str(saved(tmp_path, published(seed=2))), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.8, -0.3])
    pipe.fuse_lora(adapter_names=["one", "two"])
    pipe.unload_lora_weights()
    theirs = pipe.transformer.state_dict()

    file = saved(tmp_path, STYLES[style]())
    ours = weights(load(folders[1], Lora(file, 0.8), Lora(saved(tmp_path, published(seed=2)), -0.3)))
    plain = weights(load(folders[1]))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name].reshape(value.shape), atol=2e-6), name
        touched = name.removesuffix(".weight") in MODULES
        assert torch.equal(value, plain[name]) != touched, name


def test_differences_of_whole_weights(folders: dict[int, Path], tmp_path: Path) -> None:
    wide, narrow = torch.randn(1, 6, 24), torch.randn(24)
    file = saved(tmp_path, {
        "diffusion_model.blocks.1.diff_m": wide,
        "diffusion_model.blocks.0.self_attn.q.diff_b": narrow,
        "diffusion_model.blocks.0.norm3.diff": narrow.clone(),
    })  # fmt: skip
    ours, plain = weights(load(folders[1], Lora(file, 0.5))), weights(load(folders[1]))
    for name, delta in (
        ("blocks.1.scale_shift_table", wide[0]),
        ("blocks.0.attn1.to_q.bias", narrow),
        ("blocks.0.norm2.weight", narrow),
    ):
        assert torch.allclose(ours[name].squeeze(0), (plain[name] + 0.5 * delta).squeeze(0), atol=1e-6)
    assert sum(not torch.equal(ours[name], plain[name]) for name in plain) == 3


@pytest.mark.parametrize(
    ("tensors", "expert", "changed"),
    [
        (published(), None, [True, True]),
        (published(), "high", [True, False]),
        (published(), "low", [False, True]),
        (published("transformer_2."), None, [False, True]),
        (published() | published("transformer_2.", seed=2), None, [True, True]),
    ],
)
def test_each_expert_gets_its_own(
    folders: dict[int, Path], tmp_path: Path, tensors: dict[str, torch.Tensor], expert: str | None, changed: list[bool]
) -> None:
    plain, model = load(folders[2]), load(folders[2], Lora(saved(tmp_path, tensors), expert=expert))
    name = "blocks.0.attn1.to_q.weight"
    moves = [weights(model, i)[name] - weights(plain, i)[name] for i in range(2)]
    assert [bool(move.any()) for move in moves] == changed
    for move, seed in zip(moves, (1, 2 if len(tensors) > 2 * len(MODULES) else 1), strict=True):
        if move.any():
            down, up = halves(seed)["blocks.0.attn1.to_q"]
            assert torch.allclose(move, up @ down, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"transformer.blocks.7.attn1.to_q.lora_A.weight": torch.zeros(3, 24)}, "blocks.7.attn1.to_q"),
        ({"transformer.blocks.0.attn2.to_q.lora_B.weight": torch.zeros(24, 3)}, "attn2.to_q.lora_B"),
        ({"text_encoder.layer.0.lora_A.weight": torch.zeros(3, 24)}, "text_encoder.layer.0"),
        ({"transformer.blocks.0.attn1.to_q.dora_scale": torch.zeros(24)}, "dora_scale match no weight"),
        ({"transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(3, 24)}, "and the model has one"),
        ({"transformer.blocks.0.attn1.to_k.diff": torch.zeros(24, 23)}, "to_k.diff match no weight"),
    ],
)
def test_what_does_not_fit_is_named(
    folders: dict[int, Path], tmp_path: Path, more: dict[str, torch.Tensor], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(folders[1], Lora(saved(tmp_path, published() | more)))


def test_its_names_strengths_and_experts(folders: dict[int, Path], tmp_path: Path) -> None:
    file = saved(tmp_path, published())
    odd = file.rename(tmp_path / "a:b.safetensors")
    assert Lora.parse(f"{odd}") == Lora(odd)
    assert Lora.parse(f"{odd}:0.8") == Lora(odd, 0.8)
    assert Lora.parse(f"low={odd}:-1") == Lora(odd, -1.0, "low")
    for text, sentence in ((f"{odd}:inf", "finite"), (f"{odd}:nan", "finite")):
        with pytest.raises(ValueError, match=sentence):
            Lora.parse(text)
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        Lora.parse("nowhere.safetensors:0.5")
    with pytest.raises(ValueError, match="and the model has one"):
        load(folders[1], Lora(odd, expert="high"))
    with pytest.raises(ValueError, match="blocks are to stay"):
        runtime.load(folders[1], device="cpu", loras=[Lora(odd)], offload=runtime.offload.Offload(blocks=1))


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_on_a_loaded_model(folders: dict[int, Path], tmp_path: Path, experts: int, dtype: torch.dtype) -> None:
    """To the bit as loaded with them, in whatever order they come and go; what does not fit changes nothing."""
    one, two = Lora(saved(tmp_path, published()), 0.7), Lora(saved(tmp_path, published(seed=2)), -0.4)
    odd = {f"transformer.blocks.0.attn1.{name}": torch.ones(2, 2) for name in ("to_q.lora_A.weight", "to_k.diff")}
    model = runtime.load(folders[experts], device="cpu", dtype=dtype)
    fingerprints = {model.fingerprint}
    for loras in ([one], [one, two], [two], [Lora(one.file, 0.2)], [], [two, one], []):
        with pytest.raises(ValueError, match="does not fit"):
            change_loras(model, [*loras, Lora(saved(tmp_path, odd))])
        change_loras(model, loras)
        expected = runtime.load(folders[experts], device="cpu", dtype=dtype, loras=loras)
        for number in range(experts):
            ours, theirs = weights(model, number), weights(expected, number)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert model.fingerprint == expected.fingerprint
        fingerprints.add(model.fingerprint)
    assert len(fingerprints) == 6


def test_it_stands_in_the_receipt_and_in_the_fingerprint(folders: dict[int, Path], tmp_path: Path) -> None:
    file = saved(tmp_path, published())
    plain, weak, strong = load(folders[1]), load(folders[1], Lora(file, 0.5)), load(folders[1], Lora(file))
    assert len({model.fingerprint for model in (plain, weak, strong)}) == 3
    request = runtime.Request(prompt="a", seed=1, steps=1)
    video = runtime.generate(weak, request)
    assert video.receipt is not None
    assert video.receipt.loras == [f"{file.name}:0.5"]
    assert not torch.equal(video.latents, runtime.generate(plain, request).latents)
