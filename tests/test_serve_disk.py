"""The data folder: full, read-only, damaged, of another version, on a network, used by two servers."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")

from runtime.serve import folders, leases, maker, opening
from runtime.serve.errors import disk_full
from runtime.serve.jobs import Store
from runtime.serve.settings import Settings
from tests.faulty import fill
from tests.serving import LONG, TINY, UNSHARE, Server, frames_of

SLOW = TINY | {"num_inference_steps": 8}

mounts = pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="this machine lets nobody mount a small disk",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a disk of 6 MiB, whose jobs wait 2 seconds for space."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "serve.toml").write_text("min_free = 0\nfull_wait = 2\n")
    started = Server(folder / "data", "--config", str(folder / "serve.toml"), faulty=True, disk="6m")
    yield started
    assert started.stop() == 0


def free(server: Server) -> None:
    (server.files / "filler").unlink(missing_ok=True)


def noise() -> bytes:
    """A picture of 600 KB, as PNG cannot make it smaller."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (450, 450, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.fault(32)
@mounts
def test_a_disk_that_is_full_when_a_job_comes(small: Server) -> None:
    """507, nothing left behind, health and status answer; and it recovers as soon as there is space."""
    before = small.done(small.create()["id"])
    folders = set((small.files / "jobs").iterdir())
    fill(small.files)
    for _ in range(2):
        answer = small.http.post("/v1/videos", files={"input_reference": noise()}, data={"prompt": "x"})
        assert answer.status_code == 507 and answer.json()["error"]["code"] == "insufficient_storage", answer.text
        assert answer.headers["x-should-retry"] == "false"
    assert set((small.files / "jobs").iterdir()) == folders
    assert small.http.get("/health/live").status_code == 200
    assert small.content(before["id"])
    free(small)
    again = small.content(small.done(small.create()["id"])["id"])
    assert (frames_of(again) == frames_of(small.content(before["id"]))).all()


@pytest.mark.fault(32)
@mounts
@pytest.mark.parametrize("place", ["step", "frame", "commit"])
def test_a_disk_that_fills_while_a_job_runs(small: Server, place: str) -> None:
    """At a checkpoint, while frames are encoded, before the result is told: it waits, and goes on where space comes.

    The result needs no space where the store's log has just been emptied and begins anew: then it is told at once.
    """
    length = len(small.log())
    job = small.create(SLOW | {"prompt": f"fill {place} once"})["id"]
    told = ("completed",) if place == "commit" else ()
    small.until(lambda: "waiting up to" in small.log()[length:] or small.video(job)["status"] in told)
    assert small.http.get("/health/ready").status_code == 200
    assert small.video(job)["status"] in ("in_progress", *told)
    free(small)
    found = small.done(job)
    assert found["attempt"] == 1 and small.content(job)[4:8] == b"ftyp"
    left = sorted(file.name for file in (small.files / "jobs" / job).iterdir())
    assert left == ["output-1.jpg", "output-1.mp4", "output-1.webp"]


@pytest.mark.fault(32)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_look_at_what_is_coming_is_left_out_on_a_full_disk(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def save(path: Path) -> None:
        raise OSError(number, "x")

    models = maker.Loaded({}, device="cpu", dtype="float32", engine="eager", precision="full")
    models["demo"] = SimpleNamespace()  # type: ignore[assignment]
    store = SimpleNamespace(pressing=lambda *_: False, beat=lambda *_: False)
    making = SimpleNamespace(
        store=store, models=models, moderator=maker.Moderator([]), stopping=threading.Event(), full_wait=0.0,
        with_space=lambda act, seconds: act(),
    )  # fmt: skip
    monkeypatch.setattr(maker, "preview", lambda *_, **__: SimpleNamespace(save=save))
    job = SimpleNamespace(step=0, total=2, model="demo", request={"fps": 8, "height": 64, "width": 64})
    report = maker.Report(making, job, tmp_path, checkpoints=None)
    if number == errno.EIO:
        with pytest.raises(OSError, match="x"):
            report.step(1, 2, None, None)
    else:
        report.step(1, 2, None, None)


@pytest.mark.fault(32)
@mounts
def test_a_job_that_waits_too_long_for_space_fails(small: Server) -> None:
    """Its own files are removed; that it failed is told once the store can be written."""
    job = small.create(SLOW | {"prompt": "fill frame"})["id"]
    small.until(lambda: "insufficient_storage" in small.log() or f"job {job} failed" in small.log())
    free(small)
    found = small.done(job, "failed")
    assert found["error"]["code"] == "insufficient_storage"
    assert not list((small.files / "jobs" / job).iterdir())
    assert small.done(small.create()["id"])["status"] == "completed"


def refused(data: Path, *flags: str, before: Sequence[str] = ()) -> str:
    """Start a server that must not start, and return what it says."""
    command = [*before, sys.executable, "-m", "runtime.serve", "--port", "0", "--data", str(data), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("error: ")]
    return line


@pytest.mark.fault(33)
def test_a_damaged_store_is_refused_and_moved_aside_when_asked(tmp_path: Path) -> None:
    """Nothing is removed; a page in the middle is enough, and so is a file that is none of sqlite's."""
    store = Store(tmp_path)
    for index in range(200):
        store.create(row(index), max_queue=1000, max_owner=1000)
    store.close()
    whole = (tmp_path / "store.db").read_bytes()
    middle = len(whole) // 2 // 4096 * 4096
    for content in (b"\xff" * 5000, whole[:middle] + b"\xff" * 4096 + whole[middle + 4096 :]):
        for file in tmp_path.glob("store.db*"):
            file.unlink()
        (tmp_path / "store.db").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged .* --move-damaged"):
            opening.open_store(Settings(data=tmp_path))
        assert (tmp_path / "store.db").read_bytes()[:5000] == content[:5000]
    found, lock = opening.open_store(Settings(data=tmp_path, move_damaged=True))
    assert found.counts() == {}
    (aside,) = tmp_path.glob("damaged-*")
    assert (aside / "store.db").read_bytes()[:5000] == content[:5000] and (aside / "jobs").is_dir()
    lock.close()
    found.close()


@pytest.mark.fault(32)
@mounts
def test_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=1m,ro none "$0" && exec "$@"'
    assert "cannot be written" in refused(tmp_path, before=[*UNSHARE, "sh", "-c", mount, str(tmp_path)])


@pytest.mark.fault(32)
def test_a_store_that_cannot_be_written_is_a_full_disk(tmp_path: Path) -> None:
    """So are a quota and a disk that became read-only; other faults are not."""
    Store(tmp_path).close()
    db = sqlite3.connect(f"file:{tmp_path}/store.db?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError) as caught:
        db.execute("DELETE FROM jobs")
    db.close()
    assert disk_full(caught.value)
    assert all(disk_full(OSError(number, "x")) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
    assert not disk_full(OSError(errno.EACCES, "x")) and not disk_full(sqlite3.OperationalError("no such table"))


@pytest.mark.fault(33)
def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "store.db") as db:
        db.execute("PRAGMA user_version = 999")
    db.close()
    assert "newer version" in refused(tmp_path, "--move-damaged")


def test_a_job_counts_once_while_its_row_is_there_and_its_answer_is_not(tmp_path: Path) -> None:
    """Else a full queue refuses while there is room."""
    store = Store(tmp_path)
    jobs = [store.create(row(index), max_queue=9, max_owner=9) for index in range(3)]
    taking = {jobs[1].id, "video_without_a_row"} if jobs[1] else set()
    assert store.active() == 3
    assert store.active(besides=taking) + len(taking) == 4
    store.close()


@pytest.mark.fault(33)
def test_a_store_without_its_log(tmp_path: Path) -> None:
    """What was only in the log is lost, and that is all: the rest is whole and goes on."""
    store = Store(tmp_path)
    store.create(row(0), max_queue=9, max_owner=9)
    store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.create(row(1), max_queue=9, max_owner=9)
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("*-wal", "*-shm", "copy"))
    store.close()
    found, lock = opening.open_store(Settings(data=tmp_path / "copy"))
    assert found.counts() == {"queued": 1}
    assert found.create(row(2), max_queue=9, max_owner=9)
    lock.close()
    found.close()


@pytest.mark.fault(33)
def test_a_network_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opening.file_system(Path("/proc")) == "proc" and opening.file_system(tmp_path) not in opening.NETWORK
    device = os.stat(tmp_path).st_dev
    mounted = tmp_path / "mountinfo"
    mounted.write_text(
        f"36 35 {os.major(device)}:{os.minor(device)} / {tmp_path} rw,noatime shared:1 - nfs4 server:/x rw\n"
    )
    monkeypatch.setattr(opening, "MOUNTS", mounted)
    with pytest.raises(OSError, match="network file system .nfs4"):
        opening.open_store(Settings(data=tmp_path))


@pytest.mark.fault(34)
def test_a_folder_for_one_server_alone(tmp_path: Path) -> None:
    first, lock = opening.open_store(Settings(data=tmp_path))
    second, other = opening.open_store(Settings(data=tmp_path))
    assert "another server uses" in refused(tmp_path, "--exclusive")
    other.close()
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="another server uses"):
        opening.open_store(Settings(data=tmp_path))
    for each in (lock, first, second):
        each.close()


@pytest.mark.fault(34)
def test_two_servers_on_one_folder(tmp_path: Path) -> None:
    """Each job is made once, by one of them; when one dies the other makes what it had begun."""
    one, two = Server(tmp_path / "data"), Server(tmp_path / "data")
    try:
        made = [server.create()["id"] for server in (one, two) * 4]
        found = [one.done(job) for job in made]
        assert {video["attempt"] for video in found} == {1}
        assert len({frames_of(two.content(job)).tobytes() for job in made}) == 1
        film = two.create(LONG)["id"]
        one.until(lambda: one.video(film)["step"] > 5)
        holder = Store(tmp_path / "data").get(film)
        assert holder and holder.worker
        mine = holder.worker in " ".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in one.workers())
        dead, alive = (one, two) if mine else (two, one)
        dead.kill("both")
        seen = alive.until(lambda: (video := alive.video(film))["attempt"] == 2 and video)
        assert seen["step"] > 5
        alive.http.delete(f"/v1/videos/{film}")
        assert alive.stop() == 0
    finally:
        for server in (one, two):
            server.process.kill()


def row(index: int, **more: object) -> dict[str, object]:
    return {
        "id": f"video_{index:032x}", "kind": "video", "owner": "local", "model": "demo", "prompt": "x" * 100,
        "priority": 0, "request": {}, "shown": {}, "total": 3,
    } | more  # fmt: skip


@pytest.mark.fault(34)
def test_leases_do_not_depend_on_the_time_of_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is set back or forth takes no job from who works on it, and keeps none for who is silent."""
    store = Store(tmp_path)
    store.create(row(1), max_queue=9, max_owner=9)
    with (tmp_path / "workers" / "me").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = store.claim("me")
        assert job is not None
        for hours in (-24, 24):
            moved = time.time() + 3600 * hours
            monkeypatch.setattr(time, "time", lambda moved=moved: moved)
            assert store.reclaim() == 0 and not store.beat(job, 1, 3, 30)
        now = leases.uptime()
        monkeypatch.setattr(leases, "uptime", lambda: now + leases.LEASE_SECONDS + 1)
        assert store.reclaim() == 1
        with pytest.raises(leases.LostLease):
            store.beat(job, 2, 3, 60)
    store.close()


@pytest.mark.fault(30)
def test_what_deaths_leave_is_swept(tmp_path: Path) -> None:
    """Between writing, renaming and telling the store: what no result needs goes, results and inputs stay."""
    store = Store(tmp_path)
    store.create(row(1), max_queue=9, max_owner=9)
    job = store.claim("gone")
    assert job is not None
    folder, orphan, young = store.folder(job.id), store.folder("video_orphan"), store.folder("video_young")
    for each in (folder, orphan, young):
        each.mkdir()
    names = [
        "upload-1.png", "output-1.mp4", "output-1.webm", "output-1.webp", "output-2.mp4", "window-0.safetensors",
        "preview.gif", ".output-1.ab.partial.mp4",
    ]  # fmt: skip
    for name in names:
        (folder / name).write_text("x")
    past = time.time() - 2 * folders.ORPHAN_SECONDS
    for old in (orphan, folder / ".output-1.ab.partial.mp4"):
        os.utime(old, (past, past))
    store.sweep()
    assert sorted(file.name for file in folder.iterdir()) == sorted(names), "it is still in progress"
    assert not orphan.exists() and young.exists()
    with store._write() as db:
        db.execute("UPDATE jobs SET status = 'completed', output = '{\"file\": \"output-1.mp4\"}'")
    store.sweep()
    kept = ["output-1.mp4", "output-1.webm", "output-1.webp", "upload-1.png"]
    assert sorted(file.name for file in folder.iterdir()) == kept
    store.close()
