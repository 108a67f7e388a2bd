"""The store: jobs, workers and models in one sqlite file.

A job is queued, in_progress, then completed, failed or cancelled for good; `leases` says how workers take it. Where
`models` are named, jobs of others, which nobody makes here, do not count (None: all do).
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from runtime.serve.database import ACTIVE, TERMINAL, Job
from runtime.serve.forecast import Outlook, forecast
from runtime.serve.leases import Leases, of


class Store(Leases):
    """The jobs of a data folder."""

    def create(
        self, values: Mapping[str, Any], *, max_queue: int, max_owner: int, models: Collection[str] | None = None
    ) -> Job | None:
        """Add a job, durable when this returns; the same job for an idempotency key that is known; None where full."""
        owner, columns = values["owner"], dict(values)
        for name in ("request", "shown"):
            columns[name] = json.dumps(columns[name])

        def add(db: sqlite3.Connection) -> sqlite3.Row | None:
            if values.get("idempotency"):
                same = db.execute(
                    "SELECT * FROM jobs WHERE owner = ? AND idempotency = ?", (owner, values["idempotency"])
                ).fetchone()
                if same is not None:
                    return same
            (waiting, mine) = db.execute(
                "SELECT count(*), coalesce(sum(owner = ?), 0) FROM jobs WHERE status IN ('queued', 'in_progress') "
                f"{of(models)}",
                (owner, *(models or ())),
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
            return db.execute(
                f"INSERT INTO jobs ({names}, created_at) VALUES ({'?, ' * len(columns)}?) RETURNING *",
                (*columns.values(), time.time()),
            ).fetchone()

        row = self._write_together(add)
        return None if row is None else Job.of(row)

    def get(self, job_id: str) -> Job | None:
        """Return a job; None where there is none, or it was deleted."""
        row = self._reader.execute("SELECT * FROM jobs WHERE id = ? AND NOT deleted", (job_id,)).fetchone()
        return None if row is None else Job.of(row)

    def kept(self, job_id: str) -> Job | None:
        """Return a job, also a deleted one while its files are kept; None where there is none."""
        row = self._reader.execute(
            "SELECT * FROM jobs WHERE id = ? AND (NOT deleted OR purge_at > ?)", (job_id, time.time())
        ).fetchone()
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

    def fail(self, job: Job, error: Mapping[str, Any]) -> None:
        """End a completed job whose result is gone."""
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET status = 'failed', error = ? WHERE id = ? AND status = 'completed'",
                (json.dumps(error), job.id),
            )

    def outlooks(self, workers: int, models: Collection[str] | None = None) -> dict[str, Outlook]:
        """Return what lies before each job that is queued or running."""
        rows = self._reader.execute(
            "SELECT id, seq, owner, status, model, priority, estimate, denoising, step, total, progress, claimed_at, "
            "claimed_step, stepped_at FROM jobs WHERE status IN ('queued', 'in_progress') AND NOT cancel "
            f"{of(models)}",
            (*(models or ()),),
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

    def active(self, models: Collection[str] | None = None, besides: Iterable[str] = ()) -> int:
        """Return how many jobs wait or are being made, `besides` those of some ids."""
        (count,) = self._reader.execute(
            "SELECT count(*) FROM jobs WHERE status IN ('queued', 'in_progress') "
            f"AND id NOT IN (SELECT value FROM json_each(?)) {of(models)}",
            (json.dumps(list(besides)), *(models or ())),
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

    def tell_model(self, name: str, card: Mapping[str, Any]) -> None:
        """Make the facts of a model known."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO models VALUES (?, ?)", (name, json.dumps(card)))

    def unestimated(self, models: Collection[str]) -> list[Job]:
        """Return queued and running jobs that nobody has predicted yet: an idle worker takes one at once."""
        rows = self._reader.execute(
            "SELECT * FROM jobs WHERE status IN ('queued', 'in_progress') AND estimate IS NULL "
            f"{of(models)} ORDER BY seq",
            (*models,),
        )
        return [Job.of(row) for row in rows.fetchall()]

    def estimate(self, job: Job, seconds: float, denoising: float = 0.0) -> None:
        """Keep a prediction: seconds in all, and those of them that go to the steps."""
        with self._write(durable=False) as db:
            db.execute("UPDATE jobs SET estimate = ?, denoising = ? WHERE id = ?", (seconds, denoising, job.id))


def new_id(kind: str) -> str:
    """Return a fresh id, such as video_ and 32 hexadecimal digits."""
    return f"{kind}_{secrets.token_hex(16)}"
