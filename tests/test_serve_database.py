"""The store's transactions: who waits for the disk waits together, and who fails is told."""

from __future__ import annotations

import shutil
import sqlite3
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runtime.serve.database import Database


def together(database: Database, acts: int, act: str) -> tuple[list[Future[Any]], int]:
    """Run acts in threads while another one has its turn; return them, and the transactions that they took."""
    commands: list[str] = []
    database._writer.set_trace_callback(commands.append)

    def one(number: int) -> int:
        return database._write_together(lambda db: db.execute(act, (f"{number}", "{}")).rowcount)

    with ThreadPoolExecutor(acts) as pool, database._turn:
        found = [pool.submit(one, number) for number in range(acts)]
        while len(database._asked) < acts:
            time.sleep(0.001)
    database._writer.set_trace_callback(None)
    return found, sum(command.startswith("BEGIN") for command in commands)


def test_who_waits_writes_together(tmp_path: Path) -> None:
    database = Database(tmp_path)
    found, transactions = together(database, 16, "INSERT INTO models VALUES (?, ?)")
    assert [each.result() for each in found] == [1] * 16 and transactions == 1
    again = Database(tmp_path)
    assert again._reader.execute("SELECT count(*) FROM models").fetchone()[0] == 16
    again.close()
    database.close()


def test_all_that_wrote_together_are_told_of_a_failure(tmp_path: Path) -> None:
    database = Database(tmp_path)
    found, _ = together(database, 8, "INSERT INTO nothing VALUES (?, ?)")
    for each in found:
        with pytest.raises(sqlite3.OperationalError, match="nothing"):
            each.result()
    assert database._write_together(lambda db: db.execute("SELECT 1").fetchone()[0]) == 1, "the next goes on"
    database.close()


def test_what_was_written_comes_into_the_file_itself(tmp_path: Path) -> None:
    database = Database(tmp_path / "own")
    found, _ = together(database, 3, "INSERT INTO models VALUES (?, ?)")
    assert len(found) == 3
    database.checkpoint()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "own" / "store.db", alone)  # without its log
    copy = Database(alone)
    assert copy._reader.execute("SELECT count(*) FROM models").fetchone()[0] == 3
    copy.close()
    database.close()
