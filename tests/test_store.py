"""The store of engines: whole or not at all, one builder at a time, nothing damaged is loaded, a cap on its size."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engines.store import MANIFEST, Damaged, Key, Store, code_hash

KEY = Key("test", {"weights": "abc", "shapes": "1x2", "gpu": "sm89"})
CONTENT = {"engine.bin": b"0123456789" * 100, "notes.txt": b"short"}

# A builder in a process of its own: arguments are the store, a log of builds, and how long the build takes.
BUILDER = """
import sys, time
from pathlib import Path
from runtime.engines.store import Key, Store

def build(folder):
    (folder / "engine.bin").write_bytes(b"half")
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "engine.bin").write_bytes(b"whole")

key = Key("test", {"weights": "abc", "shapes": "1x2", "gpu": "sm89"})
print(Store(Path(sys.argv[1])).fetch(key, build, lambda folder: (folder / "engine.bin").read_bytes().decode()))
"""


def build(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


def load(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CONTENT}


def refuse(folder: Path) -> None:
    raise AssertionError("this must not be built")


def start(store: Path, log: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(store), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(log: Path, lines: int) -> None:
    end = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert time.monotonic() < end
        time.sleep(0.01)


def left(store: Path) -> list[str]:
    """What stands in a store besides entries and locks."""
    return [path.name for path in store.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock")]


def test_built_once_and_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.find(KEY) is None
    assert store.fetch(KEY, build, load) == CONTENT
    assert store.fetch(KEY, refuse, load) == CONTENT
    assert Store(tmp_path / "store").find(KEY) == tmp_path / "store" / KEY.name
    (entry,) = store.entries()
    assert entry.key == KEY and entry.bytes == 1005
    assert store.check() == {KEY.name: ""}
    assert left(store.folder) == []


@pytest.mark.parametrize("part", ["weights", "shapes", "gpu", "libraries"])
def test_every_part_of_the_key_counts(part: str) -> None:
    assert Key("test", {**KEY.parts, part: "other"}).name != KEY.name
    assert Key("other", KEY.parts).name != KEY.name
    assert Key("test", dict(reversed(KEY.parts.items()))).name == KEY.name


def test_the_code_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from runtime import kernels

    before = code_hash()
    copied = tmp_path / "kernels"
    shutil.copytree(Path(kernels.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(kernels, "__file__", str(copied / "__init__.py"))
    code_hash.cache_clear()
    assert code_hash() == before
    with (copied / "mlp.py").open("a") as file:
        file.write("# changed\n")
    code_hash.cache_clear()
    assert code_hash() != before
    code_hash.cache_clear()


@pytest.mark.fault(36)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damaged_byte_is_loaded(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    store.fetch(KEY, build, load)
    path = store.folder / KEY.name / data.draw(st.sampled_from([*CONTENT, MANIFEST]))
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        changed = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        changed = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    path.write_bytes(changed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert store.fetch(KEY, build, load) == CONTENT
    # A manifest may change in white space or in a way that says the same; then nothing needed to be made again.
    if path.read_bytes() == changed:
        assert path.name == MANIFEST and json.loads(changed) == json.loads(whole)
    assert store.check() == {KEY.name: ""}


def plant(folder: Path, what: str) -> None:
    """Put something foreign where an entry belongs."""
    if what == "a file":
        shutil.rmtree(folder)
        folder.write_text("hello")
    elif what == "an empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif what == "one file more":
        (folder / "more.so").write_text("hello")
    elif what == "one file less":
        (folder / "notes.txt").unlink()
    elif what == "a link":
        (folder / "engine.bin").rename(folder.parent / "elsewhere")
        (folder / "engine.bin").symlink_to(folder.parent / "elsewhere")
    elif what == "another key":
        other = Key("test", {**KEY.parts, "gpu": "sm120"})
        Store(folder.parent).fetch(other, build, load)
        shutil.rmtree(folder)
        (folder.parent / other.name).rename(folder)
    elif what == "another format":
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    else:
        (folder / MANIFEST).write_text(what)


FOREIGN = [
    "a file", "an empty folder", "one file more", "one file less", "a link", "another key", "another format",
    "[]", "{}", "null", '{"format": 1, "kind": "test", "parts": [], "files": []}', "\xff not json",
]  # fmt: skip


@pytest.mark.fault(36)
@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_foreign_is_made_again(tmp_path: Path, what: str) -> None:
    store = Store(tmp_path / "store")
    store.fetch(KEY, build, load)
    plant(store.folder / KEY.name, what)
    assert store.check()[KEY.name]
    with pytest.warns(UserWarning, match="it is not used"):
        assert store.find(KEY) is None
    with pytest.warns(UserWarning, match="is made again"):
        assert store.fetch(KEY, build, load) == CONTENT
    assert store.check() == {KEY.name: ""}


def test_what_a_library_refuses_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.fetch(KEY, lambda folder: (folder / "engine.bin").write_text("old"), lambda folder: None)

    def picky(folder: Path) -> str:
        if (found := (folder / "engine.bin").read_text()) == "old":
            raise Damaged("is of another version")
        return found

    with pytest.warns(UserWarning, match="is of another version; it is made again"):
        assert store.fetch(KEY, lambda folder: (folder / "engine.bin").write_text("new"), picky) == "new"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def broken(folder: Path) -> None:
        (folder / "engine.bin").write_text("half")
        raise RuntimeError("the compiler died")

    with pytest.raises(RuntimeError, match="the compiler died"):
        store.fetch(KEY, broken, load)
    assert left(tmp_path) == [] and store.entries() == []
    assert store.fetch(KEY, build, load) == CONTENT


@pytest.mark.fault(36)
def test_kill_during_a_build(tmp_path: Path) -> None:
    log, store = tmp_path / "log", tmp_path / "store"
    first = start(store, log, 60)
    wait_for(log, 1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert Store(store).find(KEY) is None
    assert len(left(store)) == 1
    second = start(store, log, 0)
    out, err = second.communicate(timeout=60)
    assert (out, err) == ("whole\n", "")
    assert left(store) == []


def test_prune_clears_what_a_killed_builder_left(tmp_path: Path) -> None:
    log, store = tmp_path / "log", tmp_path / "store"
    builder = start(store, log, 60)
    wait_for(log, 1)
    Store(store).prune()
    assert len(left(store)) == 1  # it is still at work
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    Store(store).prune()
    assert left(store) == []


@pytest.mark.fault(36)
def test_two_builders_at_once(tmp_path: Path) -> None:
    log, store = tmp_path / "log", tmp_path / "store"
    builders = [start(store, log, 1)]
    wait_for(log, 1)
    builders += [start(store, log, 1) for _ in range(2)]
    outputs = [builder.communicate(timeout=60) for builder in builders]
    assert [out for out, _ in outputs] == ["whole\n"] * 3
    assert log.read_text() == "built\n"


def test_another_process_is_at_it(tmp_path: Path) -> None:
    log, store = tmp_path / "log", tmp_path / "store"
    builder = start(store, log, 2)
    wait_for(log, 1)
    with pytest.warns(UserWarning, match="another process is making test-"):
        found = Store(store).fetch(KEY, refuse, lambda folder: (folder / "engine.bin").read_bytes())
    assert found == b"whole"
    builder.communicate(timeout=60)


def test_full_disk(tmp_path: Path) -> None:
    """A real short write: the process may write 4 KiB per file and no more."""
    code = (
        "import resource, signal, sys; from pathlib import Path;"
        "from runtime.engines.store import Key, Store;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY));"
        "Store(Path(sys.argv[1])).fetch(Key('test', {}), lambda f: (f / 'x').write_bytes(bytes(9999)), print)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "cannot be written (File too large); free some space" in done.stderr
    assert left(tmp_path) == [] and Store(tmp_path).entries() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_an_unwritable_store_says_what_to_do(tmp_path: Path, number: int) -> None:
    def broken(folder: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match="free some space there .* DIT_RUNTIME_CACHE"):
        Store(tmp_path).fetch(KEY, broken, load)
    assert left(tmp_path) == []


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=3000)
    keys = [Key("test", {"n": str(n)}) for n in range(4)]
    for age, key in enumerate(keys[:2]):
        store.fetch(key, build, load)
        os.utime(tmp_path / key.name / MANIFEST, (1000 + age, 1000 + age))
    store.fetch(keys[0], refuse, load)  # used: now the newer one
    store.fetch(keys[2], build, load)
    assert {entry.key.parts["n"] for entry in store.entries()} == {"0", "2"}
    assert sorted(store.prune(0)) == sorted([keys[0].name, keys[2].name])
    assert store.entries() == []


def test_an_entry_larger_than_the_cap_stays_while_it_is_the_newest(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=10)
    assert store.fetch(KEY, build, load) == CONTENT
    assert [entry.name for entry in store.entries()] == [KEY.name]


def test_prune_leaves_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    store = Store(tmp_path, limit=0)
    store.fetch(KEY, build, load)
    store.prune(0)
    assert (tmp_path / "letter.txt").read_text() == "mine" and store.entries() == []
