"""Webhooks: who asked to be told is told of a video's end, signed by the Standard Webhooks scheme, until it answers.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from runtime.serve.database import Database
from runtime.serve.fetching import Access, ask, shortened

log = logging.getLogger("runtime.serve.webhooks")

PAUSES = (5.0, 30.0, 120.0, 600.0, 3600.0, 4 * 3600.0)  # seconds after each try that failed
LOOK_SECONDS = 0.5
PREFIX = "whsec_"


class Webhooks(Database):
    """Tells of the ends of the jobs in a data folder."""

    def __init__(self, data: Path, access: Access, secret: bytes) -> None:
        super().__init__(data)
        self.access, self.secret = access, secret

    def run(self, stopping: threading.Event) -> None:
        """Tell of what has ended, until it is time to stop."""
        while not stopping.wait(LOOK_SECONDS):
            try:
                while (row := self.due()) is not None and not stopping.is_set():
                    self.tell(row)
            except sqlite3.OperationalError as error:
                log.warning("the store cannot be written: %s", error)

    def due(self) -> dict[str, Any] | None:
        """Return a job whose end is to be told now; the next try, should this one fail, is set already."""
        now = time.time()
        row = self._reader.execute(
            "SELECT id, webhook_tries FROM jobs WHERE webhook_due <= ? AND status IN ('completed', 'failed') LIMIT 1",
            (now,),
        ).fetchone()
        if row is None:
            return None
        tries = row["webhook_tries"]
        then = now + PAUSES[tries] if tries < len(PAUSES) else None
        with self._write() as db:
            taken = db.execute(
                "UPDATE jobs SET webhook_tries = webhook_tries + 1, webhook_due = ? WHERE id = ? AND webhook_tries = ? "
                "RETURNING id, status, webhook_url, completed_at",
                (then, row["id"], tries),
            ).fetchone()
        return None if taken is None else dict(taken)

    def tell(self, row: dict[str, Any]) -> None:
        """Tell of one end; who does not answer 2xx is told again later."""
        try:
            answer = ask("POST", row["webhook_url"], self.access, **signed(row, self.secret))
            if not 200 <= answer.status < 300:
                raise OSError(f"{shortened(row['webhook_url'])} answers {answer.status}")
        except (ValueError, OSError) as error:
            log.warning("the end of %s could not be told: %s", row["id"], error)
            return
        with self._write() as db:
            db.execute("UPDATE jobs SET webhook_due = NULL WHERE id = ?", (row["id"],))


def signed(row: dict[str, Any], secret: bytes) -> dict[str, Any]:
    """Return content and headers of what is told; a try more has the same id, so that nobody counts it twice."""
    number = "evt_" + hashlib.sha256(row["id"].encode()).hexdigest()[:32]
    body = {
        "id": number, "object": "event", "created_at": int(row["completed_at"]),
        "type": f"video.{row['status']}", "data": {"id": row["id"]},
    }  # fmt: skip
    content, stamp = json.dumps(body).encode(), str(int(time.time()))
    digest = hmac.new(secret, f"{number}.{stamp}.".encode() + content, hashlib.sha256).digest()
    headers = {
        "content-type": "application/json", "webhook-id": number, "webhook-timestamp": stamp,
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }  # fmt: skip
    return {"content": content, "headers": headers}


def read_secret(file: Path) -> bytes:
    """Return the secret in a file, whsec_ and base64, made where there is none; ValueError for what is no secret."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(PREFIX + base64.b64encode(secrets.token_bytes(32)).decode() + "\n")
        log.info("the secret of webhooks is in %s", file)
    text = file.read_text().strip()
    try:
        found = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except ValueError:
        found = b""
    if len(found) < 16:
        raise ValueError(f"{file} holds no secret of webhooks; legal: {PREFIX} and at least 16 bytes in base64")
    return found
