"""The supervisor: starts worker processes, starts them again when they die, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import Any

from runtime.serve.jobs import Store, new_id
from runtime.serve.settings import Settings

log = logging.getLogger("runtime.serve.supervisor")

MAX_PAUSE = 30.0  # between two starts of a worker that does not live
ANSWER_SECONDS = 120.0
MAX_QUESTIONS = 16  # at a time


class Unanswered(Exception):
    """Raised where a worker does not answer a question, or refuses to: `code` and its words."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Supervisor:
    """Keeps `settings.workers` workers alive, each watched by a thread."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.stopping = threading.Event()
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.ready: set[int] = set()
        self.questions: dict[str, tuple[int, Future[dict[str, Any]]]] = {}
        self.threads = [
            threading.Thread(target=self.keep, args=(place,), daemon=True) for place in range(settings.workers)
        ]

    def start(self) -> None:
        """Start all."""
        for thread in self.threads:
            thread.start()

    def keep(self, place: int) -> None:
        """Start one worker again and again, with growing pauses where it does not get ready."""
        pause = 0.1
        while not self.stopping.is_set():
            began = time.monotonic()
            process = self.spawn()
            self.processes[place] = process
            if self.stopping.is_set():
                self.end(process)
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == "ready":
                    self.ready.add(place)
                    log.info("worker %d is ready after %.1f s", place, time.monotonic() - began)
                elif line.startswith("{"):
                    self.told(json.loads(line))
            code = process.wait()
            self.forget(place)
            was_ready = place in self.ready
            self.ready.discard(place)
            if self.stopping.is_set():
                return
            self.store.reclaim()
            pause = 0.1 if was_ready else min(2 * pause, MAX_PAUSE)
            log.error("worker %d ended with code %d; it is started again in %.1f s", place, code, pause)
            self.stopping.wait(pause)

    def spawn(self) -> subprocess.Popen[str]:
        """Start one process; its standard input is how it learns of work, and of our end."""
        command = [sys.executable, "-m", "runtime.serve.worker", "--data", str(self.settings.data)]
        command += ["--name", new_id("worker"), "--device", self.settings.device]
        for name in self.settings.model:
            command += ["--model", name]
        if self.settings.moderation:
            command += ["--moderation", json.dumps([rule.record() for rule in self.settings.moderation])]
        if not self.settings.credentials:
            command.append("--no-credentials")
        elif self.settings.certificate is not None:
            command += [
                "--certificate",
                str(self.settings.certificate),
                "--private-key",
                str(self.settings.private_key),
            ]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )

    def wake(self) -> None:
        """Tell the workers that there is work."""
        for process in list(self.processes.values()):
            if process.poll() is None and process.stdin is not None:
                with contextlib.suppress(BrokenPipeError, ValueError):  # it is dying; its watcher starts another
                    process.stdin.write("work\n")

    async def ask(self, kind: str, model: str, **asked: Any) -> dict[str, Any]:
        """Return what a worker answers to a question; Unanswered where none does, or it refuses to."""
        place = next(iter(self.ready), None)
        process = None if place is None else self.processes[place]
        if place is None or process is None or process.stdin is None:
            raise Unanswered("not_ready", "no worker is ready")
        if len(self.questions) >= MAX_QUESTIONS:
            raise Unanswered("busy", "too many plans and prompts are asked for at once")
        number, answer = new_id("question"), Future[dict[str, Any]]()
        self.questions[number] = place, answer
        try:
            process.stdin.write(json.dumps({"id": number, "kind": kind, "model": model, **asked}) + "\n")
            found = await asyncio.wait_for(asyncio.wrap_future(answer), ANSWER_SECONDS)
        except (BrokenPipeError, ValueError, TimeoutError) as error:
            raise Unanswered("not_ready", "no worker answers") from error
        finally:
            del self.questions[number]
        if "error" in found:
            raise Unanswered(found["error"]["code"], found["error"]["message"])
        return found["found"]

    def told(self, found: dict[str, Any]) -> None:
        """Hand an answer to whom it is for."""
        if (waiting := self.questions.get(found["id"])) is not None:
            with contextlib.suppress(InvalidStateError):  # who asked has gone away
                waiting[1].set_result(found)

    def forget(self, place: int) -> None:
        """Tell those who wait for an answer of a worker that it is gone."""
        for number, (asked, _) in list(self.questions.items()):
            if asked == place:
                self.told({"id": number, "error": {"code": "not_ready", "message": "the worker ended"}})

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        """Let one end at its next step."""
        if process.stdin is not None and not process.stdin.closed:
            try:
                process.stdin.close()
            except BrokenPipeError:
                return  # it is gone already

    def stop(self) -> None:
        """Ask all to keep a checkpoint and end; returns at once."""
        self.stopping.set()
        for process in list(self.processes.values()):
            self.end(process)

    def wait(self, seconds: float) -> None:
        """Wait for the end of all, and kill what is left after `seconds`."""
        until = time.monotonic() + seconds
        for process in list(self.processes.values()):
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("a worker takes more than %.0f s to end and is killed; its job goes on later", seconds)
                process.kill()
                process.wait()
