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
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

import runtime
from runtime.calibration import local
from runtime.certificates import Signer, find_signer
from runtime.checkpoints import Checkpoints
from runtime.decoding import out_of_memory
from runtime.denoising import Cancelled
from runtime.machine import host_memory
from runtime.model import choose_device
from runtime.offload import give_back_memory
from runtime.planner import foresee_plan, load_within
from runtime.previews import preview
from runtime.provenance import Input, generation, inputs_of, sealing
from runtime.serve.answers import answer, planned
from runtime.serve.database import sync
from runtime.serve.errors import disk_full
from runtime.serve.jobs import Job, LostLease, Store
from runtime.serve.logs import job_id, start_logging
from runtime.serve.moderation import Moderator, Refused, Rule, keep
from runtime.serve.pictures import write_sheets
from runtime.serve.records import request_of
from runtime.serve.settings import model_place
from runtime.trace import recording, span

log = logging.getLogger("runtime.serve.worker")

IDLE_SECONDS = 0.5  # between two looks at the queue where nobody says that there is something
BEAT_SECONDS = 0.1  # least time between two reports of one job
RENEW_SECONDS = 5.0
LOOK_SECONDS = 0.5  # between two looks whether there is space
FORESEE_SECONDS = 0.1  # between two looks for jobs that nobody has predicted
SQUEEZE = 0.8  # of the free memory, for a job that ran out of it before
RESTART = 75  # exit code of a worker whose device cannot be trusted any more
BROKEN = 3  # exit code where a model cannot be loaded


Found = TypeVar("Found")
speaking = threading.Lock()


class Stopping(Exception):
    """Raised between two steps where a job is to be given back: the process ends, or a shorter job comes first."""


class Worker:
    """One process's loaded models and the job in its hands."""

    def __init__(
        self,
        store: Store,
        name: str,
        places: dict[str, str],
        device: str,
        *,
        signer: Signer | None,
        rules: Sequence[Rule],
        full_wait: float,
    ) -> None:
        self.store, self.name, self.places, self.device = store, name, places, device
        self.signer, self.full_wait = signer, full_wait
        self.moderator = Moderator(rules)
        self.models: dict[str, runtime.Model] = {}
        self.stopping, self.wake = threading.Event(), threading.Event()
        self.job: Job | None = None

    def stop(self) -> None:
        """Let the process end at the next step."""
        self.stopping.set()
        self.wake.set()

    def model(self, name: str) -> runtime.Model:
        """Return a model, loaded at first use and kept."""
        if name not in self.models:
            self.models[name] = runtime.load(self.places[name], device=self.device)
        return self.models[name]

    def work(self) -> None:
        """Take one job after the other until it is time to stop."""
        while not self.stopping.is_set():
            self.wake.clear()
            job = self.next_job()
            if job is None:
                self.wake.wait(IDLE_SECONDS)
                continue
            self.job = job
            job_id.set(job.id)
            say("job")
            try:
                self.run(job)
            except LostLease:
                log.warning("another has job %s by now, or it is gone", job.id)
            finally:
                self.job = None
                job_id.set("")
                say("idle")

    def next_job(self) -> Job | None:
        """Return the job whose turn it is; None where there is none, or the disk is full."""
        try:
            self.store.reclaim()
            return self.store.claim(self.name)
        except sqlite3.OperationalError as error:
            if not disk_full(error):
                raise
            return None

    def with_space(self, act: Callable[[], Found], seconds: float) -> Found:
        """Do something that writes; where the disk is full, again and again for some seconds or until the end."""
        until, told = time.monotonic() + seconds, False
        while True:
            try:
                return act()
            except (OSError, sqlite3.OperationalError) as error:
                if not disk_full(error) or time.monotonic() > until or self.stopping.is_set():
                    raise
                if not told:
                    log.warning("the disk is full (%s): waiting up to %g s for space", error, seconds)
            told = True
            say("step")
            self.stopping.wait(LOOK_SECONDS)

    def renew(self) -> None:
        """Keep the lease of the job in hand, however long a step takes: a hung process is the supervisor's to end."""
        while not self.stopping.wait(RENEW_SECONDS):
            if (job := self.job) is not None:
                with suppress(sqlite3.OperationalError):  # a full disk: whoever could take the job cannot write either
                    self.store.renew(job)

    def foresee(self) -> None:
        """Predict what is queued, also while a job is made; a model that is not loaded yet is predicted later."""
        while not self.stopping.wait(FORESEE_SECONDS):
            for job in self.store.unestimated():
                if job.model in self.models:
                    with suppress(sqlite3.OperationalError):  # a full disk
                        self.estimate(job)

    def estimate(self, job: Job) -> None:
        """Predict a job's seconds by the planner, once the machine is measured; what cannot fit counts nothing."""
        try:
            model = self.models[job.model]
            request, plan = planned(model, request_of(job.request, self.store.folder(job.id)))
            found = foresee_plan(model, request, plan)
        except (ValueError, OSError) as error:
            log.warning("job %s cannot be predicted: %s", job.id, error)
            self.store.estimate(job, 0.0)
        else:
            if found is not None:
                self.store.estimate(job, found.seconds["total"], found.seconds["denoise"])

    def run(self, job: Job) -> None:
        """Make one job, and say what became of it."""
        began = time.monotonic()
        log.info("job %s: attempt %d from step %d", job.id, job.attempt, job.step)
        try:
            output, receipt = self.make_or_squeeze(job)
        except Cancelled:
            self.end(job, "cancelled")
            give_back_memory()
        except Stopping:
            self.with_space(lambda: self.store.release(job), 0)
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
        self.with_space(lambda: self.store.finish(job, status, **values), math.inf)

    def make_or_squeeze(self, job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
        """Make a job; where memory runs out, once more with as little on the device as the planner finds fitting."""
        try:
            return self.make(job)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0][:200]
        log.warning("job %s ran out of memory (%s) and goes on with weights and tiles that come and go", job.id, reason)
        self.models.pop(job.model)
        give_back_memory()
        try:
            request = request_of(job.request, self.store.folder(job.id))
            memory = f"{SQUEEZE * free_memory(self.device) / 2**20:.0f}MiB"
            self.models[job.model] = load_within(self.places[job.model], request, memory=memory, device=self.device)
            return self.make(job)
        except ValueError as error:
            raise MemoryError(str(error)) from error  # the planner's word on what would fit
        finally:
            self.models.pop(job.model, None)

    def make(self, job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (output, receipt) of a job whose files are written."""
        folder = self.store.folder(job.id)
        model = self.model(job.model)
        request = request_of(job.request, folder)
        checkpoints = Patient(self, folder, f"{job.id} {model.fingerprint} {json.dumps(job.request, sort_keys=True)}")
        report = Report(self, job, folder, checkpoints)
        video = runtime.generate(model, request, on_step=report.step, checkpoints=checkpoints)
        path = folder / f"output-{job.attempt}.{'png' if job.kind == 'image' else 'mp4'}"

        def write() -> dict[str, str]:
            with recording(video.receipt.stages), span("save"):
                video.save(path, on_frame=report.frame, seal=self.seal(path.name, video, request))
            self.moderate(job, path, [job.prompt, *video.receipt.expanded.values()])
            sheets = {} if job.kind == "image" else write_sheets(path)
            sync(folder)
            return sheets

        sheets = self.with_space(write, self.full_wait)
        own = json.dumps(f"{folder}/", ensure_ascii=False)[1:-1]
        receipt = json.loads(video.receipt.to_json().replace(own, ""))  # nobody learns where files lie
        if receipt["request"]["expand"]:
            del receipt["request"]["expand"]["url"]
        return {"file": path.name, "bytes": path.stat().st_size, **sheets}, receipt

    def moderate(self, job: Job, path: Path, texts: list[str]) -> None:
        """Refused where the operator's rules refuse what a prompt was written out to, or a result; then it is gone."""
        try:
            self.moderator.check_prompt(texts[1:])
            self.moderator.check_frames(path, texts)
        except Refused as error:
            path.unlink()
            keep(self.store, error, owner=job.owner, prompt=job.prompt, job=job.id)
            raise

    def seal(self, title: str, video: runtime.Video, request: runtime.Request) -> Callable[[Path], None] | None:
        """Return what signs a result, its inputs named; None where nobody is to."""
        if self.signer is None:
            return None
        inputs = [as_sent(each) for each in inputs_of(request)]
        return sealing(title, generation(video.receipt, request), inputs, self.signer)


class Patient(Checkpoints):
    """Checkpoints that wait for space on a full disk."""

    def __init__(self, worker: Worker, folder: Path, key: str) -> None:
        super().__init__(folder, key)
        self.worker = worker

    def write(self) -> None:
        """Write the newest state now, or as soon as it can be."""
        self.worker.with_space(super().write, self.worker.full_wait)


class Report:
    """Tells the store how far a job is, and stops it where it is to end."""

    def __init__(self, worker: Worker, job: Job, folder: Path, checkpoints: Checkpoints) -> None:
        self.worker, self.job, self.folder, self.checkpoints = worker, job, folder, checkpoints
        self.told = 0.0
        self.steps = (job.step, max(job.total, 1))
        self.began, self.first = 0.0, 0  # when and after which step the first one of this attempt was done

    def step(self, step: int, total: int, latents: Any, estimate: Any) -> None:
        """Report a step, with a look at what is coming; give way to a much shorter job that presses."""
        say("step")
        self.steps = step, total
        if not self.began:
            self.began, self.first = time.monotonic(), step
        each = (time.monotonic() - self.began) / max(step - self.first, 1)
        if self.worker.store.pressing(self.job, each * (total - step)):
            self.checkpoints.write()
            raise Stopping
        if self.tell(round(90 * step / total), last=step == total):
            shown = self.worker.models[self.job.model]
            if not self.worker.moderator.checks("frames"):  # nobody has looked at these
                preview(shown, estimate).save(self.folder / "preview.gif")

    def frame(self, done: int, total: int) -> None:
        """Report a frame that is written."""
        say("step")
        self.tell(90 + round(9 * done / total))

    def tell(self, progress: int, *, last: bool = False) -> bool:
        """Report where it is time to; Cancelled where the job shall end, Stopping where the process shall."""
        if self.worker.stopping.is_set():
            self.checkpoints.write()
            raise Stopping
        if not last and time.monotonic() - self.told < BEAT_SECONDS:
            return False
        beat = partial(self.worker.store.beat, self.job, *self.steps, progress)
        if self.worker.with_space(beat, self.worker.full_wait):
            raise Cancelled
        self.told = time.monotonic()
        return True


def as_sent(given: Input) -> Input:
    """Return an input as it was uploaded, where it was converted: what it says of its own origin is in there."""
    sent = given.path.with_suffix("")
    return Input(sent, given.relation) if sent.is_file() else given


def say(line: str) -> None:
    """Tell the supervisor something: an answer, or a sign of life."""
    with suppress(BrokenPipeError), speaking:  # where it is gone, so are we at the next step
        print(line, flush=True)


def free_memory(device: str) -> int:
    """Return the bytes that are free on the device that a model is loaded to."""
    if choose_device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(choose_device(device))[0])
    return host_memory()


def explain(error: Exception) -> dict[str, str]:
    """Return the API's error of an exception; what is a fault of ours is told by its kind alone."""
    if isinstance(error, Refused):
        return {"code": error.code, "message": str(error)}
    if out_of_memory(error):
        return {"code": "out_of_memory", "message": "out of memory; ask for a smaller size or fewer frames"}
    if disk_full(error):
        return {"code": "insufficient_storage", "message": "the disk of the server is full"}
    if isinstance(error, ValueError):
        return {"code": "invalid_request", "message": str(error)}
    return {"code": "internal_error", "message": f"{type(error).__name__} while making the video; the log says more"}


def card(model: runtime.Model) -> dict[str, Any]:
    """Return what the server needs to know of a model."""
    return {"spec": asdict(model.spec), "fingerprint": model.fingerprint, "device": str(model.device)}


def hold_lock(data: Path, name: str) -> IO[str]:
    """Return the locked file that says this worker is alive; the lock goes with the process, however it ends."""
    handle = (data / "workers" / name).open("w")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def listen(worker: Worker, grace: float) -> None:
    """Wake the worker at each line on standard input, answer those that ask; where it ends let the worker stop, and end
    it after `grace` seconds."""

    def reply(line: str) -> None:
        say(answer(worker.models, line))

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
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-credentials", action="store_true")
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--private-key", type=Path)
    parser.add_argument(
        "--moderation", type=json.loads, default=[], metavar="JSON", help="rules, as Rule.record has them"
    )
    parser.add_argument("--grace", type=float, default=20.0)
    parser.add_argument("--full-wait", type=float, default=60.0)
    parser.add_argument("--log", default="text")
    options = parser.parse_args()
    start_logging(options.log)
    faulthandler.register(signal.SIGUSR1)  # the supervisor asks a hung worker where it stands
    signer = None
    if not options.no_credentials:
        signer = find_signer(options.certificate, options.private_key, options.data / "credentials")
    rules = [Rule.of(table) for table in options.moderation]
    places = dict(map(model_place, options.model))
    worker = Worker(
        Store(options.data), options.name, places, options.device,
        signer=signer, rules=rules, full_wait=options.full_wait,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides
    lock = hold_lock(options.data, options.name)
    threading.Thread(target=listen, args=(worker, options.grace), daemon=True).start()
    for beside in (worker.renew, worker.foresee):
        threading.Thread(target=beside, daemon=True).start()
    try:
        for name in places:
            worker.store.tell_model(name, card(worker.model(name)))
    except (ValueError, OSError) as error:
        log.error("a model cannot be loaded: %s", error)
        return BROKEN
    say("ready")
    for model in worker.models.values():
        local(model.device, model.dtype)  # measured once on a machine, before a job could disturb it
    worker.work()
    lock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
