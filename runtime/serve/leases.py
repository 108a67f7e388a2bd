"""How a job changes hands: a worker takes it with a lease, renews that, and gives the job back or ends it.

Every write of a worker names the attempt that it was given: once another has the job, the first one's change nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from typing import Any

from runtime.serve.database import TERMINAL, Job
from runtime.serve.folders import Folders
from runtime.serve.forecast import PRESSING, learned, size_of

LEASE_SECONDS = 30.0
MAX_LOSSES = 3  # workers that may die over a job without taking a step further
MAX_HANGS = 2  # the same for workers that were killed because they hung

# First by priority, then whose owner has had least, then by age.
ORDER = "priority DESC, (SELECT share FROM owners WHERE name = owner), seq"


class LostLease(Exception):
    """Raised to a worker whose job is another's by now, or is gone."""


class Leases(Folders):
    """Who has which job."""

    def claim(self, worker: str, models: Collection[str] | None = None) -> Job | None:
        """Take the job whose turn it is, of these models (None: of any); None where there is none."""
        if self._reader.execute("SELECT 1 FROM jobs WHERE status = 'queued' AND NOT cancel").fetchone() is None:
            return None
        now = time.time()
        with self._write() as db:
            row = db.execute(
                "UPDATE jobs SET status = 'in_progress', attempt = attempt + 1, worker = ?, lease_until = ?, "
                "started_at = coalesce(started_at, ?), claimed_at = ?, claimed_step = step, stepped_at = NULL "
                "WHERE id = "
                f"(SELECT id FROM jobs WHERE status = 'queued' AND NOT cancel {of(models)} ORDER BY {ORDER} "
                "LIMIT 1) RETURNING *",
                (worker, uptime() + LEASE_SECONDS, now, now, *(models or ())),
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
        with self._write(durable=False) as db:
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
        with self._write(durable=False) as db:
            db.execute(
                "UPDATE jobs SET lease_until = ? WHERE id = ? AND attempt = ? AND status = 'in_progress'",
                (uptime() + LEASE_SECONDS, job.id, job.attempt),
            )

    def pressing(self, job: Job, left: float, models: Collection[str] | None = None) -> bool:
        """Tell whether a job of higher priority waits that takes at most a tenth of the `left` seconds of this one."""
        row = self._reader.execute(
            "SELECT 1 FROM jobs WHERE status = 'queued' AND NOT cancel AND priority > ? AND estimate * ? < ? "
            f"{of(models)} LIMIT 1",
            (job.priority, PRESSING, left, *(models or ())),
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
            with self._write(durable=False) as db:
                db.execute(
                    "INSERT INTO stages VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "
                    "seconds = seconds + excluded.seconds, calls = calls + excluded.calls",
                    (name, stage["seconds"], stage["calls"]),
                )

    def _learn(self, job_id: str, seconds: float) -> None:
        """Take note of what a job took that was made without a break."""
        with self._write(durable=False) as db:
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


WORKER_HUNG = json.dumps({"code": "worker_hung", "message": f"{MAX_HANGS} workers hung over the same step of this job"})
WORKER_LOST = json.dumps(
    {"code": "worker_lost", "message": f"{MAX_LOSSES} workers died over this job without taking a step further"}
)


def of(models: Collection[str] | None) -> str:
    """Return the condition that a job is of one of the models, which are its parameters."""
    return "" if models is None else f"AND model IN ({', '.join('?' * len(models))})"


def uptime() -> float:
    """Return the seconds since this machine started, for leases: nobody sets this clock, and no process has its own."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
