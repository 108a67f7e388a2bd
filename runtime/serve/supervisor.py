"""The supervisor: starts worker processes, starts them again when they die or hang, and ends them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from runtime.serve.jobs import Store, new_id
from runtime.serve.settings import Settings
from runtime.serve.watchdog import Pulse

log = logging.getLogger("runtime.serve.supervisor")

WORKER = (sys.executable, "-m", "runtime.serve.worker")
MAX_PAUSE = 30.0  # between two starts of a worker that does not live
DUMP_SECONDS = 1.0  # for a hung worker to write where it stands
ANSWER_SECONDS = 120.0
MAX_QUESTIONS = 16  # at a time
MAX_LINES = 64  # that a worker has not read yet


class Unanswered(Exception):
    """Raised where a worker does not answer a question, or refuses to: `code` and its words."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Child:
    """One worker process; its standard input is how it learns of work, and of our end."""

    def __init__(self, settings: Settings) -> None:
        self.name, self.pulse, self.hung = new_id("worker"), Pulse(settings.hang), False
        command = [*WORKER, "--data", str(settings.data), "--name", self.name, "--device", settings.device]
        command += ["--engine", settings.engine, "--dtype", settings.dtype, "--precision", settings.precision]
        command += ["--warm", settings.warm]
        command += ["--log", settings.log]
        command += ["--grace", str(settings.grace), "--full-wait", str(settings.full_wait)]
        command += ["--max-seconds", str(settings.max_seconds)]
        for model in settings.model:
            command += ["--model", model]
        for lora in settings.lora:
            command += ["--lora", lora]
        if settings.moderation:
            command += ["--moderation", json.dumps([rule.record() for rule in settings.moderation])]
        if not settings.credentials:
            command.append("--no-credentials")
        elif settings.certificate is not None:
            command += ["--certificate", str(settings.certificate), "--private-key", str(settings.private_key)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        self.lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        threading.Thread(target=self.write, daemon=True).start()

    def write(self) -> None:
        """Hand lines on: in a thread of its own, so that a frozen worker freezes nobody else."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as stream:
            while (line := self.lines.get()) is not None:
                stream.write(f"{line}\n")

    def send(self, line: str | None) -> bool:
        """Send a line, None as the last; False where the worker has not read those before."""
        with suppress(queue.Full):
            self.lines.put_nowait(line)
            return True
        return False

    def end(self) -> None:
        """Let it end at its next step."""
        while not self.send(None):
            with suppress(queue.Empty):
                self.lines.get_nowait()

    def kill(self) -> None:
        """Kill it and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill_told(self) -> None:
        """Let it write where it stands, and kill it."""
        with suppress(subprocess.TimeoutExpired):
            self.process.send_signal(signal.SIGUSR1)
            self.process.wait(DUMP_SECONDS)
        self.kill()


class Supervisor:
    """Keeps `settings.workers` workers alive, each read by a thread, all looked after by another."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.stopping = threading.Event()
        self.children: dict[int, Child] = {}
        self.ready: set[int] = set()
        self.questions: dict[str, tuple[int, Future[dict[str, Any]]]] = {}
        self.threads = [
            threading.Thread(target=self.keep, args=(place,), daemon=True) for place in range(settings.workers)
        ]
        self.threads.append(threading.Thread(target=self.watch, daemon=True))

    def start(self) -> None:
        """Start all."""
        for thread in self.threads:
            thread.start()

    def keep(self, place: int) -> None:
        """Start one worker again and again, with growing pauses where it does not get ready."""
        pause = 0.1
        while not self.stopping.is_set():
            began = time.monotonic()
            child = self.children[place] = Child(self.settings)
            if self.stopping.is_set():
                child.end()
            was_ready = self.read(place, child, began)
            code = child.process.wait()
            child.end()
            child.kill()  # what it had started
            self.ready.discard(place)
            self.forget(place)
            if self.stopping.is_set():
                return
            self.reclaim(child)
            pause = 0.1 if was_ready else min(2 * pause, MAX_PAUSE)
            log.error("worker %d ended with code %d; it is started again in %.1f s", place, code, pause)
            self.stopping.wait(pause)

    def read(self, place: int, child: Child, began: float) -> bool:
        """Take what a worker says until it ends; return whether it was ready."""
        was_ready = False
        assert child.process.stdout is not None
        for line in child.process.stdout:
            if line.startswith("{"):
                self.told(json.loads(line))
                continue
            child.pulse.hear(line.strip())
            if line.strip() == "ready":
                was_ready = True
                self.ready.add(place)
                log.info("worker %d is ready after %.1f s", place, time.monotonic() - began)
        return was_ready

    def reclaim(self, child: Child) -> None:
        """Take back the job of a worker that is dead."""
        try:
            self.store.reclaim(hung=child.name if child.hung else None)
        except sqlite3.Error as error:  # a full disk, say: workers reclaim as well, as soon as the store can be written
            log.error("the job of a dead worker cannot be taken back yet: %s", error)

    def watch(self) -> None:
        """End the workers that hang."""
        while not self.stopping.wait(self.settings.hang / 20):
            for place, child in list(self.children.items()):
                if child.pulse.hung() and not child.hung:
                    child.hung = True
                    self.ready.discard(place)
                    log.error("worker %d has given no sign for %.1f s and is killed", place, child.pulse.limit())
                    threading.Thread(target=child.kill_told, daemon=True).start()

    def wake(self) -> None:
        """Tell the workers that there is work."""
        for child in list(self.children.values()):
            child.send("work")  # one that has not read the last word of it will

    async def ask(self, kind: str, model: str, **asked: Any) -> dict[str, Any]:
        """Return what a worker answers to a question; Unanswered where none does, or it refuses to."""
        place = next(iter(self.ready), None)
        if place is None:
            raise Unanswered("not_ready", "no worker is ready")
        if len(self.questions) >= MAX_QUESTIONS:
            raise Unanswered("busy", "too many plans and prompts are asked for at once")
        number, answer = new_id("question"), Future[dict[str, Any]]()
        self.questions[number] = place, answer
        try:
            if not self.children[place].send(json.dumps({"id": number, "kind": kind, "model": model, **asked})):
                raise TimeoutError
            found = await asyncio.wait_for(asyncio.wrap_future(answer), ANSWER_SECONDS)
        except TimeoutError as error:
            raise Unanswered("not_ready", "no worker answers") from error
        finally:
            del self.questions[number]
        if "error" in found:
            raise Unanswered(found["error"]["code"], found["error"]["message"])
        return found["found"]

    def told(self, found: dict[str, Any]) -> None:
        """Hand an answer to whom it is for."""
        if (waiting := self.questions.get(found["id"])) is not None:
            with suppress(InvalidStateError):  # who asked has gone away
                waiting[1].set_result(found)

    def forget(self, place: int) -> None:
        """Tell those who wait for an answer of a worker that it is gone."""
        for number, (asked, _) in list(self.questions.items()):
            if asked == place:
                self.told({"id": number, "error": {"code": "not_ready", "message": "the worker ended"}})

    def stop(self) -> None:
        """Ask all to keep a checkpoint and end; returns at once."""
        self.stopping.set()
        for child in list(self.children.values()):
            child.end()

    def wait(self, seconds: float) -> None:
        """Wait for the end of all, and kill what is left after `seconds`."""
        until = time.monotonic() + seconds
        for child in list(self.children.values()):
            try:
                child.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("a worker takes more than %.0f s to end and is killed; its job goes on later", seconds)
                child.kill_told()
                child.process.wait()

    def abandon(self) -> None:
        """Kill all at once: their jobs go on later from their checkpoints."""
        for child in list(self.children.values()):
            child.kill()
