"""The data folder when a server starts: where it lies, who else uses it, and whether its store is whole."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from pathlib import Path
from typing import IO

from runtime.serve.jobs import Store
from runtime.serve.settings import Settings

# File systems over a network: sqlite's log is kept in memory that the processes of one machine share.
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs",
    "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "smb3", "smbfs",
}  # fmt: skip
MOUNTS = Path("/proc/self/mountinfo")


def open_store(settings: Settings) -> tuple[Store, IO[str]]:
    """Return the store of the data folder, and the lock that says who uses it.

    Raises OSError where the folder is on a network or another server has it for itself, and ValueError for a damaged
    store, unless it is to be moved aside.
    """
    data = settings.data
    data.mkdir(parents=True, exist_ok=True)
    kind = file_system(data)
    if kind in NETWORK:
        raise OSError(f"{data} is on a network file system ({kind}), where jobs can be lost; name a folder on a disk")
    lock = hold(data, alone=settings.exclusive)
    damage = find_damage(data / "store.db")
    if damage is not None and not settings.move_damaged:
        raise ValueError(
            f"{data / 'store.db'} is damaged ({damage}); put a copy of it back, or start with --move-damaged, which "
            "moves it and the files of its jobs aside and begins anew, or name another data folder"
        )
    if damage is not None:
        lock.close()
        lock = hold(data, alone=True)
        move_aside(data)
        fcntl.flock(lock, (fcntl.LOCK_EX if settings.exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    return Store(data), lock


def file_system(folder: Path) -> str:
    """Return the kind of file system that a folder is on, such as ext4; "" where the system does not say."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = [line.split() for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    return next((line[line.index("-") + 1] for line in lines if line[2] == wanted), "")


def hold(data: Path, *, alone: bool) -> IO[str]:
    """Return the lock on a data folder, shared with other servers or not; OSError where another one forbids it."""
    try:
        handle = (data / "server.lock").open("a")
    except OSError as error:
        raise OSError(f"{data} cannot be written ({error.strerror}); name another data folder") from error
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise OSError(
            f"another server uses {data}, and one of the two is to have it for itself; end that one, or name another "
            "data folder"
        ) from None
    return handle


def find_damage(file: Path) -> str | None:
    """Return what is wrong inside a store, None where it is whole or not there; OSError where it cannot be read."""
    if not file.exists():
        return None
    try:
        db = sqlite3.connect(file, timeout=10)
        try:
            (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        finally:
            db.close()
    except sqlite3.OperationalError as error:
        raise OSError(f"{file} cannot be opened ({error}); name another data folder") from error
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if found == "ok" else str(found).splitlines()[-1]


def move_aside(data: Path) -> None:
    """Move a store and its jobs' files into a folder of their own; nothing is removed."""
    place = data / f"damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    place.mkdir()
    for name in ("store.db", "store.db-wal", "store.db-shm", "jobs"):
        if (data / name).exists():
            (data / name).rename(place / name)
