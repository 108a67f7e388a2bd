"""Requests that nobody would think of, drawn from the server's own document: none of them is a fault of the server."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")

import schemathesis

from tests.serving import TINY, Server

WAITING = ("/v1/videos/sync", "/v1/images/generations", "/v1/images/edits")  # they answer when all is made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("fuzz") / "served", "--max-queue", "2", "--max-seconds", "60")
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def operations(server: Server) -> list[Any]:
    server.until(lambda: server.http.post("/v1/plan", json=TINY).status_code == 200)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = [each.ok() for each in schema.get_all_operations()]
    assert len(found) >= 25 and all(found)
    return [each for each in found if each.path not in WAITING]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(data=st.data())
def test_no_request_is_a_fault(server: Server, operations: list[Any], data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(operations))
    mode = data.draw(st.sampled_from(list(schemathesis.GenerationMode)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = data.draw(operation.as_strategy(generation_mode=mode))
        answer = case.call(timeout=60)
    assert answer.status_code < 500, (case.as_curl_command(), answer.content[:500], server.log()[-2000:])
    if answer.status_code >= 400 and case.method != "HEAD":
        error = answer.json()["error"]
        assert error["message"] and error["type"] and error["code"], answer.content


def test_what_would_take_too_long_is_refused(server: Server, operations: list[Any]) -> None:
    fields = {"prompt": "a ball", "num_inference_steps": 1000, "num_frames": 397}
    for video in server.http.get("/v1/videos", params={"status": "queued,in_progress", "limit": 100}).json()["data"]:
        server.http.delete(f"/v1/videos/{video['id']}")  # the queue takes two
    answer = server.until(lambda: (found := server.http.post("/v1/videos", json=fields)).status_code != 429 and found)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "too_long", answer.text
