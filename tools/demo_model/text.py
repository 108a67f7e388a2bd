"""The demo model's tokenizer and text encoder: whole words with letters to fall back on, and a small UMT5."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import UMT5Config, UMT5EncoderModel

from tools.demo_model.captions import vocabulary

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()"


def pieces() -> list[tuple[str, float]]:
    """Return the vocabulary with scores: words far likelier than letters, capitalised words beside the plain ones."""
    words = vocabulary()
    out = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    out += [("▁" + w, -2.0) for w in words]
    out += [("▁" + w.capitalize(), -2.0) for w in words]
    out += [(letter, -10.0) for letter in LETTERS]
    return out


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that transformers reads as a T5Tokenizer, as the published checkpoints hold it."""
    special = [
        {
            "id": i,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, word in enumerate(("<pad>", "</s>", "<unk>"))
    ]
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    sequence = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence[0], end],
            "pair": [sequence[0], end, sequence[1], end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces(), "byte_fallback": False},
    }
    config = {
        "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        "extra_ids": 0, "model_max_length": 512, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build(width: int) -> UMT5EncoderModel:
    """Return a new text encoder of `width` with two layers."""
    config = UMT5Config(
        vocab_size=len(pieces()), d_model=width, d_kv=32, d_ff=2 * width, num_layers=2, num_decoder_layers=2,
        num_heads=width // 32, dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    encoder = UMT5EncoderModel(config)
    _look_around(encoder)
    return encoder


def _look_around(encoder: UMT5EncoderModel) -> None:
    """Start each layer's first three heads on the words just before, just after and anywhere before the own.

    From a bias of nothing the words' order is found out three times as late, or never.
    """
    for block in encoder.encoder.block:
        bias = block.layer[0].SelfAttention.relative_attention_bias.weight.data  # [buckets, heads]
        half = len(bias) // 2  # the first half is for words before, nearest first, one word per bucket at the start
        near = (3.0 - torch.arange(half)).clamp_min(-3.0)
        away = torch.full((half,), -3.0)
        rows = [torch.cat([near, away]), torch.cat([away, near]), torch.tensor([1.5, -1.5]).repeat_interleave(half)]
        for head, row in enumerate(rows[: bias.shape[1]]):
            bias[:, head] = row


def copy_capitals(encoder: UMT5EncoderModel) -> None:
    """Give capitalised words the plain words' embeddings: captions are written small, prompts are not always."""
    table = {piece: i for i, (piece, _) in enumerate(pieces())}
    weight = encoder.shared.weight.data
    for word in vocabulary():
        if word.capitalize() != word:
            weight[table["▁" + word.capitalize()]] = weight[table["▁" + word]]
    for letter in "abcdefghijklmnopqrstuvwxyz":
        weight[table[letter.upper()]] = weight[table[letter]]


def tokenize(tokenizer: object, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [B, S] of captions, padded to the longest."""
    batch = tokenizer(captions, padding=True, return_tensors="pt")  # type: ignore[operator]
    return batch["input_ids"], batch["attention_mask"]
