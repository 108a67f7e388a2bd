"""The worker: a process that takes jobs from the store, makes them with the pipeline, and can be killed at any moment.

It learns of new jobs by lines on its standard input, and where that ends it ends too, its job given back at the next
step. Nothing but lines of text and the store's rows passes between the processes.
"""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import json
import logging
import math
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import torch

from runtime.certificates import find_signer
from runtime.decoding import out_of_memory
from runtime.denoising import Cancelled
from runtime.lora import Lora
from runtime.model import Model, choose_device
from runtime.offload import give_back_memory
from runtime.planner import foresee
from runtime.prediction import Prediction
from runtime.serve.admission import TooLong, check_seconds
from runtime.serve.answers import answer, planned
from runtime.serve.database import Job
from runtime.serve.errors import disk_full
from runtime.serve.jobs import Store
from runtime.serve.leases import LostLease
from runtime.serve.loaded import Loaded
from runtime.serve.logs import job_id, start_logging
from runtime.serve.loras import lora_files
from runtime.serve.maker import Maker, Stopping, say
from runtime.serve.moderation import Refused, Rule
from runtime.serve.records import request_of
from runtime.serve.settings import model_place
from runtime.serve.telemetry import start_telemetry

log = logging.getLogger("runtime.serve.worker")

REST_SECONDS = 2.0  # without a job, before what can wait is done: a job that comes meanwhile waits for its end
IDLE_SECONDS = 0.5  # between two looks at the queue where nobody says that there is something
RENEW_SECONDS = 5.0
FORESEE_SECONDS = 0.1  # between two looks for jobs that nobody has predicted
NICE = 5  # of a worker that computes on the cores which the server answers from
COMPILING = 60.0  # seconds that an engine may take to make what a first step runs
RESTART = 75  # exit code of a worker whose device cannot be trusted any more
BROKEN = 3  # exit code where a model cannot be loaded


class Worker:
    """One process and the job in its hands."""

    def __init__(self, store: Store, name: str, maker: Maker, max_seconds: float = 0.0) -> None:
        self.store, self.name, self.maker, self.max_seconds = store, name, maker, max_seconds
        self.stopping, self.wake = maker.stopping, threading.Event()
        self.job: Job | None = None
        self.telemetry = start_telemetry()
        self.chores: list[Callable[[], object]] = []  # for when there is nothing else to do, each some seconds

    def stop(self) -> None:
        """Let the process end at the next step."""
        self.stopping.set()
        self.wake.set()

    def work(self) -> None:
        """Take one job after the other until it is time to stop."""
        busy = time.monotonic()
        while not self.stopping.is_set():
            self.wake.clear()
            job = self.next_job()
            if job is None:
                rested = time.monotonic() - busy > REST_SECONDS
                if not self.wake.wait(IDLE_SECONDS) and rested and self.chores and self.free():
                    self.do(self.chores.pop(0))
                continue
            self.job = job
            job_id.set(job.id)
            say("job")
            try:
                with nullcontext() if self.telemetry is None else self.telemetry.making(job):
                    self.run(job)
            except LostLease:
                log.warning("another has job %s by now, or it is gone", job.id)
            finally:
                self.job, busy = None, time.monotonic()
                job_id.set("")
                say("idle")

    def free(self) -> bool:
        """Tell whether nobody waits for what is made here."""
        return not self.store.active(self.maker.models.places)

    def do(self, chore: Callable[[], object]) -> None:
        """Do what can wait; where it fails, the first job that needs it says so."""
        try:
            chore()
        except (ValueError, OSError, RuntimeError):
            log.exception("what was to be done beforehand failed")

    def next_job(self) -> Job | None:
        """Return the job whose turn it is; None where there is none, or the disk is full."""
        try:
            self.store.reclaim()
            return self.store.claim(self.name, self.maker.models.places)
        except sqlite3.OperationalError as error:
            if not disk_full(error):
                raise
            return None

    def renew(self) -> None:
        """Keep the lease of the job in hand, however long a step takes: a hung process is the supervisor's to end."""
        while not self.stopping.wait(RENEW_SECONDS):
            if (job := self.job) is not None:
                with suppress(sqlite3.OperationalError):  # a full disk: whoever could take the job cannot write either
                    self.store.renew(job)

    def foresee(self) -> None:
        """Predict what is queued or just taken, also while a job is made; what is of no loaded model is left out."""
        while not self.stopping.wait(FORESEE_SECONDS):
            for job in self.store.unestimated(tuple(self.maker.models)):
                with suppress(sqlite3.OperationalError):  # a full disk
                    self.estimate(job)

    def estimate(self, job: Job) -> None:
        """Predict a job's seconds by the planner, once the machine is measured; what cannot fit counts nothing."""
        try:
            found = self.predicted(job)
        except (ValueError, OSError) as error:
            log.warning("job %s cannot be predicted: %s", job.id, error)
            self.store.estimate(job, 0.0)
        else:
            if found is not None:
                self.store.estimate(job, found.seconds["total"], found.seconds["denoise"])

    def predicted(self, job: Job) -> Prediction | None:
        """Return the planner's word on a job of a loaded model; None where the machine is not measured."""
        model = self.maker.models[job.model]
        return foresee(model, *planned(model, request_of(job.request, self.store.folder(job.id))))

    def look_ahead(self, job: Job) -> None:
        """Tell the supervisor when to expect the first step; TooLong for a job beyond the limit, which was taken while
        nobody could tell."""
        if (model := self.maker.models.get(job.model)) is None:
            return  # it is loaded anew, after memory ran out
        try:
            found = self.predicted(job)
        except (ValueError, OSError):
            return  # what cannot be made says so when it is
        if found is None:
            return
        say(f"first {until_first_step(found, model):.3f}")
        if not job.step:
            check_seconds(found.seconds["total"], job.model, self.max_seconds, self.store)

    def run(self, job: Job) -> None:
        """Make one job, and say what became of it."""
        began = time.monotonic()
        log.info("job %s: attempt %d from step %d", job.id, job.attempt, job.step)
        try:
            self.look_ahead(job)
            output, receipt = self.maker.make_or_squeeze(job)
        except Cancelled:
            self.end(job, "cancelled")
            give_back_memory()
        except Stopping:
            self.maker.with_space(lambda: self.store.release(job), 0)
        except LostLease:
            raise
        except Refused as error:
            self.end(job, "failed", error=explain(error))
        except torch.AcceleratorError as error:
            log.exception("job %s: the device cannot be trusted any more", job.id)
            raise SystemExit(RESTART) from error  # another process tries, and the supervisor counts how often
        except Exception as error:
            log.exception("job %s failed", job.id)
            self.end(job, "failed", error=explain(error))
            if out_of_memory(error):
                raise SystemExit(RESTART) from error
        else:
            self.end(job, "completed", output=output, receipt=receipt)
            log.info("job %s: completed in %.2f s", job.id, time.monotonic() - began)

    def end(self, job: Job, status: str, **values: Any) -> None:
        """End a job, as soon as the store can be written."""
        self.maker.with_space(lambda: self.store.finish(job, status, **values), math.inf)


def until_first_step(found: Prediction, model: Model) -> float:
    """Return the seconds that are foreseen before a job says that it is at work; engines that compile do so first."""
    seconds = found.seconds["text"] + found.seconds["encode"] + found.seconds["step"]
    return seconds + COMPILING * (model.engine != "eager")


def explain(error: Exception) -> dict[str, str]:
    """Return the API's error of an exception; what is a fault of ours is told by its kind alone."""
    if isinstance(error, TooLong):
        return {"code": "too_long", "message": str(error)}
    if isinstance(error, Refused):
        return {"code": error.code, "message": str(error)}
    if out_of_memory(error):
        return {"code": "out_of_memory", "message": "out of memory; ask for a smaller size or fewer frames"}
    if disk_full(error):
        return {"code": "insufficient_storage", "message": "the disk of the server is full"}
    if isinstance(error, ValueError):
        return {"code": "invalid_request", "message": str(error)}
    return {"code": "internal_error", "message": f"{type(error).__name__} while making the video; the log says more"}


def hold_lock(data: Path, name: str) -> IO[str]:
    """Return the locked file that says this worker is alive; the lock goes with the process, however it ends."""
    handle = (data / "workers" / name).open("w")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def listen(worker: Worker, grace: float) -> None:
    """Wake the worker at each line on standard input, answer those that ask; where it ends let the worker stop, and end
    it after `grace` seconds."""

    def reply(line: str) -> None:
        say(answer(worker.maker.models, line))

    for line in sys.stdin:
        if line.startswith("{"):
            threading.Thread(target=reply, args=(line,), daemon=True).start()
        else:
            worker.wake.set()
    faulthandler.dump_traceback_later(grace, exit=True)  # also where nothing of Python runs any more
    worker.stop()


def main() -> int:
    """Run the worker; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m runtime.serve.worker")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--precision", default="full")
    parser.add_argument("--warm", default="")
    parser.add_argument("--no-credentials", action="store_true")
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--private-key", type=Path)
    parser.add_argument(
        "--moderation", type=json.loads, default=[], metavar="JSON", help="rules, as Rule.record has them"
    )
    parser.add_argument("--grace", type=float, default=20.0)
    parser.add_argument("--full-wait", type=float, default=60.0)
    parser.add_argument("--max-seconds", type=float, default=0.0)
    parser.add_argument("--log", default="text")
    options = parser.parse_args()
    start_logging(options.log)
    if choose_device(options.device).type == "cpu":
        os.nice(NICE)
    faulthandler.register(signal.SIGUSR1)  # the supervisor asks a hung worker where it stands
    signer = None
    if not options.no_credentials:
        signer = find_signer(options.certificate, options.private_key, options.data / "credentials")
    rules = [Rule.of(table) for table in options.moderation]
    places, store = dict(map(model_place, options.model)), Store(options.data)
    models = Loaded(
        places, device=options.device, dtype=options.dtype, engine=options.engine, precision=options.precision
    )
    maker = Maker(store, models, signer=signer, rules=rules, full_wait=options.full_wait)
    worker = Worker(store, options.name, maker, options.max_seconds)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides
    lock = hold_lock(options.data, options.name)
    threading.Thread(target=listen, args=(worker, options.grace), daemon=True).start()
    for beside in (worker.renew, worker.foresee):
        threading.Thread(target=beside, daemon=True).start()
    try:
        models.loras = {name: [*map(Lora.parse, files)] for name, files in lora_files(options.lora).items()}
        for name in places:
            store.tell_model(name, models.card(name))
        models.check_loras()
        models.warm(options.warm)
    except (ValueError, OSError) as error:
        log.error("a model or LoRA cannot be loaded: %s", error)
        return BROKEN
    worker.chores = models.prepare()
    say("ready")
    worker.work()
    if worker.telemetry is not None:
        worker.telemetry.close()
    lock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
