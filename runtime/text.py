"""Prompt -> text embeddings, cached in memory and on disk; a hit never loads the text encoder."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
from safetensors import SafetensorError, safe_open

from runtime.engines.store import cache_root
from runtime.model import Model
from runtime.request import Request
from runtime.trace import span
from runtime.weights import publish

MEMORY_ENTRIES = 256
DISK_ENTRIES = 4096
SHOWN = 500  # characters of a text that was cut


@dataclass(frozen=True)
class Embedding:
    """The encoder's output for one text [S, text_dim], without padding, and the end of the text that did not fit."""

    tokens: torch.Tensor
    cut: str = ""


_memory: OrderedDict[str, Embedding] = OrderedDict()


def encode_prompt(model: Model, request: Request) -> tuple[list[torch.Tensor], list[str]]:
    """Return (embeddings [S, text_dim] of negative prompt and prompt, or of the prompt alone without guidance; notes).

    A note says what was cut from a text that is longer than the model takes.
    """
    found = {name: embedding(model, clean(text)) for name, text in texts_of(request).items()}
    notes = [
        f"the {name} is longer than {model.spec.text_length} tokens; this was cut: {shown(entry.cut)}"
        for name, entry in found.items()
        if entry.cut
    ]
    return [entry.tokens for entry in found.values()], notes


def shown(text: str) -> str:
    """Return a text quoted, a long one by its beginning."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r} and {len(text) - SHOWN} characters more"


def embeddings_known(model: Model, request: Request) -> bool:
    """Tell whether all texts of a request are in the cache, so that the text encoder stays where it is."""
    keys = [cache_key(model, clean(text)) for text in texts_of(request).values()]
    return all(key in _memory or (cache_folder() / f"{key}.safetensors").exists() for key in keys)


def texts_of(request: Request) -> dict[str, str]:
    """Return the texts of a request that are encoded; the negative prompt only where there is guidance."""
    texts = {"prompt": request.prompt}
    if max(request.guidance or 0, request.guidance_2 or 0) > 1:
        texts = {"negative_prompt": request.negative_prompt, "prompt": request.prompt}
    return texts


def clean(text: str) -> str:
    """Mend mojibake, unescape HTML twice and fold white space, as the published pipelines do."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def embedding(model: Model, text: str) -> Embedding:
    """Return the embedding of a cleaned text, from memory, from disk or from the encoder."""
    key = cache_key(model, text)
    if key in _memory:
        _memory.move_to_end(key)
        return _memory[key]
    found = _read(key)
    if found is None:
        with span("text/encode"):
            found = run_encoder(model, text)
        _write(key, found)
    _memory[key] = found
    if len(_memory) > MEMORY_ENTRIES:
        _memory.popitem(last=False)
    return found


@torch.inference_mode()
def run_encoder(model: Model, text: str) -> Embedding:
    """Encode a cleaned text: cut to the model's text length, without padding.

    The published pipelines pad and mask; a masked token weighs exactly nothing, so leaving it out is the same.
    """
    found = model.tokenizer.encode(text, add_special_tokens=False)
    room = model.spec.text_length - model.tokenizer.num_special_tokens_to_add(is_pair=False)
    cut = model.tokenizer.decode(found.ids[room:])
    found.truncate(room)
    ids = model.tokenizer.post_process(found).ids
    tokens = model.text_encoder(torch.tensor([ids], device=model.device))[0]
    return Embedding(tokens.cpu().clone(), cut)


def cache_key(model: Model, text: str) -> str:
    """Return the key of an embedding: what encodes it, how, and the text."""
    parts = [model.text_fingerprint, str(model.dtype), model.device.type, model.spec.text_length, text]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_folder() -> Path:
    """Return the folder of cached embeddings."""
    return cache_root() / "text"


def _read(key: str) -> Embedding | None:
    file = cache_folder() / f"{key}.safetensors"
    try:
        with safe_open(file, framework="pt") as handle:
            found = Embedding(handle.get_tensor("tokens").clone(), (handle.metadata() or {}).get("cut", ""))
        os.utime(file)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{file} is damaged ({error}) and is made again", stacklevel=2)
        return None
    return found


def _write(key: str, entry: Embedding) -> None:
    """Publish an entry atomically; a cache that cannot be written costs time, not the video."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        publish(folder / f"{key}.safetensors", {"tokens": entry.tokens}, {"cut": entry.cut})
        _prune(folder)
    except OSError as error:
        warnings.warn(f"the text cache in {folder} cannot be written ({error}); going on without", stacklevel=2)


def _prune(folder: Path) -> None:
    """Keep the most recently used entries."""
    files = list(folder.glob("*.safetensors"))
    if len(files) > DISK_ENTRIES:
        for old in sorted(files, key=lambda file: file.stat().st_mtime)[: len(files) - DISK_ENTRIES]:
            old.unlink(missing_ok=True)
