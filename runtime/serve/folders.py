"""The files of a data folder: a folder for each job, a lock for each worker, and what of them goes and when."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.serve.database import TERMINAL, Database

ORPHAN_SECONDS = 3600.0  # a folder may be older than its job by as much: its files are still coming


class Folders(Database):
    """What lies beside the store."""

    def folder(self, job_id: str) -> Path:
        """Return the folder of a job's inputs, checkpoints and results."""
        return self.data / "jobs" / job_id

    def alive(self, worker: str) -> bool:
        """Tell whether a worker's process holds its lock, which no death leaves behind."""
        try:
            with (self.data / "workers" / worker).open("r+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def sweep(self) -> None:
        """Remove the folders that no job owns and that nobody has touched for an hour, what deaths have left in those
        of ended jobs, and the locks of dead workers."""
        ended = {row["id"]: row for row in self._reader.execute("SELECT id, status, output FROM jobs").fetchall()}
        for folder in (self.data / "jobs").iterdir():
            if folder.name not in ended and time.time() - folder.stat().st_mtime > ORPHAN_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.name in ended and ended[folder.name]["status"] in TERMINAL:
                self.tidy(folder.name, json.loads(ended[folder.name]["output"] or "{}"))
        for lock in (self.data / "workers").iterdir():
            if not self.alive(lock.name):
                lock.unlink(missing_ok=True)

    def tidy(self, job_id: str, output: Mapping[str, Any]) -> None:
        """Remove what an ended job needs no more: its states, its preview, and the files of attempts that are lost."""
        folder = self.folder(job_id)
        own = Path(output.get("file", "")).stem
        others = [file for file in folder.glob("output-*") if file.stem != own]
        for left in (*folder.glob("window-*"), folder / "preview.gif", *others):
            left.unlink(missing_ok=True)
        for unfinished in folder.glob(".*"):
            if time.time() - unfinished.stat().st_mtime > ORPHAN_SECONDS:  # else it may be on its way to a format
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)

    def purge(self) -> None:
        """Remove what is deleted and can no longer be restored."""
        due = "SELECT id FROM jobs WHERE deleted AND coalesce(purge_at, 0) <= ? AND status IN (?, ?, ?)"
        for row in self._reader.execute(due, (time.time(), *TERMINAL)).fetchall():
            self._remove(row["id"])

    def expire(self, keep: float) -> None:
        """Remove the files of jobs that ended more than `keep` seconds ago."""
        with self._write() as db:
            rows = db.execute(
                "UPDATE jobs SET expired = 1 "
                "WHERE NOT expired AND completed_at < ? AND status IN (?, ?, ?) RETURNING id",
                (time.time() - keep, *TERMINAL),
            ).fetchall()
        for row in rows:
            shutil.rmtree(self.folder(row["id"]), ignore_errors=True)

    def _remove(self, job_id: str) -> None:
        """Remove a deleted job that cannot be restored any more, and its files."""
        with self._write() as db:
            gone = db.execute(
                "DELETE FROM jobs WHERE id = ? AND deleted AND coalesce(purge_at, 0) <= ? RETURNING id",
                (job_id, time.time()),
            ).fetchone()
        if gone is not None:
            shutil.rmtree(self.folder(job_id), ignore_errors=True)
