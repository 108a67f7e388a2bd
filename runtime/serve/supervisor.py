"""The supervisor: starts worker processes, starts them again when they die, and ends them."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time

from runtime.serve.jobs import Store, new_id
from runtime.serve.settings import Settings

log = logging.getLogger("runtime.serve.supervisor")

MAX_PAUSE = 30.0  # between two starts of a worker that does not live


class Supervisor:
    """Keeps `settings.workers` workers alive, each watched by a thread."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.stopping = threading.Event()
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.ready: set[int] = set()
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
            code = process.wait()
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
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )

    def wake(self) -> None:
        """Tell the workers that there is work."""
        for process in list(self.processes.values()):
            if process.poll() is None and process.stdin is not None:
                try:
                    process.stdin.write("work\n")
                except (BrokenPipeError, ValueError):
                    continue  # it is dying; its watcher starts another

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
