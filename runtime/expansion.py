"""Prompt expansion: a language model writes a short prompt out as a caption like those that a model was trained on.

Any endpoint that speaks OpenAI's chat completions will do, or a chat model of transformers on this machine. What it
said is cached on disk by what was asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

KEY = "OPENAI_API_KEY"  # the environment variable that holds the endpoint's key, if it wants one
LONGEST = 2**20  # bytes of an answer that are read
NEW_TOKENS = 256

Rules = Mapping[str, Sequence[Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Who expands prompts: `model` at the endpoint `url` (such as http://localhost:8000/v1), or, without one, a folder.

    Without a model, the checkpoint's own rules do (`by_rules`), where it brings some.

    `timeout` is seconds for each of 1 + `retries` tries. With `optional`, the prompt as it was is taken where nobody
    answers, and a note says so.
    """

    model: str | None = None
    url: str | None = None
    timeout: float = 30.0
    retries: int = 2
    optional: bool = False

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the expansion's url is {self.url!r}; legal: http:// or https:// and the rest up to /v1")
        if self.url is not None and not self.model:
            raise ValueError(f"the expansion's url is {self.url}, but no model is named; legal: a name it knows")
        if not self.timeout > 0 or self.retries < 0:
            raise ValueError(f"timeout is {self.timeout}, retries {self.retries}; legal: more than 0, and at least 0")


def expand(prompt: str, expansion: Expansion, instructions: str, rules: Rules | None = None) -> tuple[str, list[str]]:
    """Return (the expanded prompt, notes). Raises ConnectionError or ValueError where nobody answers in words.

    `instructions` are for a language model, `rules` are the checkpoint's own.
    """
    if expansion.model is None:
        try:
            return by_rules(prompt, rules), []
        except ValueError as error:
            if not expansion.optional:
                raise
            return prompt, [f"the prompt was not expanded: {error}"]
    from runtime.engines.store import cache_root  # a request is checked without torch, which engines need

    file = cache_root() / "expansions" / f"{_key(prompt, expansion, instructions)}.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["expanded"]), []
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked before, or damaged: asked now, and written anew
    messages = [{"role": "system", "content": instructions}, {"role": "user", "content": prompt}]
    try:
        answer = ask(messages, expansion) if expansion.url else generate_here(messages, expansion.model)
        expanded = " ".join(answer.split())
        if not expanded:
            raise ValueError(f"{expansion.model} answered without words; try another model, or leave the expansion out")
    except (OSError, ValueError) as error:
        if not expansion.optional:
            raise
        return prompt, [f"the prompt was not expanded: {error}"]
    record = {"prompt": prompt, "expanded": expanded, "by": asdict(expansion)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.partial")
        unfinished.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        return expanded, [f"the expanded prompt cannot be cached ({error})"]
    return expanded, []


def by_rules(prompt: str, rules: Rules | None) -> str:
    """Return a prompt written out by a checkpoint's own rules; ValueError where it brings none.

    "replace" holds (pattern, text), applied in turn; "append" (pattern, text): added unless the pattern is found.
    """
    if rules is None:
        raise ValueError("the checkpoint brings no rules that expand prompts; name a model that does (--expand-model)")
    for pattern, words in rules.get("replace", ()):
        prompt = re.sub(pattern, words, prompt)
    for unless, words in rules.get("append", ()):
        prompt = prompt if re.search(unless, prompt, re.IGNORECASE) else prompt.rstrip(" .") + words
    return prompt


def _key(prompt: str, expansion: Expansion, instructions: str) -> str:
    return hashlib.sha256(json.dumps([expansion.url, expansion.model, instructions, prompt]).encode()).hexdigest()


def ask(messages: list[dict[str, str]], expansion: Expansion) -> str:
    """Return an endpoint's answer; ConnectionError after the last try, at once where the request itself is refused."""
    assert expansion.url
    address = f"{expansion.url.rstrip('/')}/chat/completions"
    body = json.dumps({"model": expansion.model, "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS})
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    reason = ""
    for attempt in range(1 + expansion.retries):
        if attempt:
            time.sleep(min(0.25 * 2**attempt, 5.0))
        try:
            request = urllib.request.Request(address, body.encode(), headers)
            with urllib.request.urlopen(request, timeout=expansion.timeout) as reply:
                return _words(reply.read(LONGEST), address)
        except urllib.error.HTTPError as error:
            reason = f"it answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (urllib.error.URLError, OSError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise ConnectionError(
        f"the endpoint {address} does not expand the prompt ({reason}); check it and ${KEY}, or leave --expand out"
    )


def _words(reply: bytes, address: str) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{address} does not answer as a chat endpoint does ({type(error).__name__})") from error
    if not isinstance(content, str):
        raise ValueError(f"{address} answers with {type(content).__name__}, not with text")
    return content


def generate_here(messages: list[dict[str, str]], folder: str) -> str:
    """Return what a chat model in a folder, or in the local cache, answers; always the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        if tokenizer.chat_template is None:
            raise ValueError("it has no chat template")
    except Exception as error:  # transformers fails with many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{folder} is no chat model that can be read here ({reason}); name a folder, or a url"
        ) from error
    asked: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
