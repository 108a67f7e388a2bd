"""Makes a job with the pipeline, and tells the store how far it is; its disk may be full, its memory short."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import runtime
from runtime.certificates import Signer
from runtime.checkpoints import Checkpoints
from runtime.decoding import out_of_memory
from runtime.denoising import Cancelled
from runtime.previews import preview
from runtime.provenance import Input, generation, inputs_of, sealing
from runtime.serve.database import Job, sync
from runtime.serve.errors import disk_full
from runtime.serve.jobs import Store
from runtime.serve.loaded import Loaded
from runtime.serve.moderation import Moderator, Refused, Rule, keep
from runtime.serve.pictures import write_sheets
from runtime.serve.records import loras_of, request_of
from runtime.trace import recording, span

log = logging.getLogger("runtime.serve.maker")

BEAT_SECONDS = 0.1  # least time between two reports of one job
LOOK_SECONDS = 0.5  # between two looks whether there is space

Found = TypeVar("Found")
speaking = threading.Lock()


class Stopping(Exception):
    """Raised between two steps where a job is to be given back: the process ends, or a shorter job comes first."""


class Maker:
    """What one process makes with the models that it holds."""

    def __init__(
        self,
        store: Store,
        models: Loaded,
        *,
        signer: Signer | None,
        rules: Sequence[Rule],
        full_wait: float,
    ) -> None:
        self.store, self.models, self.signer, self.full_wait = store, models, signer, full_wait
        self.moderator = Moderator(rules)
        self.stopping = threading.Event()  # set where the process is to end at the next step

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
            return self.make(job, self.models.model(job.model, loras_of(job.request)))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0][:200]
        log.warning("job %s ran out of memory (%s) and goes on with weights and tiles that come and go", job.id, reason)
        try:
            request = request_of(job.request, self.store.folder(job.id))
            return self.make(job, self.models.squeezed(job.model, request, loras_of(job.request)))
        except ValueError as error:
            raise MemoryError(str(error)) from error  # the planner's word on what would fit
        finally:
            self.models.pop(job.model, None)

    def make(self, job: Job, model: runtime.Model) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (output, receipt) of a job whose files are written."""
        folder = self.store.folder(job.id)
        folder.mkdir(exist_ok=True)
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
        receipt["loras"] = loras_of(job.request)
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
        if self.maker.store.pressing(self.job, each * (total - step), self.maker.models.places):
            self.checkpoints.write()
            raise Stopping
        told = self.tell(round(90 * step / total), last=step == total)
        if told and not self.maker.moderator.checks("frames"):  # nobody has looked at these
            model, asked = self.maker.models[self.job.model], self.job.request
            frame = {name: asked[name] for name in ("fps", "height", "width")}
            try:
                preview(model, estimate, **frame).save(self.folder / "preview.gif")
            except OSError as error:
                if not disk_full(error):  # a look less is no reason to fail: what the job needs waits for space
                    raise

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
