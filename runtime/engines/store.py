"""The store: what is made once and loaded often (engines, compiled code, measurements), safe for several processes.

Each entry is a folder named by the hash of everything its content depends on. It is made beside its place, checksummed
and renamed into it under a lock, so it is there whole or not at all; and every byte is checked before it is loaded.
What is damaged, or is not what its name says, is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

FORMAT = 1
LIMIT = 64 << 30  # bytes; beyond it the least recently used entries go
MANIFEST = "entry.json"
NAME = re.compile("[a-z_]+-[0-9a-f]{32}")
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

Loaded = TypeVar("Loaded")


class Damaged(Exception):
    """An entry is not what was published: a loader raises it too, for content that its library refuses."""


@dataclass(frozen=True)
class Key:
    """What an entry depends on; equal keys stand for equal content. `kind` is what loads it: "tensorrt", "inductor"."""

    kind: str
    parts: Mapping[str, str]  # such as weights, code, shapes, dtype, gpu, libraries

    @cached_property
    def name(self) -> str:
        """The entry's name: its kind and the hash of its parts."""
        digest = hashlib.sha256(json.dumps(dict(self.parts), sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{digest[:32]}"


@dataclass(frozen=True)
class Entry:
    """One entry as its manifest describes it; `used` is the time of its last use in seconds since 1970."""

    name: str
    key: Key
    bytes: int
    used: float


class Store:
    """Entries under one folder, the user's cache by default; `limit` bytes are kept at most, the newest in any case."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = folder or cache_root() / "engines"
        self.limit = limit

    def fetch(self, key: Key, build: Callable[[Path], object], load: Callable[[Path], Loaded]) -> Loaded:
        """Return `load(folder)` of the entry, made by `build(folder)` where there is none that is whole.

        Of several processes one builds and the others wait for it. `load` raises Damaged for what its library refuses.
        Raises OSError where the store cannot be written.
        """
        with suppress(FileNotFoundError, Damaged):  # said below, under the lock
            return load(self.verified(key))
        with self._locked(key.name):
            try:
                return load(self.verified(key))
            except FileNotFoundError:
                pass
            except Damaged as damage:
                warnings.warn(f"{self.folder / key.name} {damage}; it is made again", stacklevel=2)
            self._publish(key, build)
            return load(self.folder / key.name)

    def find(self, key: Key) -> Path | None:
        """Return the folder of an entry, every byte of it checked; None where there is none or it is damaged."""
        try:
            return self.verified(key)
        except FileNotFoundError:
            return None
        except Damaged as damage:
            warnings.warn(f"{self.folder / key.name} {damage}; it is not used", stacklevel=2)
            return None

    def verified(self, key: Key) -> Path:
        """Return the folder of an entry after reading all of it; FileNotFoundError, or Damaged with what is wrong."""
        folder = self.folder / key.name
        manifest = read_manifest(folder)
        if manifest["kind"] != key.kind or manifest["parts"] != dict(key.parts):
            raise Damaged("belongs to another key")
        verify(folder, manifest["files"])
        with suppress(OSError):  # a store may be read-only
            os.utime(folder / MANIFEST)
        return folder

    def entries(self) -> list[Entry]:
        """Return the readable entries, the most recently used first."""
        found = []
        for folder in self._folders():
            with suppress(FileNotFoundError, Damaged):
                manifest = read_manifest(folder)
                key = Key(manifest["kind"], manifest["parts"])
                size = sum(size for size, _ in manifest["files"].values())
                found.append(Entry(folder.name, key, size, (folder / MANIFEST).stat().st_mtime))
        return sorted(found, key=lambda entry: -entry.used)

    def check(self) -> dict[str, str]:
        """Read every entry; return what is wrong by name, "" for what is whole."""
        verdicts = {}
        for folder in self._folders():
            try:
                manifest = read_manifest(folder)
                if Key(manifest["kind"], manifest["parts"]).name != folder.name:
                    raise Damaged("belongs to another key")
                verify(folder, manifest["files"])
                verdicts[folder.name] = ""
            except FileNotFoundError:
                continue  # pruned by another process meanwhile
            except Damaged as damage:
                verdicts[folder.name] = str(damage)
        return verdicts

    def prune(self, limit: int | None = None, keep: str = "") -> list[str]:
        """Remove damaged entries, what builders that died left, and the least recently used beyond `limit` bytes.

        `keep` is the name of an entry that stays. Returns the names removed; what another process builds is left.
        """
        entries = self.entries()
        readable = {entry.name for entry in entries}
        doomed = [folder.name for folder in self._folders() if folder.name not in readable]
        left = sum(entry.bytes for entry in entries)
        for entry in reversed(entries):
            if left <= (self.limit if limit is None else limit):
                break
            if entry.name != keep:
                doomed.append(entry.name)
                left -= entry.bytes
        for scratch in self.folder.glob(".*.building-*"):
            with self._locked(scratch.name[1:].partition(".building-")[0], wait=False) as held:
                if held:
                    shutil.rmtree(scratch, ignore_errors=True)
        return [name for name in doomed if self.remove(name)]

    def remove(self, name: str) -> bool:
        """Remove an entry unless another process is at it; it leaves its place whole."""
        with self._locked(name, wait=False) as held:
            if held:
                self._discard(self.folder / name)
            return held

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def _discard(self, path: Path) -> None:
        scratch = tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{path.name}.building-")
        with scratch as grave, suppress(FileNotFoundError):
            path.rename(Path(grave) / "old")

    def _publish(self, key: Key, build: Callable[[Path], object]) -> None:
        """Make an entry beside its place and rename it there; the lock is held."""
        place = self.folder / key.name
        for left in self.folder.glob(f".{key.name}.building-*"):  # by a builder that was killed: we hold its lock
            shutil.rmtree(left, ignore_errors=True)
        with self._said(), tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{key.name}.building-") as scratch:
            made = Path(scratch) / "new"
            made.mkdir()
            build(made)
            files = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(made.iterdir())}
            manifest = {"format": FORMAT, "kind": key.kind, "parts": dict(key.parts), "files": files}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=1))
            self._discard(place)
            made.rename(place)
        self.prune(keep=key.name)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Say of an OSError that means an unwritable store what to do; the others are not the store's."""
        try:
            yield
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise OSError(
                f"the store in {self.folder} cannot be written ({error.strerror}); free some space there (python -m "
                "runtime build --prune), or name another folder with DIT_RUNTIME_CACHE"
            ) from error

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold an entry's lock; without `wait`, yield whether it was to be had. A process that dies lets go of it."""
        with self._said():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    yield False
                    return
                warnings.warn(f"another process is making {name}; waiting for it", stacklevel=4)
                lock.acquire()
        try:
            yield True
        finally:
            lock.release()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return an entry's manifest; FileNotFoundError where there is no entry, Damaged where it has none of ours."""
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise Damaged("is no entry of a store")
        raise FileNotFoundError(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise Damaged(f"has format {manifest['format']!r}, not {FORMAT}")
        kind, parts, files = manifest["kind"], manifest["parts"], manifest["files"]
        whole = isinstance(kind, str) and all(isinstance(value, str) for value in parts.values())
        if not whole or not all(isinstance(size, int) and isinstance(digest, str) for size, digest in files.values()):
            raise Damaged("has a manifest that is not ours")
    except FileNotFoundError:
        raise Damaged("has no manifest") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"has a manifest that cannot be read ({type(error).__name__})") from error
    return manifest


def verify(folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """Raise Damaged unless a folder holds exactly these files (name -> size, checksum)."""
    try:
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        if present != files.keys():
            odd = sorted(present ^ files.keys())
            raise Damaged(f"{'lacks' if odd[0] in files else 'holds a foreign'} {odd[0]}")
        for name, (size, digest) in files.items():
            path = folder / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
                raise Damaged(f"has {name} truncated or replaced")
            if checksum(path) != digest:
                raise Damaged(f"has {name} corrupted")
    except FileNotFoundError:
        raise  # removed by another process meanwhile
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from error


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def cache_root() -> Path:
    """Return the folder of everything that is kept between runs: $DIT_RUNTIME_CACHE, or one in the user's cache."""
    root = os.environ.get("DIT_RUNTIME_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-runtime"


@cache
def code_hash() -> str:
    """Return a hash of the sources that an engine is made of: models, engines and kernels."""
    from runtime import kernels, models

    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(models.__file__).parent, Path(kernels.__file__).parent):
        for source in sorted(package.rglob("*.py")):
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def architecture(device: torch.device) -> str:
    """Name what compiled code runs on: "sm90" for a GPU's compute capability, else the CPU and its features' hash."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}"
    features = ""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    return f"{platform.machine()} {hashlib.sha256(features.encode()).hexdigest()[:8]}"
