"""Makes a job with the pipeline, and tells the store how far it is; its disk may be full, its memory short."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import runtime
from runtime.certificates import Signer
from runtime.checkpoints import Checkpoints
from runtime.decoding import out_of_memory
from runtime.denoising import Cancelled
from runtime.machine import host_memory
from runtime.model import choose_device
from runtime.offload import give_back_memory
from runtime.planner import load_within
from runtime.previews import preview
from runtime.provenance import Input, generation, inputs_of, sealing
from runtime.serve.database import Job, sync
from runtime.serve.errors import disk_full
from runtime.serve.jobs import Store
from runtime.serve.moderation import Moderator, Refused, Rule, keep
from runtime.serve.pictures import write_sheets
from runtime.serve.records import request_of
from runtime.trace import recording, span

log = logging.getLogger("runtime.serve.maker")

BEAT_SECONDS = 0.1  # least time between two reports of one job
LOOK_SECONDS = 0.5  # between two looks whether there is space
SQUEEZE = 0.8  # of the free memory, for a job that ran out of it before

Found = TypeVar("Found")
speaking = threading.Lock()


class Stopping(Exception):
    """Raised between two steps where a job is to be given back: the process ends, or a shorter job comes first."""


class Maker:
    """The loaded models of one process, and what it makes with them."""

    def __init__(
        self,
        store: Store,
        places: Mapping[str, str],
        device: str,
        *,
        signer: Signer | None,
        rules: Sequence[Rule],
        full_wait: float,
    ) -> None:
        self.store, self.places, self.device = store, places, device
        self.signer, self.full_wait = signer, full_wait
        self.moderator = Moderator(rules)
        self.models: dict[str, runtime.Model] = {}
        self.stopping = threading.Event()  # set where the process is to end at the next step

    def model(self, name: str) -> runtime.Model:
        """Return a model, loaded at first use and kept."""
        if name not in self.models:
            self.models[name] = runtime.load(self.places[name], device=self.device)
        return self.models[name]

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

    def __init__(self, maker: Maker, folder: Path, key: str) -> None:
        super().__init__(folder, key)
        self.maker = maker

    def write(self) -> None:
        """Write the newest state now, or as soon as it can be."""
        self.maker.with_space(super().write, self.maker.full_wait)


class Report:
    """Tells the store how far a job is, and stops it where it is to end."""

    def __init__(self, maker: Maker, job: Job, folder: Path, checkpoints: Checkpoints) -> None:
        self.maker, self.job, self.folder, self.checkpoints = maker, job, folder, checkpoints
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
        if self.maker.store.pressing(self.job, each * (total - step)):
            self.checkpoints.write()
            raise Stopping
        if self.tell(round(90 * step / total), last=step == total):
            shown = self.maker.models[self.job.model]
            if not self.maker.moderator.checks("frames"):  # nobody has looked at these
                preview(shown, estimate).save(self.folder / "preview.gif")

    def frame(self, done: int, total: int) -> None:
        """Report a frame that is written."""
        say("step")
        self.tell(90 + round(9 * done / total))

    def tell(self, progress: int, *, last: bool = False) -> bool:
        """Report where it is time to; Cancelled where the job shall end, Stopping where the process shall."""
        if self.maker.stopping.is_set():
            self.checkpoints.write()
            raise Stopping
        if not last and time.monotonic() - self.told < BEAT_SECONDS:
            return False
        beat = partial(self.maker.store.beat, self.job, *self.steps, progress)
        if self.maker.with_space(beat, self.maker.full_wait):
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
