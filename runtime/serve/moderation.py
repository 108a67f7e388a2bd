"""Moderation: what the operator's rules say of a prompt before its job is taken, and of frames before they are seen.

A rule is a list of words, a command, or an HTTP endpoint. The last two are asked as OpenAI's moderation endpoint is,
the command on its standard input: {"input": [{"type": "text", "text"}, {"type": "image_url", "image_url": {"url"}}]},
where pictures are data: URLs; they answer {"results": [{"flagged", "categories": {"violence": true}, "reason"}]}, of
which only `reason` is ours.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from runtime.reading import read_video
from runtime.serve.fetching import shortened

if TYPE_CHECKING:
    from runtime.serve.jobs import Store

log = logging.getLogger("runtime.serve.moderation")

NEEDS = {"words": "file", "command": "command", "http": "url"}
STAGES = ("prompt", "frames")
BROKEN = ("refuse", "accept")
ANSWER_BYTES = 2**20
SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


@dataclass(frozen=True)
class Rule:
    """One of the operator's rules, as a `[[moderation]]` table of the settings file says it; ValueError if illegal."""

    kind: str  # words, command, http
    checks: tuple[str, ...] = ("prompt",)  # prompt, frames
    file: Path | None = None  # words: a word or phrase a line
    command: tuple[str, ...] = ()
    url: str | None = None
    key_file: Path | None = None  # http: a bearer token
    model: str | None = None  # http, command: passed on
    seconds: float = 10.0  # to answer in
    frames: int = 8  # spread over the video, that are shown
    broken: str = "refuse"  # or "accept": what holds where the rule does not answer

    def __post_init__(self) -> None:
        if self.kind not in NEEDS:
            raise ValueError(f"moderation kind is {self.kind!r}; legal: {', '.join(NEEDS)}")
        if not getattr(self, NEEDS[self.kind]):
            raise ValueError(f"moderation by {self.kind} needs {NEEDS[self.kind]!r}")
        if self.broken not in BROKEN:
            raise ValueError(f"moderation's broken is {self.broken!r}; legal: {', '.join(BROKEN)}")
        if not self.checks or set(self.checks) - set(STAGES) or (self.kind == "words" and "frames" in self.checks):
            raise ValueError(f"moderation by {self.kind} checks {self.checks}; legal: prompt, and frames but for words")
        if not self.seconds > 0 or self.frames < 1:
            raise ValueError("moderation's seconds and frames must be more than 0")
        for name in ("file", "key_file"):
            if (path := getattr(self, name)) is not None and not Path(path).is_file():
                raise ValueError(f"moderation's {name}, {path}, is no file")

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Rule:
        """Return the rule of a TOML table, or of the JSON that `record` made; ValueError for what is unknown."""
        values = dict(table)
        for name in ("file", "key_file"):
            if values.get(name) is not None:
                values[name] = Path(values[name])
        for name in {"checks", "command"} & values.keys():
            values[name] = tuple([values[name]] if isinstance(values[name], str) else values[name])
        try:
            return cls(**values)
        except TypeError as error:
            legal = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"moderation has {', '.join(values)}; legal: {legal}") from error

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in vars(self).items() if v is not None}


class Refused(Exception):
    """Raised where a rule says no, or does not answer and so may not be passed (`broken`)."""

    def __init__(self, stage: str, rule: Rule, reason: str, *, broken: bool = False) -> None:
        what = "the prompt" if stage == "prompt" else "the video"
        super().__init__(f"{what} is refused by this server's rules: {reason}")
        self.stage, self.rule, self.reason = stage, rule, reason
        self.code = "moderation_unavailable" if broken else "content_policy_violation"


def keep(store: Store, error: Refused, *, owner: str, prompt: str, job: str | None = None) -> None:
    """Record a refusal: all of it in the store, whose and by which rule in the log."""
    store.refuse(
        {
            "owner": owner, "job": job, "stage": error.stage, "rule": error.rule.kind, "code": error.code,
            "reason": error.reason, "prompt": prompt,
        }
    )  # fmt: skip
    log.info("%s of %s %s: %s by %s", error.stage, owner, job or "", error.code, error.rule.kind)


class Moderator:
    """The rules, with their words and keys read once."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self.words = {rule: read_words(rule.file) for rule in rules if rule.file is not None}
        self.keys = {rule: rule.key_file.read_text().strip() for rule in rules if rule.key_file is not None}

    def checks(self, stage: str) -> bool:
        """Tell whether any rule looks at prompts, or at frames."""
        return any(stage in rule.checks for rule in self.rules)

    def check_prompt(self, texts: Sequence[str]) -> None:
        """Refused where a rule says no to what a video is to show; it blocks as long as the rules take."""
        text = "\n".join(each for each in texts if each.strip())
        for rule in self.rules:
            if text and "prompt" in rule.checks:
                if rule.kind == "words":
                    if has_any(text, self.words[rule]):
                        raise Refused("prompt", rule, "it has a word that is not allowed")
                else:
                    self.ask(rule, "prompt", [{"type": "text", "text": text}])

    def check_frames(self, path: Path, texts: Sequence[str]) -> None:
        """Refused where a rule says no to what a finished file shows; `texts` are told with it."""
        for rule in self.rules:
            if "frames" in rule.checks:
                shown = [{"type": "image_url", "image_url": {"url": url}} for url in samples(path, rule.frames)]
                self.ask(rule, "frames", [{"type": "text", "text": "\n".join(texts)}, *shown])

    def ask(self, rule: Rule, stage: str, given: list[dict[str, Any]]) -> None:
        """Refused where a command or an endpoint flags what it is given; where it fails, as the rule says."""
        asked = json.dumps({"input": given} | ({"model": rule.model} if rule.model else {})).encode()
        try:
            reason = judgement(self.post(rule, asked) if rule.kind == "http" else run(rule, asked))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("moderation by %s does not answer: %s", rule.kind, error)
            if rule.broken == "refuse":
                raise Refused(stage, rule, "the check does not answer; try again later", broken=True) from error
            return
        if reason is not None:
            raise Refused(stage, rule, reason)

    def post(self, rule: Rule, asked: bytes) -> bytes:
        """Return what an endpoint of the operator's answers; OSError where it does not."""
        import httpx2

        headers = {"content-type": "application/json"}
        if rule in self.keys:
            headers["authorization"] = f"Bearer {self.keys[rule]}"
        try:
            with httpx2.Client(timeout=rule.seconds, trust_env=False) as client:
                answer = client.post(rule.url or "", content=asked, headers=headers)
        except httpx2.HTTPError as error:
            raise OSError(f"{shortened(rule.url or '')} cannot be asked ({type(error).__name__})") from error
        if answer.status_code != 200:
            raise OSError(f"{shortened(rule.url or '')} answers {answer.status_code}")
        return answer.content


def run(rule: Rule, asked: bytes) -> bytes:
    """Return what a command prints; OSError where it fails or takes too long."""
    try:
        done = subprocess.run(rule.command, input=asked, capture_output=True, timeout=rule.seconds)
    except subprocess.TimeoutExpired:
        raise OSError(f"{rule.command[0]} takes more than {rule.seconds:g} s") from None
    if done.returncode:
        raise OSError(f"{rule.command[0]} ends with code {done.returncode}")
    return done.stdout


def judgement(answer: bytes) -> str | None:
    """Return why an answer refuses, None where it does not; ValueError, TypeError or LookupError for no such answer."""
    reasons = []
    for each in json.loads(answer[:ANSWER_BYTES])["results"]:
        if each["flagged"] is not False:
            named = [name for name, found in (each.get("categories") or {}).items() if found is True]
            reasons.append(str(each.get("reason") or ", ".join(named) or "flagged")[:300])
    return "; ".join(reasons) or None


def read_words(path: Path) -> list[str]:
    """Return the words and phrases of a file, a line each, as they are compared; ValueError where there is none."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [plain(line) for line in lines if line and not line.startswith("#")]
    if not any(word.strip() for word in found):
        raise ValueError(f"{path} holds no word")
    return [word for word in found if word.strip()]


def has_any(text: str, words: Sequence[str]) -> bool:
    """Tell whether a text has one of some words, as `plain` has them: whole, or anywhere in scripts without spaces."""
    seen = plain(text)
    return any((word.strip() if spaceless(word) else word) in seen for word in words)


def spaceless(word: str) -> bool:
    """Tell whether a word is of a script that puts no spaces between words."""
    return any(unicodedata.name(c, "").startswith(SPACELESS) for c in word)


def plain(text: str) -> str:
    """Return a text as words are compared: without case, accents, invisible characters and punctuation."""
    spread = unicodedata.normalize("NFKD", text.casefold())
    kept = (c for c in spread if not unicodedata.category(c).startswith(("M", "Cf")))
    return f" {' '.join(''.join(c if c.isalnum() else ' ' for c in kept).split())} "


def samples(path: Path, count: int) -> list[str]:
    """Return frames of a file as data: URLs of JPEG pictures, spread from its first to its last."""
    video = read_video(path)
    wanted = set(np.linspace(0, video.num_frames - 1, min(count, video.num_frames)).round().astype(int).tolist())
    found = []
    for index, frame in enumerate(video):
        if index in wanted:
            Image.fromarray(frame).save(written := io.BytesIO(), "JPEG", quality=85)
            found.append(f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}")
    return found
