"""What all paths share: the store, the settings, whether something new can be taken, and how a job is taken."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request

from runtime.serve.admission import Admission
from runtime.serve.characters import Characters
from runtime.serve.database import ACTIVE, TERMINAL, Job, sync
from runtime.serve.errors import ApiError, bad, missing, no_space
from runtime.serve.fetching import check, fetch_inputs
from runtime.serve.fields import structured
from runtime.serve.forecast import Outlook
from runtime.serve.forms import Upload, read_body
from runtime.serve.inputs import Found, cut_of, linked, read_upload
from runtime.serve.jobs import Store, new_id
from runtime.serve.keys import Pace
from runtime.serve.metrics import Metrics
from runtime.serve.moderation import Moderator, Refused, keep
from runtime.serve.schema import Asked, Given, Offer, check_frame, parse_request
from runtime.serve.settings import Settings
from runtime.serve.shown import shown, video_object
from runtime.serve.supervisor import Unanswered
from runtime.serve.telemetry import Telemetry

log = logging.getLogger("runtime.serve.api")

SHAPE = re.compile(r"video_[0-9a-f]{32}")
OUTLOOK_SECONDS = 0.2  # how old a forecast may be
OUTLOOK_REST = 20  # times what a look takes, until the next: a long queue costs 5 % of the time at most
LOOK_SECONDS = 0.1  # between two looks at a job that somebody waits for


class Api:
    """What all routes share: the store, the settings, and whether the server is ending."""

    def __init__(self, settings: Settings, store: Store, wake: Callable[[], None]) -> None:
        self.settings, self.store, self.wake = settings, store, wake
        self.paces = Pace()
        self.admission = Admission(settings.max_seconds, store)
        self.moderator = Moderator(settings.moderation)
        self.characters = Characters(settings.data)
        self._outlooks: dict[str, Outlook] = {}
        self._look_at = -math.inf  # when to look again
        self.draining = False
        self.taking: set[str] = set()  # jobs that hold a place in the queue already, with or without a row yet
        self.metrics = Metrics(store)
        self.ready: Callable[[], bool] = lambda: False
        self.answer: Callable[..., Awaitable[dict[str, Any]]] = nobody
        self.telemetry: Telemetry | None = None
        self.anchors: bytes | None = None  # certificates that vouch for what this server makes

    def accepting(self) -> None:
        """ApiError where nothing new can be taken now."""
        if self.draining:
            raise ApiError(503, "the server is ending", code="shutting_down", retry_after=5)
        if self.short():
            raise no_space()
        self.loaded()
        self.check_queue()

    def well(self) -> bool:
        """Tell whether new jobs can be taken and made: a worker lives, the disk has space, and this is not the end."""
        return not self.draining and self.ready() and not self.short()

    def short(self) -> bool:
        """Tell whether the disk has less space than jobs are taken with."""
        return shutil.disk_usage(self.settings.data).free < self.settings.min_free

    def loaded(self) -> None:
        """ApiError where no worker has told of a model yet."""
        if not self.models():
            raise ApiError(503, "no model is loaded yet", code="not_ready", retry_after=1)

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what workers have told of the models that are served, the first one first."""
        told = self.store.models()
        return {name: told[name] for name in self.settings.served if name in told}

    async def ask(self, kind: str, model: str, **asked: Any) -> dict[str, Any]:
        """Return what a worker answers; ApiError where none does, or it refuses to."""
        try:
            return await self.answer(kind, model, **asked)
        except Unanswered as error:
            status = {"not_ready": 503, "busy": 429, "refused": 400}.get(error.code, 500)
            raise ApiError(
                status, str(error), code=error.code, retry_after=1 if status in (429, 503) else None
            ) from error

    def pace(self, owner: str) -> None:
        """ApiError where a key asks for more jobs in a minute than it may."""
        limit = self.settings.limits(owner).per_minute
        if limit is not None and (seconds := self.paces.wait(owner, limit)):
            raise ApiError(
                429, f"this key may ask for {limit} jobs a minute", code="rate_limit_exceeded", retry_after=seconds
            )

    def check_queue(self) -> None:
        """ApiError where the queue is full, or will be with the jobs that are being taken."""
        if self.store.active(self.settings.served, besides=self.taking) + len(self.taking) >= self.settings.max_queue:
            raise self.full()

    @contextmanager
    def place(self, job_id: str) -> Iterator[None]:
        """Hold a place in the queue for a job whose body is there, so that more than fit cost little."""
        self.check_queue()
        self.taking.add(job_id)
        try:
            yield
        finally:
            self.taking.discard(job_id)

    def full(self) -> ApiError:
        """Return the error of a full queue: come again when the first job that is running is done."""
        known = list(self.outlooks().values())
        running = [each.done for each in known if each.wait == 0.0 and each.done is not None]
        return ApiError(
            429, "the queue is full", code="queue_full", retry_after=min(max(min(running, default=1.0), 1.0), 120.0)
        )

    def outlooks(self) -> dict[str, Outlook]:
        """Return what lies before each job, a moment old at most."""
        began = time.monotonic()
        if began > self._look_at:
            self._outlooks = self.store.outlooks(self.settings.workers, self.settings.served)
            now = time.monotonic()
            self._look_at = now + max(OUTLOOK_SECONDS, OUTLOOK_REST * (now - began))
        return self._outlooks

    def object(self, job: Job) -> dict[str, Any]:
        """Return a job as the API tells of it."""
        found = video_object(job, self.outlook(job), self.settings.keep)
        if job.status == "queued" and job.model not in self.settings.served:
            found["warnings"] = [f"model {job.model!r} is not served here now; the job waits until it is again"]
        if job.status == "in_progress" and job.step and not self.moderator.checks("frames"):
            found["preview_url"] = f"/v1/videos/{job.id}/content?variant=preview"
        return found

    def outlook(self, job: Job) -> Outlook | None:
        """Return what lies before a job, None where it ends or its model is not served; what came or began after the
        last look is right too."""
        if job.status not in ACTIVE or job.cancel or job.model not in self.settings.served:
            return None
        known = self.outlooks()
        found = known.get(job.id)
        if job.status == "in_progress" and (found is None or found.wait != 0.0):  # it began since
            known[job.id] = Outlook(0, 0.0, None if found is None else found.done)
        elif found is None:
            known[job.id] = Outlook(sum(each.wait != 0.0 for each in known.values()))
        return known[job.id]

    def job(self, request: Request, job_id: str) -> Job:
        """Return a video of the asking key; ApiError where there is none."""
        found = self.store.get(job_id) if SHAPE.fullmatch(job_id) else None
        if found is None or found.owner != request.state.owner:
            raise missing(f"video {job_id[:80]!r}")
        return found

    async def body(self, request: Request, own: Callable[[], Path]) -> dict[str, Any]:
        """Return the fields of a body; its files, and what its addresses stand for, lie in `own()`."""
        fields = await read_body(request, own, self.settings.max_upload)
        await fetch_inputs(fields, own, self.settings.fetching)
        return fields

    async def create(self, request: Request, verb: Callable[..., Any], kind: str = "video") -> Job:
        """Take a job: its files and its row are durable when this returns."""
        self.accepting()
        self.pace(request.state.owner)
        job_id = new_id("video" if kind == "video" else "image")
        folder = self.store.folder(job_id)

        def own() -> Path:
            folder.mkdir(exist_ok=True)
            return folder

        kept = False
        try:
            fields = await read_body(request, own, self.settings.max_upload)
            with self.place(job_id):
                job, digest = await self.take(request, verb, kind, job_id, fields, own)
            kept = job.id == job_id
        finally:
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)
        if not kept and job.digest != digest:
            raise ApiError(422, "this Idempotency-Key was used for another request", code="idempotency_key_reused")
        self.wake()
        log.info("job %s is taken", job.id)
        return job

    async def take(
        self,
        request: Request,
        verb: Callable[..., Any],
        kind: str,
        job_id: str,
        fields: dict[str, Any],
        own: Callable[[], Path],
    ) -> tuple[Job, str | None]:
        """Return (job, digest of what was asked where it has an idempotency key) of a body's fields."""
        key = request.headers.get("idempotency-key")
        digest = await asyncio.to_thread(fingerprint, request.url.path, fields) if key else None
        await fetch_inputs(fields, own, self.settings.fetching)
        told = self.webhook(fields)
        parent, asked = await asyncio.to_thread(verb, fields, own)
        if kind == "video":
            check_frame(asked)
        await self.moderate(request.state.owner, [asked.request.prompt, *(c.prompt for c in asked.request.storyboard)])
        folder = self.store.folder(job_id)
        await self.admission.check(self.answer, asked, folder)
        values = row(job_id, kind, request.state.owner, asked) | {"parent": parent} | told
        if key:
            values |= {"idempotency": key[:256], "digest": digest}
        return await asyncio.to_thread(self.keep, folder, values), digest

    async def moderate(self, owner: str, texts: list[str]) -> None:
        """ApiError where the operator's rules refuse what is to be shown; the refusal is kept."""
        if not self.moderator.checks("prompt"):
            return
        try:
            await asyncio.to_thread(self.moderator.check_prompt, texts)
        except Refused as error:
            await asyncio.to_thread(keep, self.store, error, owner=owner, prompt="\n".join(texts))
            if error.code == "moderation_unavailable":
                raise ApiError(503, str(error), code=error.code, retry_after=5) from error
            raise bad(str(error), "prompt", error.code) from error

    def webhook(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Take who is to be told of the end out of the fields; ApiError for whom the operator does not list."""
        url = fields.pop("webhook_url", None)
        if url is None:
            return {}
        if not self.settings.webhook_host:
            raise bad("webhook_url is given, and this server tells nobody; ask for the video's events", "webhook_url")
        try:
            check(str(url), self.settings.webhooks)
        except ValueError as error:
            raise bad(f"webhook_url: {error}", "webhook_url") from error
        return {"webhook_url": str(url), "webhook_due": 0.0}

    def keep(self, folder: Path, values: dict[str, Any]) -> Job:
        """Add a job to the store; ApiError where the queue is full."""
        if folder.exists():  # something lies in it
            sync(folder)
        limit = self.settings.limits(values["owner"])
        values["trace"] = None if self.telemetry is None else self.telemetry.here()
        job = self.store.create(
            values, max_queue=self.settings.max_queue, max_owner=limit.jobs or 0, models=self.settings.served
        )
        if job is None:
            raise self.full()
        return job

    def parsed(
        self,
        request: Request,
        fields: dict[str, Any],
        own: Callable[[], Path],
        clips: Sequence[Found],
        references: Sequence[Found] = (),
    ) -> Asked:
        """Return the checked request of fields, and of clips and pictures that come before those in the fields."""
        offer = Offer(self.models(), self.settings.expansion)

        def read(value: Any, name: str) -> Found:
            return self.clip(request, value, name, own)[0]

        return parse_request(fields, offer, Given(read, clips, references))

    def clip(
        self, request: Request, value: Any, name: str, own: Callable[[], Path]
    ) -> tuple[dict[str, Any], str | None]:
        """Return (clip, id of its video or None) of {"id": ...}, or of an uploaded file."""
        value = structured(value, name) if isinstance(value, str) and value.startswith("{") else value
        if not (isinstance(value, dict) and isinstance(value.get("id"), str)):
            return read_upload(value, name, own), None
        source, clip, parent = self.character(request, value["id"]), None, None
        if source is not None:
            path, clip = source
        else:
            job = self.job(request, value["id"])
            path, parent = self.output(job, "video"), job.id
            width, _, height = job.shown["size"].partition("x")
            clip = {
                "file": f"{job.id}.mp4", "width": int(width), "height": int(height),
                "num_frames": job.shown["num_frames"], "fps": job.shown["fps"], "at": 0, "hold": 1.0,
            }  # fmt: skip
        linked(path, clip["file"], own())
        if part := {name: bound for name, bound in value.items() if name != "id"}:
            clip = cut_of(clip, part, name)
        return clip, parent

    def character(self, request: Request, character_id: str) -> tuple[Path, dict[str, Any]] | None:
        """Return (file, clip) of a character of the asking key; None where it is none's id."""
        found = self.characters.get(character_id, request.state.owner)
        return None if found is None else (self.characters.folder(found.id) / found.clip["file"], found.clip)

    def output(self, job: Job, variant: str) -> Path:
        """Return the file of a completed job; ApiError where it is not there."""
        if job.status in ("queued", "in_progress"):
            raise ApiError(409, f"the video is {job.status}; ask again when it is completed", code="video_not_ready")
        if job.status != "completed" or job.output is None:
            raise ApiError(404, f"the video is {job.status}; it has no content", code=f"video_{job.status}")
        if job.expired:
            raise ApiError(410, "the files of this video were kept for their time and are gone", code="expired")
        path = self.store.folder(job.id) / job.output["file" if variant == "video" else variant]
        if not path.is_file():
            self.store.fail(job, {"code": "output_missing", "message": "the file of this video is gone"})
            raise ApiError(404, "the file of this video is gone", code="output_missing")
        return path

    def preview(self, job: Job) -> Path:
        """Return the newest look at a job that is being made; ApiError where there is none."""
        path = self.store.folder(job.id) / "preview.gif"
        if not path.is_file():
            raise ApiError(404, "there is no preview of the video now", code="no_preview")
        return path

    async def wait(self, request: Request, job: Job) -> Job:
        """Return a job when it has ended; it is cancelled where the client does not wait."""
        while job.status not in TERMINAL:
            if await request.is_disconnected():
                await asyncio.to_thread(self.store.cancel, job.id)
                raise ClientDisconnect
            if self.draining:
                raise ApiError(
                    503, f"the server is ending; {job.id} goes on later", code="shutting_down", retry_after=5
                )
            await asyncio.sleep(LOOK_SECONDS)
            found = self.store.get(job.id)
            if found is None:
                raise missing(f"video {job.id}")
            job = found
        return job


async def nobody(*_: Any, **asked: Any) -> dict[str, Any]:
    """Answer nothing: no worker has been started."""
    raise Unanswered("not_ready", "no worker is ready")


def row(job_id: str, kind: str, owner: str, asked: Asked) -> dict[str, Any]:
    """Return the store's columns of a request."""
    return {
        "id": job_id, "kind": kind, "owner": owner, "model": asked.model, "prompt": asked.prompt,
        "priority": asked.priority, "request": asked.record, "shown": shown(asked),
        "total": (asked.request.steps or 1) * asked.windows,
    }  # fmt: skip


def fingerprint(path: str, fields: dict[str, Any]) -> str:
    """Return a hash of a path and its body, files by content."""

    def plain(value: Any) -> Any:
        if isinstance(value, Upload):
            with value.path.open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()
        return str(value)

    return hashlib.sha256((path + json.dumps(fields, sort_keys=True, default=plain)).encode()).hexdigest()
