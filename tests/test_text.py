"""Text: equal to the published pipeline's embeddings, encoded once, cached, cut with a note."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import UMT5Config, UMT5EncoderModel

import runtime
from runtime import text
from runtime.denoising import prepare_context
from runtime.models.wan.text_encoder import build_text_encoder
from runtime.models.wan.transformer import fold_padding
from runtime.request import Request
from tests.published import Tiny, pipeline, randomise, relative, write

TINY = Tiny(text_length=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write(TINY, folder)
    return folder


@pytest.fixture(autouse=True)
def _empty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_memory", type(text._memory)())


@pytest.mark.parametrize(
    "prompt",
    ["a red ball", "", "  a  red\tball \n", "a &amp;amp; b", "sunâ€™s light", "red " * 40, "日本 ball"],
)
def test_equals_the_published_embeddings(folder: Path, prompt: str) -> None:
    ours = text.embedding(runtime.load(folder), text.clean(prompt)).tokens
    theirs = pipeline(TINY)._get_t5_prompt_embeds(prompt, max_sequence_length=TINY.text_length)[0]
    assert relative(ours, theirs[: len(ours)]) <= 1e-5
    assert not theirs[len(ours) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 31, 300])
def test_the_encoder_is_the_published_one_to_the_bit(dtype: torch.dtype, length: int) -> None:
    config = {
        "model_type": "umt5", "vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40, "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False, "tie_word_embeddings": False,
    }  # fmt: skip
    theirs = randomise(UMT5EncoderModel(UMT5Config(**config)), 5).to(dtype).eval()
    ours = build_text_encoder(config).to(dtype)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "encoder.embed_tokens.weight"})
    tokens = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        expected = theirs(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        assert torch.equal(ours(tokens), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"model_type": "t5"}, "Wan has 'umt5'"), ({"feed_forward_proj": "relu"}, "Wan's is 'gated-gelu'"),
     ({"d_ff": None}, "fetch it again")],
)  # fmt: skip
def test_a_config_of_another_encoder_is_refused(change: dict, words: str) -> None:
    numbers = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = {name: value for name, value in ({"model_type": "umt5"} | numbers | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        build_text_encoder(config)


def test_a_first_prompt_loads_no_library_and_no_compiler(tmp_path: Path) -> None:
    """Which would take longer than the built-in model takes for a small video."""
    code = (
        "import sys, runtime\n"
        "request = runtime.Request(prompt='a new prompt', width=32, height=32, num_frames=1, steps=1)\n"
        "assert runtime.generate(runtime.load('demo'), request, predict=False).frames.any()\n"
        "print(*{'transformers', 'torch._dynamo', 'torch._inductor', 'sympy', 'diffusers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_tokenizer_is_the_published_one_and_none_is_made_up(folder: Path, tmp_path: Path) -> None:
    """Of an empty folder, the library of published tokenizers would make one that knows no word."""
    model = runtime.load(folder)
    prompt = "a red ball rolls over 日本 grass </s> and <extra_id_0>"
    own = model.tokenizer.encode(prompt).ids
    assert own == pipeline(TINY).tokenizer(prompt).input_ids
    shutil.copytree(folder, tmp_path / "used")
    used = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    used.enable_padding(length=40)  # as it is saved after a pipeline has run
    used.enable_truncation(3)
    used.save(str(tmp_path / "used" / "tokenizer" / "tokenizer.json"))
    assert runtime.load(tmp_path / "used").tokenizer.encode(prompt).ids == own
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="neither tokenizer.json nor spiece.model.*; fetch the model again"):
        assert runtime.load(tmp_path / "model").tokenizer


def test_a_hit_never_loads_the_encoder(folder: Path) -> None:
    request = Request(prompt="a red ball", negative_prompt="fog", guidance=4.0, steps=1, seed=0)
    first = runtime.load(folder)
    video = runtime.generate(first, request)
    assert "text_encoder" in first.__dict__
    assert "text/encode" in video.receipt.stages
    for memory in (True, False):  # from memory, then from disk as a new process would
        if not memory:
            text._memory.clear()
        model = runtime.load(folder)
        again = runtime.generate(model, request)
        assert "text_encoder" not in model.__dict__
        assert "tokenizer" not in model.__dict__
        assert "text/encode" not in again.receipt.stages
        assert torch.equal(again.latents, video.latents)


def test_other_weights_other_entry(folder: Path, tmp_path: Path) -> None:
    write(Tiny(text_length=16, seed=99), tmp_path)
    a, b = (text.embedding(runtime.load(place), "a red ball").tokens for place in (folder, tmp_path))
    assert not torch.allclose(a, b, atol=1e-3)
    half = runtime.load(folder, dtype="bfloat16")
    assert text.embedding(half, "a red ball").tokens.dtype == torch.bfloat16


def test_a_damaged_entry_is_made_again(folder: Path) -> None:
    model = runtime.load(folder)
    kept = text.embedding(model, "a red ball").tokens
    (entry,) = text.cache_folder().glob("*.safetensors")
    for content in (b"", b"garbage" * 9, entry.read_bytes()[:-5]):
        entry.write_bytes(content)
        text._memory.clear()
        with pytest.warns(UserWarning, match="is damaged"):
            assert torch.equal(text.embedding(model, "a red ball").tokens, kept)
    text._memory.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.embedding(model, "a red ball")


def test_a_cache_that_cannot_be_written_costs_only_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(text.embedding(runtime.load(folder), "a red ball").tokens)


def test_old_entries_are_pruned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "DISK_ENTRIES", 3)
    model = runtime.load(folder)
    for word in ("red", "green", "blue", "white", "black"):
        text.embedding(model, word)
    assert len(list(text.cache_folder().glob("*.safetensors"))) == 3


def test_what_is_cut_is_said(folder: Path) -> None:
    model = runtime.load(folder)
    prompt = "a red ball rolls left over green grass and then a blue cube falls on the sand"
    for _ in range(2):  # computed, then from the cache
        video = runtime.generate(model, Request(prompt=prompt, steps=1, seed=0))
        (note,) = video.receipt.notes
        assert "the prompt is longer than 16 tokens" in note
        assert note.endswith("sand'")
    assert len(text.embedding(model, prompt).tokens) == 16
    (note,) = runtime.generate(model, Request(prompt="a red ball " * 1000, steps=1, seed=0)).receipt.notes
    assert len(note) < 700 and note.endswith("characters more"), "of a long text, the beginning is shown"
    assert not runtime.generate(model, Request(prompt="a red ball", steps=1, seed=0)).receipt.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100, 490, 511, 512])
def test_folded_padding_weighs_what_it_stands_for(dtype: torch.dtype, count: int) -> None:
    biases = fold_padding(count, dtype)
    assert torch.tensor(biases, dtype=torch.float64).exp().sum().item() == pytest.approx(count, rel=2e-5)
    assert all(float(torch.tensor(b).to(dtype)) == b for b in biases)
    assert len(biases) <= (1 if dtype == torch.float32 else 4)


def test_projected_once(folder: Path) -> None:
    """The keys and values of all steps come from one call per block."""
    model = runtime.load(folder)
    calls = []
    for block in model.transformers[0].blocks:
        block.cross_attention.kv.register_forward_hook(lambda *_: calls.append(1))
    runtime.generate(model, Request(prompt="a red ball", steps=6, seed=0))
    assert len(calls) == len(model.transformers[0].blocks)
    context = prepare_context(model, [torch.randn(3, 16), torch.randn(5, 16)], (4, 2, 4, 4))
    assert context.rows == 2
    assert context.experts[0].keys[0].shape[1] == 6  # five tokens and one for all padding, not 16
