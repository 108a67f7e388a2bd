"""Log lines, to read or as JSON, each with the request and the job that it is about."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="")
job_id: ContextVar[str] = ContextVar("job_id", default="")

IDS = {"request": request_id, "job": job_id}
PLAIN = "%(asctime)s %(levelname)s %(name)s %(message)s"


class Lines(logging.Formatter):
    """A line to read, with the ids behind it."""

    def format(self, record: logging.LogRecord) -> str:
        ids = [value for variable in IDS.values() if (value := variable.get())]
        return " ".join([super().format(record), *(f"[{value}]" for value in ids)])


class JsonLines(logging.Formatter):
    """A line as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        line["message"] = record.getMessage()
        line |= {name: value for name, variable in IDS.items() if (value := variable.get())}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging(kind: str) -> None:
    """Write log lines to standard error, as "text" or "json"."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if kind == "json" else Lines(PLAIN))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
