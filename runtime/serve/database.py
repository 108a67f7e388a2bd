"""The sqlite file of a data folder: its tables, its versions, and how it is opened and written."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")

MOST_PAGES = 10_000  # of the log, before a write brings them into the file where nobody else has
ACTIVE = ("queued", "in_progress")
TERMINAL = ("completed", "failed", "cancelled")

# What leads from each version of the file to the next; one that was let out never changes, the next goes behind it.
VERSIONS = (
    """
CREATE TABLE jobs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, owner TEXT NOT NULL,
  status TEXT NOT NULL DEFAULT 'queued', model TEXT NOT NULL, prompt TEXT NOT NULL, priority INTEGER NOT NULL,
  request TEXT NOT NULL, shown TEXT NOT NULL, parent TEXT, created_at REAL NOT NULL, started_at REAL,
  completed_at REAL, estimate REAL, attempt INTEGER NOT NULL DEFAULT 0, losses INTEGER NOT NULL DEFAULT 0,
  worker TEXT, lease_until REAL, cancel INTEGER NOT NULL DEFAULT 0, deleted INTEGER NOT NULL DEFAULT 0,
  step INTEGER NOT NULL DEFAULT 0, total INTEGER NOT NULL DEFAULT 0, progress INTEGER NOT NULL DEFAULT 0,
  error TEXT, output TEXT, receipt TEXT, idempotency TEXT, digest TEXT, UNIQUE (owner, idempotency));
CREATE INDEX jobs_by_status ON jobs (status, priority, seq);
CREATE TABLE owners (name TEXT PRIMARY KEY, share REAL NOT NULL DEFAULT 0);
CREATE TABLE models (name TEXT PRIMARY KEY, card TEXT NOT NULL);
CREATE TABLE stages (name TEXT PRIMARY KEY, seconds REAL NOT NULL, calls INTEGER NOT NULL)
""",
    # until when a deleted job can be restored
    "ALTER TABLE jobs ADD COLUMN purge_at REAL; CREATE INDEX jobs_to_purge ON jobs (purge_at) WHERE deleted",
    # what the operator's rules refused; a prompt has no job
    """
CREATE TABLE refusals (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, owner TEXT NOT NULL, job TEXT, stage TEXT NOT NULL,
  rule TEXT NOT NULL, code TEXT NOT NULL, reason TEXT NOT NULL, prompt TEXT NOT NULL)
""",
    "CREATE TABLE characters (id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, created_at REAL NOT NULL, "
    "clip TEXT NOT NULL)",
    # what a forecast knows of a job: predicted seconds of its steps, when and at which step its worker took it, and
    # when the last step was told of; and of all jobs, what they took by what was predicted
    "ALTER TABLE jobs ADD COLUMN denoising REAL; ALTER TABLE jobs ADD COLUMN claimed_at REAL; "
    "ALTER TABLE jobs ADD COLUMN claimed_step INTEGER; ALTER TABLE jobs ADD COLUMN stepped_at REAL; "
    "ALTER TABLE jobs ADD COLUMN expired INTEGER NOT NULL DEFAULT 0; "
    "CREATE TABLE paces (model TEXT NOT NULL, size INTEGER NOT NULL, pace REAL NOT NULL, PRIMARY KEY (model, size))",
    # who is to be told of a job's end: when the next try is due, None once it is told
    "ALTER TABLE jobs ADD COLUMN webhook_url TEXT; ALTER TABLE jobs ADD COLUMN webhook_due REAL; "
    "ALTER TABLE jobs ADD COLUMN webhook_tries INTEGER NOT NULL DEFAULT 0; "
    "CREATE INDEX jobs_to_tell ON jobs (webhook_due) WHERE webhook_due IS NOT NULL",
    # the span that asked for a job, as a traceparent
    "ALTER TABLE jobs ADD COLUMN trace TEXT",
)


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
    trace: str | None  # the traceparent of the span that asked for it

    @classmethod
    def of(cls, row: sqlite3.Row) -> Job:
        """Return the job in a row."""
        values = dict(row)
        for name in ("request", "shown", "error", "output", "receipt"):
            values[name] = json.loads(values[name]) if values[name] else None
        return cls(**values)


class Database:
    """The file, open twice: one connection reads, one writes; any number of processes on one machine may open it."""

    def __init__(self, data: Path) -> None:
        self.data = data
        for name in ("jobs", "workers", "characters"):
            (data / name).mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._asked: deque[tuple[Callable[[sqlite3.Connection], Any], Future[Any]]] = deque()
        self._writer = self._connect()
        self._writer.execute(f"PRAGMA wal_autocheckpoint = {MOST_PAGES}")
        self._reader = self._connect()
        with self._write() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > len(VERSIONS):
                raise ValueError(
                    f"{data / 'store.db'} was written by a newer version (format {version}; this one knows "
                    f"{len(VERSIONS)}); update, or name another data folder"
                )
            for change in VERSIONS[version:]:
                for statement in change.split(";"):
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {len(VERSIONS)}")

    def _connect(self) -> sqlite3.Connection:
        file = self.data / "store.db"
        try:
            db = sqlite3.connect(file, isolation_level=None, timeout=10, check_same_thread=False)
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"{file} cannot be opened ({error}); name another data folder") from error
            raise ValueError(f"{file} is damaged ({error}); move it away, or name another data folder") from error
        return db

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self._writer.close()

    def checkpoint(self) -> None:
        """Bring what was written from the log into the file itself, so that no write has to stop for it."""
        with closing(self._connect()) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    @contextmanager
    def _write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction; what need not be `durable` costs no wait for the disk, and is lost only with the power."""
        with self._lock:
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    def _write_together(self, act: Callable[[sqlite3.Connection], Found]) -> Found:
        """Return what `act` does, durable; acts of threads that wait share a transaction, so one wait for the disk."""
        mine: Future[Found] = Future()
        self._asked.append((act, mine))
        with self._turn:
            if not mine.done():  # else it was in the transaction of the one before
                asked = [self._asked.popleft() for _ in range(len(self._asked))]
                try:
                    with self._write() as db:
                        found = [each(db) for each, _ in asked]
                except BaseException as error:
                    for _, answer in asked:
                        answer.set_exception(error)
                else:
                    for (_, answer), result in zip(asked, found, strict=True):
                        answer.set_result(result)
        return mine.result()


def sync(folder: Path) -> None:
    """Make the files in a folder, and the folder itself, durable."""
    for path in (*folder.iterdir(), folder, folder.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
