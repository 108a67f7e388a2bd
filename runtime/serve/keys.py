"""API keys: a file of them, whose each is, and what each may ask for."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

LEAST = 16  # characters of a key
LIMIT = re.compile(r"(jobs|per-minute)=(\d+)")


@dataclass(frozen=True)
class Key:
    """Whose key it is; how many jobs may wait or run and how many may be asked for in a minute, None: as the server."""

    name: str
    jobs: int | None = None
    per_minute: int | None = None


def read_keys(path: Path) -> dict[str, Key]:
    """Return digest -> key of a file of lines `NAME:KEY`, or `KEY`, each with `jobs=N` and `per-minute=N` behind it.

    ValueError where there is none, or one is short or given twice.
    """
    found: dict[str, Key] = {}
    for index, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        entry, *words = line.split()
        name, colon, key = entry.partition(":")
        name, key = (name, key) if colon else (f"key-{index - 1}", name)
        limits = [LIMIT.fullmatch(word) for word in words]
        if not all(limits):
            raise ValueError(f"{path} has other words than jobs=N and per-minute=N behind the key in line {index}")
        if len(key) < LEAST:
            raise ValueError(f"{path} has a key of {len(key)} characters in line {index}; legal: at least {LEAST}")
        digest = digest_of(key)
        if digest in found:
            raise ValueError(f"{path} has a key twice, in line {index} again")
        found[digest] = Key(name, **{each[1].replace("-", "_"): int(each[2]) for each in limits if each})
    if not found:
        raise ValueError(f"{path} holds no key; legal: lines NAME:KEY")
    return found


def digest_of(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_of(keys: dict[str, Key], given: str) -> Key | None:
    """Return the key that is given; None for nobody's. All are compared, in constant time each."""
    digest = digest_of(given)
    found = None
    for known, key in keys.items():
        if hmac.compare_digest(known, digest):
            found = key
    return found


@dataclass
class Pace:
    """When each owner asked for jobs, over the last minute."""

    asked: dict[str, deque[float]] = field(default_factory=dict)

    def wait(self, owner: str, per_minute: int) -> float:
        """Count one that an owner asks for; return the seconds to wait first, where it was one too many."""
        now = time.monotonic()
        times = self.asked.setdefault(owner, deque())
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= per_minute:
            return times[0] + 60 - now if times else 60.0
        times.append(now)
        return 0.0
