"""Characters: people and things that a key has shown to the server, for prompts of models that take such pictures."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.serve.database import Database

SHAPE = re.compile(r"char_[0-9a-f]{32}")


@dataclass(frozen=True)
class Character:
    """One row: its name, and the picture or clip that shows it."""

    id: str
    owner: str
    name: str
    created_at: float
    clip: dict[str, Any]


class Characters(Database):
    """The characters of a data folder."""

    def folder(self, character_id: str) -> Path:
        """Return the folder of a character's files."""
        return self.data / "characters" / character_id

    def add(self, character_id: str, owner: str, name: str, clip: dict[str, Any]) -> Character:
        """Add a character whose files are in its folder."""
        values = (character_id, owner, name, time.time(), json.dumps(clip))
        with self._write() as db:
            row = db.execute("INSERT INTO characters VALUES (?, ?, ?, ?, ?) RETURNING *", values).fetchone()
        return _of(row)

    def get(self, character_id: str, owner: str) -> Character | None:
        """Return a character of an owner; None where there is none."""
        if SHAPE.fullmatch(character_id) is None:
            return None
        row = self._reader.execute(
            "SELECT * FROM characters WHERE id = ? AND owner = ?", (character_id, owner)
        ).fetchone()
        return None if row is None else _of(row)

    def all(self, owner: str) -> list[Character]:
        """Return the characters of an owner, the newest first."""
        rows = self._reader.execute("SELECT * FROM characters WHERE owner = ? ORDER BY rowid DESC", (owner,))
        return [_of(row) for row in rows.fetchall()]

    def remove(self, character: Character) -> None:
        """Remove a character; what has been made with it stays."""
        with self._write() as db:
            db.execute("DELETE FROM characters WHERE id = ?", (character.id,))
        shutil.rmtree(self.folder(character.id), ignore_errors=True)


def _of(row: sqlite3.Row) -> Character:
    values = dict(row)
    return Character(**{**values, "clip": json.loads(values["clip"])})
