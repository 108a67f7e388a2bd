"""OpenTelemetry (extra [telemetry]): a span for each request that asks for something, and for each stage of making it.

It is on where the standard variables name an endpoint (OTEL_EXPORTER_OTLP_ENDPOINT or ..._TRACES_ENDPOINT), and imports
nothing otherwise. Spans belong to the trace that a request's `traceparent` names; the store keeps that with the job.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from runtime.serve.database import Job

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger("runtime.serve.telemetry")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def start_telemetry(environ: Mapping[str, str] = os.environ) -> Telemetry | None:
    """Return what makes spans and exports them; None where nobody asks for it, or, with a warning, it is not there."""
    off = (
        environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    )
    if off or not any(environ.get(name) for name in ENDPOINTS):
        return None
    try:
        return Telemetry(named="OTEL_SERVICE_NAME" in environ)
    except ImportError as error:
        log.warning(
            'spans are asked for, and OpenTelemetry is not there (%s): pip install "dit-runtime[telemetry]"', error
        )
        return None


class Telemetry:
    """Makes spans, and exports them in a thread of its own."""

    def __init__(self, *, named: bool) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "dit-runtime"}))
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self.tracer = self.provider.get_tracer("dit-runtime")
        self.form = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Export what is left."""
        self.provider.shutdown()

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
        """Return the span of a request, as a context."""
        from opentelemetry.trace import SpanKind

        told = {"http.request.method": method, "url.path": path}
        parent = self.form.extract(headers)
        return self.tracer.start_as_current_span(f"{method} {path}", parent, SpanKind.SERVER, told)

    def here(self) -> str | None:
        """Return the `traceparent` of the span that is current."""
        found: dict[str, str] = {}
        self.form.inject(found)
        return found.get("traceparent")

    @contextmanager
    def making(self, job: Job) -> Iterator[None]:
        """Give an attempt at a job a span, with one for each stage, and its time in the queue one before it."""
        from runtime.trace import watched

        parent = self.form.extract({} if job.trace is None else {"traceparent": job.trace})
        facts: dict[str, Any] = {
            "dit.job": job.id,
            "dit.model": job.model,
            "dit.attempt": job.attempt,
            "dit.step": job.step,
        }
        facts |= {f"dit.{name}": job.shown[name] for name in ("size", "num_frames", "num_inference_steps", "task")}
        if job.attempt == 1 and job.claimed_at is not None:
            queue = self.tracer.start_span("queue", parent, attributes=facts, start_time=nanoseconds(job.created_at))
            queue.end(nanoseconds(job.claimed_at))
        with self.tracer.start_as_current_span("make", parent, attributes=facts), watched(self.stages()):
            yield

    def stages(self) -> Callable[[str, bool], None]:
        """Return what is to be told when a stage of this thread begins and ends: each is a span in that around it."""
        from opentelemetry.context import get_current
        from opentelemetry.trace import set_span_in_context

        thread, root = threading.get_ident(), get_current()
        open: list[tuple[str, Span]] = []

        def watch(name: str, entered: bool) -> None:
            if threading.get_ident() != thread:
                return
            if entered:
                around = set_span_in_context(open[-1][1], root) if open else root
                open.append((name, self.tracer.start_span(name, around)))
            else:  # the last of that name: what is made frame by frame need not end in turn
                index = max(i for i, (other, _) in enumerate(open) if other == name)
                open.pop(index)[1].end()

        return watch


class Traced:
    """The application, where requests that ask for something get a span."""

    def __init__(self, app: Any, telemetry: Telemetry) -> None:
        self.app, self.telemetry = app, telemetry

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        span: AbstractContextManager[Any] = nullcontext()
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            span = self.telemetry.request("POST", scope["path"][:200], headers)
        with span:
            await self.app(scope, receive, send)


def nanoseconds(seconds: float) -> int:
    """Return a time as spans tell it."""
    return int(seconds * 1e9)
