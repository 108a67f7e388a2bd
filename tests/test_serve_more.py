"""A started server, beyond what OpenAI's clients ask: plans, prompts, formats, drafts, parts of clips, undo, events."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from time import time as time_time
from typing import Any, ClassVar

import av
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("fastapi")

from runtime.expansion import by_rules
from runtime.model import DEMO
from runtime.models import open_checkpoint
from runtime.serve import webhooks
from runtime.serve.fetching import Access
from runtime.serve.jobs import Store
from runtime.serve.webhooks import read_secret
from tests import published
from tests.serving import LONG, TINY, Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    control = tmp_path_factory.mktemp("control")
    published.write(published.Tiny(), control, published.control_pipeline)
    started = Server(
        tmp_path_factory.mktemp("data") / "served",
        "--model",
        "demo",
        "--model",
        f"control={control}",
        "--webhook-host",
        "127.0.0.1:*",
        "--log",
        "json",
    )
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def video(server: Server) -> dict[str, Any]:
    return server.done(server.create()["id"])


def pictures_in(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def frames_in(content: bytes) -> int:
    return len(pictures_in(content))


def test_a_plan(server: Server, video: dict[str, Any]) -> None:
    def plan(**fields: Any) -> dict[str, Any]:
        answer = server.http.post("/v1/plan", json=TINY | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

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


def test_a_part_of_a_result(server: Server, video: dict[str, Any]) -> None:
    path, folder = f"/v1/videos/{video['id']}/content", server.data / "jobs" / video["id"]
    for place in range(20):
        (folder / f"output-1-{place}-99.mp4").touch()
    part = server.http.get(path, params={"from": 1, "to": 4, "format": "mp4"})
    shown, whole = (pictures_in(content) for content in (part.content, server.http.get(path).content))
    assert len(shown) == 3 and np.abs(shown.astype(int) - whole[1:4]).mean() < 6
    assert len(list(folder.glob("output-1-*"))) == 8, "no more than so many parts are kept"
    said = server.http.post("/v1/provenance", files={"video": part.content}).json()
    assert said["state"] == "valid" and said["actions"] == ["c2pa.opened", "c2pa.edited"]
    assert frames_in(server.http.get(path, params={"from": 0, "to": 5}).content) == 5
    for wrong in ({"from": 4, "to": 4}, {"from": -1}, {"to": 6}, {"from": 1, "variant": "thumbnail"}, {"to": 10**30}):
        answer = server.http.get(path, params=wrong)
        assert answer.status_code == 400 and answer.json()["error"]["param"] in ("from", "to"), answer.text


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
    form = {"video[id]": video["id"], "clip[from]": "1", "prompt": "x", "extra_params": '{"num_inference_steps": 4}'}
    job = server.http.post("/v1/videos/edits", data=form, files={"user": (None, "me")}).json()
    assert (job["num_frames"], job["num_inference_steps"]) == (4, 4), job
    server.http.delete(f"/v1/videos/{job['id']}")
    ends = {"video[id]": video["id"], "end_video[id]": video["id"], "prompt": "x", "num_frames": "4"}
    job = server.http.post("/v1/videos", data=ends, files={"num_inference_steps": (None, "2")}).json()
    assert (job["task"], job["num_frames"]) == ("connect", 14), job
    server.http.delete(f"/v1/videos/{job['id']}")
    for path, fields, param in (
        ("/v1/videos", {"end_video": own}, "end_video"),
        ("/v1/videos/connections", {"video": own, "end_video": own, "videos": [own, own]}, "end_video"),
        ("/v1/videos/connections", {"video": own}, "videos"),
        ("/v1/videos/edits", {"video": own, "videos": [own, own]}, "videos"),
        ("/v1/videos", {"boundary_ratio": 0.5}, "boundary_ratio"),
    ):
        answer = server.http.post(path, json=few | fields)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, (path, answer.text)
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


def png(colour: str, size: tuple[int, int] = (64, 64), clear: bool = False) -> bytes:
    found = io.BytesIO()
    picture = Image.new("RGBA" if clear else "RGB", size, colour)
    if clear:
        picture.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    picture.save(found, "PNG")
    return found.getvalue()


def test_a_storyboard(server: Server, video: dict[str, Any]) -> None:
    cards = [
        {"start": 0, "end": 1, "prompt": "a red ball"},
        {"from": 1, "to": 2, "prompt": "a blue ball", "clip": {"id": video["id"], "to": 1}},
    ]
    job = server.done(server.create({"storyboard": cards, "size": "64x64", "num_inference_steps": 2})["id"])
    assert job["num_frames"] == 2 * job["fps"] == frames_in(server.content(job["id"]))
    assert job["task"] == "storyboard" and job["prompt"] == "a red ball\na blue ball"
    form = {"storyboard": json.dumps(cards[:1]), "size": "64x64", "num_inference_steps": "1"}
    made = server.http.post("/v1/videos", data=form, files={"unused": b""}).json()
    assert made["error"]["param"] == "unused"
    for wrong in (cards[:1] * 2, [{"from": 0, "to": 1}], [{"from": 1, "to": 0, "prompt": "x"}], {}, [3]):
        answer = server.http.post("/v1/videos", json={"storyboard": wrong})
        assert answer.status_code == 400, (wrong, answer.text)


def test_characters(server: Server, video: dict[str, Any]) -> None:
    path = "/v1/videos/characters"
    made = server.http.post(path, data={"name": "Ada"}, files={"video": ("x.mp4", server.content(video["id"]))}).json()
    assert made["object"] == "character" and made["name"] == "Ada"
    other = server.create({"name": "Bob", "video": {"id": video["id"]}}, path)
    assert server.http.get(f"{path}/{made['id']}").json() == made
    assert [each["id"] for each in server.http.get(path).json()["data"]] == [other["id"], made["id"]]
    assert server.http.delete(f"{path}/{other['id']}").json()["deleted"]
    assert server.http.get(f"{path}/{other['id']}").status_code == 404
    fields = {"prompt": "Ada", "characters": [{"id": made["id"]}], "num_inference_steps": 1, "num_frames": 5}
    refused = server.http.post("/v1/videos", json=fields)
    assert refused.status_code == 400 and "takes none" in refused.json()["error"]["message"]
    job = server.done(server.create(fields | {"model": "control", "size": "64x64"})["id"])
    assert len(job["receipt"]["request"]["references"]) == 1 and str(server.data) not in json.dumps(job)
    for wrong in ({}, {"name": "x"}, {"name": "x" * 300, "video": {"id": video["id"]}}, {"name": "x", "video": "y"}):
        assert server.http.post(path, json=wrong).status_code == 400


def test_pictures_are_edited(server: Server) -> None:
    def edit(data: dict[str, Any], *files: tuple[str, bytes]) -> Any:
        data = {"prompt": "a ball", "num_inference_steps": "4", **data}
        return server.http.post("/v1/images/edits", data=data, files=[(n, ("a.png", c)) for n, c in files])

    def pictures(answer: Any) -> list[Image.Image]:
        assert answer.status_code == 200, answer.text
        found = [base64.b64decode(each["b64_json"]) for each in answer.json()["data"]]
        return [Image.open(io.BytesIO(each)) for each in found]

    gently, anew = (pictures(edit({"strength": s, "seed": "1"}, ("image", png("red"))))[0] for s in ("0.05", "1"))
    red = np.array([255, 0, 0])
    near, far = (np.abs(np.asarray(each).astype(int) - red).mean() for each in (gently, anew))
    assert gently.size == (64, 64) and near < far, "strength says how much of it goes"
    two = pictures(edit({"n": "2"}, ("image", png("red"))))
    assert two[0].tobytes() != two[1].tobytes()
    masked = {"model": "control", "size": "64x64"}
    files = ("image[]", png("red")), ("image[]", png("blue")), ("mask", png("red", clear=True))
    (kept,) = pictures(edit(masked, *files))
    assert kept.size == (64, 64)
    for model, wrong in (
        ("demo", files),
        ("demo", files[1:2] * 2),
        ("control", [files[0], ("mask", png("red"))]),
    ):
        answer = edit({"model": model}, *wrong)
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_pictures_come_along(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    more = {"num_inference_steps": 30}
    events = list(client.images.generate(prompt="a ball", stream=True, partial_images=2, size="64x64", extra_body=more))
    kinds = [each.type for each in events]
    assert kinds[-1] == "image_generation.completed" and set(kinds[:-1]) <= {"image_generation.partial_image"}
    for each in events:
        assert Image.open(io.BytesIO(base64.b64decode(each.b64_json))).size == (64, 64)
    for wrong in ({"n": 2, "stream": True}, {"partial_images": 4}, {"n": 0}, {"n": 11}, {"response_format": "jpeg"}):
        assert server.http.post("/v1/images/generations", json={"prompt": "x"} | wrong).status_code == 400


class Told(BaseHTTPRequestHandler):
    """Who is told of ends: the first time it has no time."""

    seen: ClassVar[list[tuple[bytes, Any]]] = []

    def do_POST(self) -> None:
        self.seen.append((self.rfile.read(int(self.headers["content-length"])), self.headers))
        self.send_response(500 if len(self.seen) == 1 else 204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


def test_who_asked_is_told_of_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai")
    listening = HTTPServer(("127.0.0.1", 0), Told)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    job = server.done(server.create(TINY | {"webhook_url": f"http://127.0.0.1:{listening.server_port}/x?key=1"})["id"])
    server.until(lambda: Told.seen)
    monkeypatch.setattr(webhooks.time, "time", lambda: time_time() + webhooks.PAUSES[0])
    hooks = webhooks.Webhooks(server.data, Access(("127.0.0.1:*",)), read_secret(server.data / "webhook-secret"))
    while (row := hooks.due()) is not None:  # what the server does some seconds later
        hooks.tell(row)
    hooks.close()
    listening.shutdown()
    client = openai.OpenAI(api_key="none", webhook_secret=(server.data / "webhook-secret").read_text().strip())
    (first, _), (second, headers) = Told.seen
    event = client.webhooks.unwrap(second.decode(), headers)
    assert first == second and event.type == "video.completed" and event.data.id == job["id"]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(second.decode() + " ", headers)
    for url in ("http://10.0.0.1/", "ftp://127.0.0.1/", "http://127.0.0.1:x/", "", 3):
        answer = server.http.post("/v1/videos", json=TINY | {"webhook_url": url})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "webhook_url", url


def test_what_is_seen(server: Server, video: dict[str, Any]) -> None:
    """Models, metrics, and log lines with the ids of requests and jobs."""
    told = {each["id"]: each for each in server.http.get("/v1/models").json()["data"]}
    assert told["demo"]["multiples"]["num_frames"] == 4 and told["demo"]["defaults"]["width"] and len(told) == 2
    assert server.http.get("/v1/models/demo").json() == told["demo"]
    assert server.http.get("/v1/models/none").status_code == 404
    families = {each.name: each for each in text_string_to_metric_families(server.http.get("/metrics").text)}
    samples = {(s.name, *s.labels.values()): s.value for each in families.values() for s in each.samples}
    assert samples["dit_jobs", "completed"] >= 1 and samples["dit_workers_ready",] == 1
    assert samples["dit_stage_seconds_count", "denoise/step"] >= 2 and samples["dit_queue_seconds_count", "video"] >= 1
    assert samples["dit_requests_total", "POST", "200"] >= 1 and samples["dit_request_seconds_count", "GET"] >= 1
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    taken = next(line for line in lines if line["message"] == f"job {video['id']} is taken")
    assert taken["request"].startswith("req_")
    made = [line for line in lines if line.get("job") == video["id"]]
    assert any("completed" in line["message"] for line in made)
    assert video["queue_seconds"] >= 0 and video["created_at"] <= video["started_at"] <= video["completed_at"]


def test_results_are_kept_for_their_time(server: Server) -> None:
    job = server.done(server.create()["id"])
    store = Store(server.data)
    store.expire(60)
    assert server.content(job["id"])
    store.expire(0)  # what --keep does, some time later
    store.close()
    assert not (server.data / "jobs" / job["id"]).exists()
    gone = server.http.get(f"/v1/videos/{job['id']}/content")
    assert gone.status_code == 410 and gone.json()["error"]["code"] == "expired"
    assert server.video(job["id"])["status"] == "completed"


def test_a_quality(server: Server) -> None:
    """What may be given up for speed; the words of OpenAI's clients mean the exact video."""
    for given, meant in (("fast", "fast"), (30, 30.0), ("28.5", 28.5), ("hd", "exact"), ("auto", "exact")):
        made = server.done(server.create(TINY | {"quality": given})["id"])
        assert made["receipt"]["request"]["quality"] == meant
        assert made["quality"] == ("standard" if meant == "exact" else meant)
    for given in ("best", -1, 0, "nan", [], True):
        answer = server.http.post("/v1/videos", json=TINY | {"quality": given})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "quality"


def test_a_preview(server: Server) -> None:
    made = server.create(LONG)["id"]
    path = server.until(lambda: server.video(made).get("preview_url"))
    answer = server.until(lambda: (found := server.http.get(path)).status_code == 200 and found)
    assert answer.headers["content-type"] == "image/gif" and answer.content.startswith(b"GIF8")
    server.http.post(f"/v1/videos/{made}/cancel")
    ended = server.done(made, "cancelled")
    assert "preview_url" not in ended and server.http.get(path).json()["error"]["code"] == "no_preview"


def test_pictures_by_their_addresses(server: Server) -> None:
    few = {"prompt": "a ball", "size": "64x64", "num_inference_steps": 1, "response_format": "url"}
    answer = server.http.post("/v1/images/generations", json=few | {"n": 2})
    assert answer.status_code == 200, answer.text
    urls = [each["url"] for each in answer.json()["data"]]
    assert len(set(urls)) == 2 and all(url.startswith(f"{server.url}/v1/images/image_") for url in urls)
    for url in urls:
        found = server.http.get(url)
        assert found.headers["content-type"] == "image/png" and Image.open(io.BytesIO(found.content)).size == (64, 64)
    assert server.http.get(f"/v1/images/image_{'0' * 32}/content").status_code == 404
    assert server.http.post("/v1/images/generations", json=few | {"stream": True}).status_code == 400
