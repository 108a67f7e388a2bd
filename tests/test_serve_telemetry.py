"""Spans, as a receiver of OTLP gets them from a started server: in the trace that asked, one inside the other."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from runtime.serve.telemetry import start_telemetry
from tests.serving import LONG, TINY, Server

TRACE, ASKING = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAID = {"traceparent": f"00-{TRACE}-{ASKING}-01"}


class Receiver(ThreadingHTTPServer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.spans: list[Any] = []
        self.services: set[str] = set()


class Taking(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        found = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for each in found.resource_spans:
            self.server.services |= {a.value.string_value for a in each.resource.attributes if a.key == "service.name"}
            for scope in each.scope_spans:
                self.server.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield server
        server.shutdown()


def test_the_spans_of_a_video(receiver: Receiver, tmp_path: Path) -> None:
    server = Server(tmp_path / "data")
    film = server.create(LONG, headers=SAID)["id"]
    server.until(lambda: server.video(film)["step"] > 2)
    server.kill("both")
    server.start()
    server.until(lambda: server.video(film)["step"] > 10)
    server.http.delete(f"/v1/videos/{film}")
    made = server.create(TINY | {"prompt": "a ball that nobody has asked for"}, headers=SAID)["id"]
    server.done(made)
    assert server.http.post("/v1/videos", json=TINY | {"seed": 1}).status_code == 200  # of no trace
    assert server.stop() == 0

    def of(job: str) -> list[Any]:
        return [span for span in receiver.spans if any(each.value.string_value == job for each in span.attributes)]

    again, own = [span for span in of(film) if span.name == "make"], {span.name: span for span in of(made)}
    asking = [s for s in receiver.spans if s.name == "POST /v1/videos" and s.parent_span_id.hex() == ASKING]
    assert len(asking) >= 1 and receiver.services == {"dit-runtime"}
    assert {s.trace_id.hex() for s in (*own.values(), *again)} == {TRACE} and again, "also what goes on after a death"
    make, queue = own["make"], own["queue"]
    assert make.parent_span_id == queue.parent_span_id == asking[-1].span_id
    assert queue.end_time_unix_nano <= make.start_time_unix_nano
    inside = [span for span in receiver.spans if span.parent_span_id == make.span_id]
    assert {"text", "denoise", "decode", "save"} <= {each.name for each in inside} | {
        below.name for each in inside for below in receiver.spans if below.parent_span_id == each.span_id
    }
    (denoise,) = [each for each in inside if each.name == "denoise"]
    steps = [each for each in receiver.spans if each.parent_span_id == denoise.span_id and each.name == "denoise/step"]
    assert len(steps) == 2
    assert all(denoise.start_time_unix_nano <= s.start_time_unix_nano < s.end_time_unix_nano for s in steps)
    others = [s for s in receiver.spans if s.name == "POST /v1/videos" and s.trace_id.hex() != TRACE]
    assert len(others) == 1 and not others[0].parent_span_id


def test_nothing_is_imported_where_nobody_asks() -> None:
    code = (
        "import sys, runtime.serve.telemetry as t; assert t.start_telemetry({}) is None\n"
        "assert t.start_telemetry({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://x', 'OTEL_SDK_DISABLED': 'true'}) is None\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_it_is_told_that_the_extra_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with caplog.at_level(logging.WARNING):
        assert start_telemetry({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318"}) is None
    assert 'pip install "dit-runtime[telemetry]"' in caplog.text
