"""A started server, beyond what OpenAI's clients ask: plans, prompts, formats, drafts, parts of clips, undo, events."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import av
import pytest
from PIL import Image

pytest.importorskip("fastapi")

from runtime.expansion import by_rules
from runtime.model import DEMO
from runtime.models import open_checkpoint
from tests.serving import LONG, TINY, Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("data") / "served")
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def video(server: Server) -> dict[str, Any]:
    return server.done(server.create()["id"])


def frames_in(content: bytes) -> int:
    with av.open(io.BytesIO(content)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_plan(server: Server, video: dict[str, Any]) -> None:
    def plan(**fields: Any) -> dict[str, Any]:
        answer = server.http.post("/v1/plan", json=TINY | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    server.until(lambda: server.http.post("/v1/plan", json=TINY).status_code == 200)  # the machine is measured
    small, large = plan(), plan(num_inference_steps=20)
    assert small["predicted"]["fits"] and small["num_frames"] == 5 and small["queue_position"] == 0
    ratio = large["predicted"]["seconds"]["denoise"] / small["predicted"]["seconds"]["denoise"]
    assert 7 < ratio < 11, "ten times the steps, and what is projected once"
    own = {"id": video["id"]}
    longer = plan(video=own, direction="forward", num_frames=40, window=17)
    assert longer["num_frames"] == 45 and longer["predicted"]["windows"] > 1
    softly = plan(video=own, strength=0.5, num_frames=None, num_inference_steps=20)
    assert softly["predicted"]["seconds"]["denoise"] < 0.8 * large["predicted"]["seconds"]["denoise"]
    assert server.http.post("/v1/plan", json=TINY | {"size": "1x1"}).status_code == 400
    assert not list((server.data / "jobs").glob("plan_*"))


def test_an_expanded_prompt(server: Server) -> None:
    answer = server.http.post("/v1/prompts/expand", json={"prompt": "a red ball"})
    rules = open_checkpoint(DEMO).spec.expansion
    assert answer.status_code == 200, answer.text
    assert answer.json()["expanded"] == by_rules("a red ball", rules) != "a red ball"
    job = server.done(server.create(TINY | {"expand_prompt": True})["id"])
    assert job["prompt"] == "a red ball" and job["receipt"]["expanded"] == {"a red ball": answer.json()["expanded"]}
    for body in ({}, {"prompt": " "}, {"prompt": "x", "seed": 1}):
        assert server.http.post("/v1/prompts/expand", json=body).status_code == 400


def test_formats(server: Server, video: dict[str, Any]) -> None:
    path = f"/v1/videos/{video['id']}/content"
    for kind, media in (("webm", "video/webm"), ("gif", "image/gif"), ("mp4", "video/mp4")):
        answer = server.http.get(path, params={"format": kind, "download": "true"})
        assert answer.headers["content-type"] == media and frames_in(answer.content) == 5
        assert answer.headers["content-disposition"].startswith("attachment")
        assert server.http.get(path, params={"format": kind}).content == answer.content
    assert server.http.get(path, params={"format": "avi"}).json()["error"]["param"] == "format"
    sheet = Image.open(io.BytesIO(server.http.get(path, params={"variant": "spritesheet"}).content))
    told = server.video(video["id"])["spritesheet"]
    assert (sheet.width, sheet.height) == (told["columns"] * told["width"], told["rows"] * told["height"])
    assert told["frames"] == 5


def test_a_draft_is_finished(server: Server, video: dict[str, Any]) -> None:
    draft = server.done(server.create(TINY | {"quality": "draft", "num_inference_steps": 10})["id"])
    assert draft["quality"] == "draft" and draft["num_inference_steps"] == 2
    final = server.create({"size": "96x96", "num_inference_steps": 4}, f"/v1/videos/{draft['id']}/finish")
    assert final["prompt"] == draft["prompt"] and final["seed"] == draft["seed"]
    assert final["remixed_from_video_id"] == draft["id"]
    found = server.done(final["id"])
    assert (found["size"], found["num_frames"], found["quality"]) == ("96x96", 5, "standard")
    answer = server.http.post(f"/v1/videos/{video['id']}/finish", json={})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "not_a_draft"


def test_parts_of_clips(server: Server, video: dict[str, Any]) -> None:
    few, own = {"prompt": "a ball", "num_inference_steps": 2}, {"id": video["id"]}
    made = {
        7: ({"video": own | {"from": 1, "to": 4}, "num_frames": 4}, "/v1/videos/extensions"),
        3: ({"video": own, "clip": {"from": 2}, "num_inference_steps": 4}, "/v1/videos/edits"),
        12: ({"videos": [own | {"to": 3}, own], "num_frames": 4}, "/v1/videos/connections"),
    }  # fmt: skip
    for count, (fields, path) in made.items():
        job = server.done(server.create(few | fields, path)["id"])
        assert job["num_frames"] == count == frames_in(server.content(job["id"]))
    for part in ({"from": 5}, {"from": -1}, {"to": 6}, {"from": 3, "to": 3}, {"form": 1}, [1, 2], "2-3"):
        fields = few | {"video": own, "clip": part}
        answer = server.http.post("/v1/videos/edits", json=fields)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "clip", (part, answer.text)


def test_filters_and_undo(server: Server) -> None:
    def ids(**filters: str) -> list[str]:
        answer = server.http.get("/v1/videos", params=filters)
        assert answer.status_code == 200, answer.text
        return [each["id"] for each in answer.json()["data"]]

    job = server.create(TINY | {"prompt": "100% Ultramarine"})["id"]
    assert ids(search="100% ultra") == [job] and ids(search="100%% ultra") == []
    server.done(job)
    assert job in ids(status="completed,failed") and job not in ids(status="queued")
    assert server.http.get("/v1/videos", params={"status": "done"}).status_code == 400
    content = server.content(job)
    assert server.http.delete(f"/v1/videos/{job}", params={"undo": 60}).json()["deleted"]
    assert server.http.get(f"/v1/videos/{job}").status_code == 404 and job not in ids()
    assert server.http.post(f"/v1/videos/{job}/restore").json()["status"] == "completed"
    assert server.content(job) == content
    assert server.http.post(f"/v1/videos/{job}/restore").status_code == 404
    server.http.delete(f"/v1/videos/{job}", params={"undo": 0.1})
    server.until(lambda: not (server.data / "jobs" / job).exists())
    assert server.http.post(f"/v1/videos/{job}/restore").status_code == 404


def events_of(server: Server, job: str, last: str = "") -> Iterator[dict[str, str]]:
    headers = {"last-event-id": last} if last else {}
    with server.http.stream("GET", f"/v1/videos/{job}/events", headers=headers) as answer:
        event: dict[str, str] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if not line:
                yield event
                event = {}
            else:
                event[name] = value


def test_events_go_on(server: Server) -> None:
    job = server.create(LONG)["id"]
    waiting = server.create(LONG)["id"]
    server.until(lambda: server.video(job)["step"] > 2)
    first = next(events_of(server, waiting))
    again = events_of(server, job)
    seen = next(event for event in again if event.get("event") == "preview")
    again.close()
    more = events_of(server, job, seen["id"])
    assert all(next(more)["id"] != seen["id"] for _ in range(3))
    more.close()
    assert json.loads(first["data"])["queue_position"] == 0
    for each in (job, waiting):
        server.http.post(f"/v1/videos/{each}/cancel")
    last = list(events_of(server, waiting, first["id"]))[-1]
    assert last["event"] == "done" and json.loads(last["data"])["status"] == "cancelled"
    stop = server.http.get(f"/v1/videos/{waiting}/events", headers={"last-event-id": last["id"]})
    assert stop.status_code == 204
