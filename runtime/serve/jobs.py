"""The store: jobs, workers and models in one sqlite file, and the rules by which a job changes hands.

A job is queued, in_progress, then completed, failed or cancelled for good. A worker takes one with a lease, and every
write that it makes names the attempt it was given: once another has the job, the first one's writes change nothing.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.serve.database import Database
from runtime.serve.forecast import PRESSING, Outlook, forecast, learned, size_of

LEASE_SECONDS = 30.0
MAX_LOSSES = 3  # workers that may die over a job without taking a step further
ACTIVE = ("queued", "in_progress")
MAX_HANGS = 2  # the same for workers that were killed because they hung
ORPHAN_SECONDS = 3600.0  # a folder may be older than its job by as much: its files are still coming
TERMINAL = ("completed", "failed", "cancelled")

# First by priority, then whose owner has had least, then by age.
ORDER = "priority DESC, (SELECT share FROM owners WHERE name = owner), seq"


class LostLease(Exception):
    """Raised to a worker whose job is another's by now, or is gone."""


@dataclass(frozen=True)
class Job:
    """One row: what was asked, where it stands, what came of it."""

    seq: int
    id: str
    kind: str  # "video" or "image"
    owner: str
    status: str
    model: str
    prompt: str
    priority: int
    request: dict[str, Any]  # what runtime.Request takes, resolved; clips name their input files
    shown: dict[str, Any]  # what the API says of it that never changes
    parent: str | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    estimate: float | None  # seconds, by the planner
    attempt: int
    losses: int
    worker: str | None
    lease_until: float | None
    cancel: bool
    deleted: bool
    step: int
    total: int
    progress: int
    error: dict[str, Any] | None
    output: dict[str, Any] | None
    receipt: dict[str, Any] | None
    idempotency: str | None
    digest: str | None
    purge_at: float | None
    denoising: float | None  # seconds of the estimate that go to its steps
    claimed_at: float | None
    claimed_step: int | None
    stepped_at: float | None
    expired: bool  # its files are gone
    webhook_url: str | None
    webhook_due: float | None
    webhook_tries: int

    @classmethod
    def of(cls, row: sqlite3.Row) -> Job:
        """Return the job in a row."""
        values = dict(row)
        for name in ("request", "shown", "error", "output", "receipt"):
            values[name] = json.loads(values[name]) if values[name] else None
        return cls(**values)


class Store(Database):
    """The jobs of a data folder."""

    def folder(self, job_id: str) -> Path:
        """Return the folder of a job's inputs, checkpoints and results."""
        return self.data / "jobs" / job_id

    # What the server does.

    def create(self, values: Mapping[str, Any], *, max_queue: int, max_owner: int) -> Job | None:
        """Add a job, durable when this returns; the same job for an idempotency key that is known; None where full."""
        owner, columns = values["owner"], dict(values)
        for name in ("request", "shown"):
            columns[name] = json.dumps(columns[name])
        with self._write() as db:
            if values.get("idempotency"):
                same = db.execute(
                    "SELECT * FROM jobs WHERE owner = ? AND idempotency = ?", (owner, values["idempotency"])
                ).fetchone()
                if same is not None:
                    return Job.of(same)
            (waiting, mine) = db.execute(
                "SELECT count(*), coalesce(sum(owner = ?), 0) FROM jobs WHERE status IN ('queued', 'in_progress')",
                (owner,),
            ).fetchone()
            if waiting >= max_queue or mine >= max_owner:
                return None
            if not mine:  # who comes back starts level with those who wait
                db.execute(
                    "INSERT INTO owners (name, share) VALUES (?, 0) ON CONFLICT DO UPDATE SET share = max(share, "
                    "coalesce((SELECT min(share) FROM owners JOIN jobs ON jobs.owner = owners.name "
                    "WHERE status IN ('queued', 'in_progress')), 0))",
                    (owner,),
                )
            names = ", ".join(columns)
            row = db.execute(
                f"INSERT INTO jobs ({names}, created_at) VALUES ({'?, ' * len(columns)}?) RETURNING *",
                (*columns.values(), time.time()),
            ).fetchone()
        return Job.of(row)

    def get(self, job_id: str) -> Job | None:
        """Return a job; None where there is none, or it was deleted."""
        row = self._reader.execute("SELECT * FROM jobs WHERE id = ? AND NOT deleted", (job_id,)).fetchone()
        return None if row is None else Job.of(row)

    def page(
        self,
        owner: str,
        *,
        after: int | None,
        limit: int,
        descending: bool,
        statuses: Sequence[str] = TERMINAL + ACTIVE,
        search: str = "",
    ) -> list[Job]:
        """Return up to `limit` videos of an owner by age, after the one with that `seq`; `search` is in the prompt."""
        past, direction = ("<", "DESC") if descending else (">", "ASC")
        limits = "" if after is None else f"AND seq {past} {int(after)}"
        rows = self._reader.execute(
            f"SELECT * FROM jobs WHERE owner = ? AND kind = 'video' AND NOT deleted {limits} "
            f"AND status IN ({', '.join('?' * len(statuses))}) AND instr(lower(prompt), lower(?)) "
            f"ORDER BY seq {direction} LIMIT ?",
            (owner, *statuses, search, limit),
        )
        return [Job.of(row) for row in rows.fetchall()]

    def cancel(self, job_id: str, *, delete: bool = False, undo: float = 0.0) -> Job | None:
        """Ask that a job ends, at once where nobody works on it; with `delete` it is gone for everyone from now on.

        What is deleted can be restored for `undo` seconds; then, or at once, its files go.
        """
        with self._write() as db:
            db.execute("UPDATE jobs SET cancel = 1 WHERE id = ?", (job_id,))
            if delete:
                db.execute("UPDATE jobs SET deleted = 1, purge_at = ? WHERE id = ?", (time.time() + undo, job_id))
            db.execute(
                "UPDATE jobs SET status = 'cancelled', completed_at = ? WHERE id = ? AND status = 'queued'",
                (time.time(), job_id),
            )
            row = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is not None and row["deleted"] and row["status"] in TERMINAL:
            self._remove(job_id)
        return None if row is None else Job.of(row)

    def restore(self, job_id: str, owner: str) -> Job | None:
        """Return a deleted job that is there again; None where it is gone for good."""
        with self._write() as db:
            row = db.execute(
                "UPDATE jobs SET deleted = 0, purge_at = NULL WHERE id = ? AND owner = ? AND deleted AND purge_at > ? "
                "RETURNING *",
                (job_id, owner, time.time()),
            ).fetchone()
        return None if row is None else Job.of(row)

    def _remove(self, job_id: str) -> None:
        """Remove a deleted job that cannot be restored any more, and its files."""
        with self._write() as db:
            gone = db.execute(
                "DELETE FROM jobs WHERE id = ? AND deleted AND coalesce(purge_at, 0) <= ? RETURNING id",
                (job_id, time.time()),
            ).fetchone()
        if gone is not None:
            shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def fail(self, job: Job, error: Mapping[str, Any]) -> None:
        """End a completed job whose result is gone."""
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET status = 'failed', error = ? WHERE id = ? AND status = 'completed'",
                (json.dumps(error), job.id),
            )

    def outlooks(self, workers: int) -> dict[str, Outlook]:
        """Return what lies before each job that is queued or running."""
        rows = self._reader.execute(
            "SELECT id, seq, owner, status, model, priority, estimate, denoising, step, total, progress, claimed_at, "
            "claimed_step, stepped_at FROM jobs WHERE status IN ('queued', 'in_progress') AND NOT cancel"
        ).fetchall()
        shares = dict(self._reader.execute("SELECT name, share FROM owners").fetchall())
        return forecast(rows, shares, self.paces(), workers, time.time())

    def paces(self) -> dict[tuple[str, int], float]:
        """Return what jobs took by what was predicted, per model and size."""
        rows = self._reader.execute("SELECT model, size, pace FROM paces").fetchall()
        return {(model, size): found for model, size, found in rows}

    def refuse(self, values: Mapping[str, Any]) -> None:
        """Keep what the operator's rules refused: columns of the table `refusals`."""
        with self._write() as db:
            db.execute(
                f"INSERT INTO refusals (at, {', '.join(values)}) VALUES (?{', ?' * len(values)})",
                (time.time(), *values.values()),
            )

    def refusals(self) -> dict[tuple[str, str], int]:
        """Return how often each stage was refused, by code."""
        rows = self._reader.execute("SELECT stage, code, count(*) FROM refusals GROUP BY stage, code").fetchall()
        return {(stage, code): count for stage, code, count in rows}

    def active(self) -> int:
        """Return how many jobs wait or are being made."""
        (count,) = self._reader.execute(
            "SELECT count(*) FROM jobs WHERE status IN ('queued', 'in_progress')"
        ).fetchone()
        return int(count)

    def counts(self) -> dict[str, int]:
        """Return how many jobs are in each status."""
        return dict(self._reader.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())

    def waits(self) -> list[tuple[str, float, int]]:
        """Return (kind, seconds that jobs waited for a worker, jobs) of those that have begun."""
        rows = self._reader.execute(
            "SELECT kind, sum(started_at - created_at), count(*) FROM jobs WHERE started_at IS NOT NULL GROUP BY kind"
        )
        return [tuple(row) for row in rows.fetchall()]

    def stages(self) -> list[tuple[str, float, int]]:
        """Return (stage, seconds, calls) over all jobs."""
        return [
            tuple(row)
            for row in self._reader.execute("SELECT name, seconds, calls FROM stages ORDER BY name").fetchall()
        ]

    def models(self) -> dict[str, dict[str, Any]]:
        """Return the facts of the models that workers have told."""
        return {
            name: json.loads(card) for name, card in self._reader.execute("SELECT name, card FROM models").fetchall()
        }

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

    def reclaim(self, hung: str | None = None) -> int:
        """Take the jobs back of workers that are dead or whose lease is over; return how many. `hung` names a worker
        that was killed because it hung: its job is tried less often."""
        held = self._reader.execute("SELECT id, attempt, worker, lease_until FROM jobs WHERE status = 'in_progress'")
        lost = [row for row in held.fetchall() if row["lease_until"] < uptime() or not self.alive(row["worker"])]
        for row in lost:
            most, error = (MAX_HANGS, WORKER_HUNG) if row["worker"] == hung else (MAX_LOSSES, WORKER_LOST)
            with self._write() as db:
                db.execute(
                    "UPDATE jobs SET losses = losses + 1, worker = NULL, lease_until = NULL, "
                    "status = CASE WHEN cancel THEN 'cancelled' WHEN losses + 1 >= ? THEN 'failed' ELSE 'queued' END, "
                    "completed_at = CASE WHEN cancel OR losses + 1 >= ? THEN ? END, "
                    "error = CASE WHEN NOT cancel AND losses + 1 >= ? THEN ? END "
                    "WHERE id = ? AND attempt = ? AND status = 'in_progress'",
                    (most, most, time.time(), most, error, row["id"], row["attempt"]),
                )
        return len(lost)

    # What a worker does.

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

    def tell_model(self, name: str, card: Mapping[str, Any]) -> None:
        """Make the facts of a model known."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO models VALUES (?, ?)", (name, json.dumps(card)))

    def unestimated(self) -> list[Job]:
        """Return queued jobs that nobody has predicted yet."""
        rows = self._reader.execute("SELECT * FROM jobs WHERE status = 'queued' AND estimate IS NULL ORDER BY seq")
        return [Job.of(row) for row in rows.fetchall()]

    def estimate(self, job: Job, seconds: float, denoising: float = 0.0) -> None:
        """Keep a prediction: seconds in all, and those of them that go to the steps."""
        with self._write() as db:
            db.execute("UPDATE jobs SET estimate = ?, denoising = ? WHERE id = ?", (seconds, denoising, job.id))

    def claim(self, worker: str) -> Job | None:
        """Take the job whose turn it is; None where there is none."""
        if self._reader.execute("SELECT 1 FROM jobs WHERE status = 'queued' AND NOT cancel").fetchone() is None:
            return None
        now = time.time()
        with self._write() as db:
            row = db.execute(
                "UPDATE jobs SET status = 'in_progress', attempt = attempt + 1, worker = ?, lease_until = ?, "
                "started_at = coalesce(started_at, ?), claimed_at = ?, claimed_step = step, stepped_at = NULL "
                "WHERE id = "
                f"(SELECT id FROM jobs WHERE status = 'queued' AND NOT cancel ORDER BY {ORDER} LIMIT 1) RETURNING *",
                (worker, uptime() + LEASE_SECONDS, now, now),
            ).fetchone()
            if row is None:
                return None
            db.execute("UPDATE owners SET share = share + ? WHERE name = ?", (row["estimate"] or 1.0, row["owner"]))
        return Job.of(row)

    def beat(self, job: Job, step: int, total: int, progress: int) -> bool:
        """Renew the lease and say how far a job is; return whether it shall end. LostLease where it is another's.

        A step further than any before forgives the workers that died over it.
        """
        now = time.time()
        with self._write() as db:
            row = db.execute(
                "UPDATE jobs SET lease_until = ?, losses = CASE WHEN ? > step THEN 0 ELSE losses END, "
                "stepped_at = CASE WHEN ? > step OR ? > progress THEN ? ELSE stepped_at END, "
                "step = max(step, ?), total = ?, progress = max(progress, ?) "
                "WHERE id = ? AND attempt = ? AND status = 'in_progress' RETURNING cancel",
                (uptime() + LEASE_SECONDS, step, step, progress, now, step, total, progress, job.id, job.attempt),
            ).fetchone()
        if row is None:
            raise LostLease(job.id)
        return bool(row["cancel"])

    def renew(self, job: Job) -> None:
        """Renew the lease of a job that takes long over a step; nothing where it is another's."""
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET lease_until = ? WHERE id = ? AND attempt = ? AND status = 'in_progress'",
                (uptime() + LEASE_SECONDS, job.id, job.attempt),
            )

    def pressing(self, job: Job, left: float) -> bool:
        """Tell whether a job of higher priority waits that takes at most a tenth of the `left` seconds of this one."""
        row = self._reader.execute(
            "SELECT 1 FROM jobs WHERE status = 'queued' AND NOT cancel AND priority > ? AND estimate * ? < ? LIMIT 1",
            (job.priority, PRESSING, left),
        ).fetchone()
        return row is not None

    def release(self, job: Job) -> None:
        """Give a job back unfinished, its place kept."""
        self._end(job, "queued", worker=None, lease_until=None, completed_at=time.time() if job.cancel else None)

    def finish(self, job: Job, status: str, **values: Any) -> None:
        """End a job, with `output` and `receipt` or with `error`; LostLease where it is another's.

        A job that is to be cancelled by now ends so, whatever became of it.
        """
        now = time.time()
        self._end(job, status, completed_at=now, **values)
        if status == "completed" and job.attempt == 1 and job.claimed_at is not None:
            self._learn(job.id, now - job.claimed_at)
        for name, stage in (values.get("receipt") or {}).get("stages", {}).items():
            with self._write() as db:
                db.execute(
                    "INSERT INTO stages VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "
                    "seconds = seconds + excluded.seconds, calls = calls + excluded.calls",
                    (name, stage["seconds"], stage["calls"]),
                )

    def _learn(self, job_id: str, seconds: float) -> None:
        """Take note of what a job took that was made without a break."""
        with self._write() as db:
            row = db.execute("SELECT model, estimate FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None or not row["estimate"]:
                return
            key = row["model"], size_of(row["estimate"])
            old = db.execute("SELECT pace FROM paces WHERE model = ? AND size = ?", key).fetchone()
            found = learned(None if old is None else old["pace"], seconds, row["estimate"])
            db.execute("INSERT OR REPLACE INTO paces VALUES (?, ?, ?)", (*key, found))

    def _end(self, job: Job, status: str, **values: Any) -> None:
        plain = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in values.items()}
        columns = "".join(f", {name} = ?" for name in plain)
        done = ", progress = 100" if status == "completed" else ""
        with self._write() as db:
            row = db.execute(
                f"UPDATE jobs SET status = CASE WHEN cancel THEN 'cancelled' ELSE ? END{done}{columns} "
                "WHERE id = ? AND attempt = ? AND status = 'in_progress' RETURNING deleted, status",
                (status, *plain.values(), job.id, job.attempt),
            ).fetchone()
        if row is None:
            raise LostLease(job.id)
        if row["status"] in TERMINAL:
            self._remove(job.id) if row["deleted"] else self.tidy(job.id, values.get("output") or {})


WORKER_HUNG = json.dumps({"code": "worker_hung", "message": f"{MAX_HANGS} workers hung over the same step of this job"})
WORKER_LOST = json.dumps(
    {"code": "worker_lost", "message": f"{MAX_LOSSES} workers died over this job without taking a step further"}
)


def uptime() -> float:
    """Return the seconds since this machine started, for leases: nobody sets this clock, and no process has its own."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def new_id(kind: str) -> str:
    """Return a fresh id, such as video_ and 32 hexadecimal digits."""
    return f"{kind}_{secrets.token_hex(16)}"
