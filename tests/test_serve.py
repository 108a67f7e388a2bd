"""A started server: the surface, its errors, and that nothing is lost when it is killed."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi")

import runtime
from runtime.client import ServerError
from tests.serving import LONG, TINY, Server, frames_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("data") / "served")
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def video(server: Server) -> dict[str, Any]:
    return server.done(server.create()["id"])


def test_the_http_process_has_no_torch(server: Server) -> None:
    assert "torch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    assert len(server.workers()) == 1


def test_a_video(server: Server, video: dict[str, Any]) -> None:
    assert video["progress"] == 100 and video["size"] == "64x64" and video["seconds"] == "0.625" and video["seed"] == 3
    assert video["receipt"]["seed"] == 3 and video["stages"]["denoise/step"]["calls"] == 2
    assert str(server.data) not in json.dumps(video)
    assert frames_of(server.content(video["id"])).shape == (5, 64, 64, 3)


@pytest.mark.fault(24)
def test_content(server: Server, video: dict[str, Any]) -> None:
    path = f"/v1/videos/{video['id']}/content"
    whole = server.http.get(path)
    head = server.http.head(path)
    assert head.status_code == 200 and int(head.headers["content-length"]) == len(whole.content) and not head.content
    part = server.http.get(path, headers={"range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == whole.content[4:8] == b"ftyp"
    assert server.http.get(path, headers={"range": "bytes=-4"}).content == whole.content[-4:]
    for asked, status in ((f"bytes={10**9}-", 416), ("nonsense", 400)):
        refused = server.http.get(path, headers={"range": asked})
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, "invalid_range")
    same = server.http.get(path, headers={"if-none-match": f'"other", {whole.headers["etag"]}'})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", whole.headers["etag"])
    stale = {"range": "bytes=0-3", "if-range": '"other"'}
    assert server.http.get(path, headers=stale).content == whole.content and whole.headers["etag"]
    for variant, kind, least in (("thumbnail", "WEBP", 64), ("spritesheet", "JPEG", 160)):
        picture = Image.open(io.BytesIO(server.http.get(path, params={"variant": variant}).content))
        assert picture.format == kind and picture.width >= least
    assert server.http.get(path, params={"variant": "../x"}).status_code == 400


@pytest.mark.fault(13)
def test_every_verb(server: Server, video: dict[str, Any]) -> None:
    """Edit, extend both ways, connect, loop, keyframes; by id and by upload; in JSON, brackets and JSON strings."""
    data = server.content(video["id"])
    own = {"video": {"id": video["id"]}}
    few = {"num_inference_steps": 3, "num_frames": 4, "prompt": "a ball"}
    picture = io.BytesIO()
    Image.new("CMYK", (48, 80)).save(picture, "JPEG")
    made = {
        5: server.create({"prompt": "blue", "num_inference_steps": 4}, f"/v1/videos/{video['id']}/remix"),
        9: server.create({**few, **own}, "/v1/videos/extensions"),
        13: server.http.post(
            "/v1/videos/extensions", files={"video": ("../../x\0.exe", data)},
            data={"prompt": "x", "num_frames": "8", "num_inference_steps": "2", "direction": "backward"},
        ).json(),
        14: server.create({**few, "videos": [{"id": video["id"]}] * 2}, "/v1/videos/connections"),
        8: server.create({"prompt": "a ball", "num_frames": 8, "num_inference_steps": 2, "loop": True}),
        17: server.http.post(
            "/v1/videos", files={"keyframes[][image]": ("a.png", picture.getvalue())},
            data={"keyframes[][frame]": "16", "prompt": "x", "num_inference_steps": "2", "num_frames": "17"},
        ).json(),
    }  # fmt: skip
    for count, job in made.items():
        assert "error" in job and job["error"] is None, job
        found = server.done(job["id"])
        assert found["num_frames"] == count == len(frames_of(server.content(job["id"]))), found
    assert made[5]["remixed_from_video_id"] == video["id"]


def test_a_list_is_light(server: Server, video: dict[str, Any]) -> None:
    """What is long stands in the video's own object alone."""
    data = server.http.get("/v1/videos", params={"limit": 100, "status": "completed"}).json()["data"]
    listed = next(each for each in data if each["id"] == video["id"])
    assert video.keys() - listed.keys() == {"receipt", "stages"} and listed["warnings"] == video["warnings"]


def test_listing(server: Server) -> None:
    made = [server.create()["id"] for _ in range(3)]
    newest = server.http.get("/v1/videos", params={"limit": 2}).json()
    assert [each["id"] for each in newest["data"]] == made[:0:-1] and newest["has_more"]
    assert (newest["first_id"], newest["last_id"]) == (made[2], made[1])
    rest = server.http.get("/v1/videos", params={"after": made[0], "order": "asc"}).json()
    assert [each["id"] for each in rest["data"]] == made[1:] and not rest["has_more"]
    for each in made:
        assert server.http.delete(f"/v1/videos/{each}").json() == {
            "id": each, "object": "video.deleted", "deleted": True,
        }  # fmt: skip
        assert server.http.get(f"/v1/videos/{each}").status_code == 404
    server.until(lambda: not any((server.data / "jobs" / each).exists() for each in made))


PIXEL = "data:image/gif;base64,R0lGODdhAQABAIAAAAAAAP///ywAAAAAAQABAAACAkQBADs="
BAD = [
    ({}, "prompt", 400),
    ({"prompt": " "}, "prompt", 400),
    ({"prompt": 3}, "prompt", 400),
    ({"prompt": "x" * 30_000}, "prompt", 400),
    (TINY | {"size": "833x481"}, "size", 400),
    (TINY | {"size": "0x0"}, "size", 400),
    (TINY | {"size": "8x64"}, "size", 400),
    (TINY | {"size": "33x64"}, "size", 400),
    (TINY | {"size": "33x64", "num_frames": 1}, "size", 400),
    (TINY | {"size": "99999x99999"}, "size", 400),
    (TINY | {"seconds": "4.5s"}, "seconds", 400),
    (TINY | {"num_frames": 6}, "num_frames", 400),
    (TINY | {"seed": -1}, "seed", 400),
    (TINY | {"seed": 2**64}, "seed", 400),
    (TINY | {"guidance_scale": "nan"}, "guidance_scale", 400),
    (TINY | {"guidance_scale": 1e308}, "guidance_scale", 400),
    (TINY | {"direction": "forward"}, "direction", 400),
    (TINY | {"strength": 0.5}, "strength", 400),
    (TINY | {"fit": "squeeze"}, "fit", 400),
    (TINY | {"storyboard": [{"from": 1, "to": 1, "prompt": "a"}]}, "storyboard", 400),
    (TINY | {"keyframes": [{"frame": 3}]}, "keyframes", 400),
    (TINY | {"num_inference_steps": 10**6}, "num_inference_steps", 400),
    (TINY | {"output_path": "/etc/x"}, "output_path", 400),
    (TINY | {"model": "../../etc"}, "model", 404),
    (TINY | {"input_reference": "/etc/passwd"}, "input_reference", 400),
    (TINY | {"input_reference": {"image_url": "http://169.254.169.254/"}}, "input_reference", 400),
    (TINY | {"input_reference": {"image_url": "data:image/png;base64,AAAA"}}, "input_reference", 400),
    (TINY | {"keyframes": "[["}, "keyframes", 400),
    (TINY | {"keyframes": [{"image": PIXEL, "strength": 2}]}, "keyframes", 400),
    (TINY | {"keyframes": [{"image": PIXEL, "frame": -1}]}, "keyframes", 400),
    (TINY | {"infer_steps": 3}, "num_inference_steps", 400),
    (TINY | {"quality": "best"}, "quality", 400),
    (TINY | {"extra_body": {"seed": 1}}, "seed", 400),
    (TINY | {"priority": 99}, "priority", 400),
    (TINY | {"fps": 1e308}, "fps", 400),
    (TINY | {"direction": "up"}, "direction", 400),
]


@pytest.mark.fault(12, 14, 15, 16, 17)
def test_what_is_illegal(server: Server) -> None:
    for fields, param, status in BAD:
        answer = server.http.post("/v1/videos", json=fields)
        error = answer.json()["error"]
        assert answer.status_code == status and (param is None or error["param"] == param), (fields, error)
        assert error["message"] and error["type"] and error["code"] and answer.headers["x-request-id"]


@pytest.mark.fault(18)
def test_bad_bodies(server: Server) -> None:
    kinds = {"json": "application/json", "form": "multipart/form-data; boundary=b", "other": "text/plain"}
    for kind, body, status in (
        ("json", b"{", 400), ("json", b"[]", 400), ("json", b'{"prompt": "a", "prompt": "b"}', 400),
        ("json", b'{"a":' * 5000, 400), ("json", b'{"seed": NaN}', 400), ("json", b"\xff", 400),
        ("form", b"", 400), ("form", b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx', 400),
        ("form", b"junk", 400), ("other", b"x", 415),
    ):  # fmt: skip
        answer = server.http.post("/v1/videos", content=body, headers={"content-type": kinds[kind]})
        assert answer.status_code == status and answer.json()["error"]["message"], (body[:40], answer.text)
    for method, path in (
        ("GET", "/nothing"),
        ("PUT", "/v1/videos"),
        ("GET", "/v1/videos/..%2Fx"),
        ("GET", "/v1/videos?limit=0"),
    ):
        answer = server.http.request(method, path)
        assert answer.status_code in (400, 404, 405) and answer.json()["error"]["message"], path


@pytest.mark.fault(8, 11)
@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"<svg/>", b"#EXTM3U\nhttp://x/", b"\x89PNG\r\n\x1a\n" + b"\0" * 64]
)
def test_bad_uploads(server: Server, content: bytes) -> None:
    answer = server.http.post("/v1/videos", files={"input_reference": ("a.png", content)}, data={"prompt": "x"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_upload", answer.text
    assert str(server.data) not in answer.text


@pytest.mark.fault(7)
def test_a_picture_bomb(server: Server) -> None:
    bomb = io.BytesIO()
    Image.new("1", (9500, 9500)).save(bomb, "PNG")
    answer = server.http.post("/v1/videos", files={"input_reference": bomb.getvalue()}, data={"prompt": "x"})
    assert answer.status_code == 400 and "pixels" in answer.json()["error"]["message"]


@pytest.mark.fault(21)
def test_idempotency(server: Server) -> None:
    key = {"Idempotency-Key": "once"}
    found: list[Any] = []

    def ask() -> None:
        found.append(server.create(headers=key)["id"])

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 5
    other = server.http.post("/v1/videos", json=TINY | {"seed": 9}, headers=key)
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"


@pytest.mark.fault(25, 26)
def test_cancel_delete_events_and_not_ready(server: Server) -> None:
    job = server.create(LONG)["id"]
    server.until(lambda: server.video(job)["step"] > 0)
    early = server.http.get(f"/v1/videos/{job}/content")
    assert early.status_code == 409 and early.headers["x-should-retry"] == "false"
    waiting = server.create(LONG)
    assert waiting["status"] == "queued"
    server.until(lambda: server.video(waiting["id"])["queue_position"] == 0)  # what it tells is a moment old
    poll = server.http.get(f"/v1/videos/{waiting['id']}")
    assert 250 <= int(poll.headers["openai-poll-after-ms"]) <= 5000
    seen: list[str] = []
    with server.http.stream("GET", f"/v1/videos/{job}/events") as events:
        for line in events.iter_lines():
            seen += [line.removeprefix("event: ")] if line.startswith("event: ") else []
            if "progress" in seen and "preview" in seen:
                server.http.post(f"/v1/videos/{job}/cancel")
    assert seen[-1] == "done"
    stopped = server.done(job, "cancelled")
    assert stopped["step"] < 60
    assert server.http.get(f"/v1/videos/{job}/content").json()["error"]["code"] == "video_cancelled"
    server.until(lambda: server.video(waiting["id"])["status"] == "in_progress")
    assert server.http.delete(f"/v1/videos/{waiting['id']}").status_code == 200
    server.until(lambda: not (server.data / "jobs" / waiting["id"]).exists())


def test_pictures_sync_and_state(server: Server) -> None:
    answer = server.http.post(
        "/v1/images/generations", json={"prompt": "a ball", "num_inference_steps": 2, "size": "63x45"}
    )
    assert answer.status_code == 200 and answer.json()["output_format"] == "png", answer.text
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as picture:
        assert picture.size == (63, 45)
    at_once = server.http.post("/v1/videos/sync", json=TINY | {"size": "62x46"})
    assert at_once.status_code == 200 and frames_of(at_once.content).shape == (5, 46, 62, 3)
    metrics = server.http.get("/metrics").text
    assert 'dit_jobs{status="completed"}' in metrics and 'dit_stage_seconds_sum{stage="decode"}' in metrics
    assert [each["id"] for each in server.http.get("/v1/models").json()["data"]] == ["demo"]
    assert server.http.get("/health/live").json() == {"status": "live"}
    assert "/v1/videos/{video_id}/remix" in server.http.get("/openapi.json").json()["paths"]


def test_a_picture_does_not_wait_for_a_film(server: Server) -> None:
    film = server.create(LONG | {"num_inference_steps": 400})["id"]
    server.until(lambda: server.video(film)["step"] > 2)
    answer = server.http.post("/v1/images/generations", json={"prompt": "a ball", "num_inference_steps": 1})
    assert answer.status_code == 200, answer.text
    found = server.until(lambda: (job := server.video(film))["attempt"] == 2 and job)
    assert 2 < found["step"] < 400, "it went on after the picture"
    server.http.delete(f"/v1/videos/{film}")


def test_our_own_client(server: Server, tmp_path: Path) -> None:
    few = {"num_frames": 5, "num_inference_steps": 2, "seed": 3}
    with runtime.Client(server.url) as client:
        video = client.wait(client.create("a red ball", **few))
        path = client.save(video, tmp_path / "ball.mp4")
        assert path.read_bytes() == server.content(video["id"])
        again = client.extend(path, "on", num_frames=4, num_inference_steps=2)
        more = client.connect(video["id"], video["id"], "on", num_frames=4, num_inference_steps=2)
        assert [client.wait(each)["num_frames"] for each in (again, more)] == [9, 14]
        assert {video["id"], again["id"], more["id"]} <= {each["id"] for each in client.list(limit=2)}
        for each in (video, again, more):
            client.delete(each["id"])
        with pytest.raises(ServerError, match="no video") as caught:
            client.save(video, tmp_path / "none.mp4")
        assert caught.value.status == 404 and [file.name for file in tmp_path.iterdir()] == ["ball.mp4"]


def test_where_a_result_comes_from(server: Server, tmp_path: Path) -> None:
    """An extension of a remix tells its whole chain, by id and by upload; a changed file and a copy are told apart."""
    first = server.create()["id"]
    server.done(first)
    remix = server.create({"prompt": "blue", "num_inference_steps": 2}, f"/v1/videos/{first}/remix")["id"]
    server.done(remix)
    few = {"prompt": "on", "num_inference_steps": 2, "num_frames": 4}
    longer = server.create({**few, "video": {"id": remix}}, "/v1/videos/extensions")["id"]
    server.done(longer)
    found = server.create({"video": {"id": longer}}, "/v1/provenance")
    assert found["state"] == "valid" and found["trusted"] and found["made"]["model"] == "demo", found
    parents = found["ingredients"][0], found["ingredients"][0]["ingredients"][0]
    assert [each["title"] for each in parents] == [f"{remix}.mp4", f"{first}.mp4"]
    assert all(each["relation"] == "parentOf" and each["state"] == "valid" for each in parents)
    content = server.content(longer)

    def asked(content: bytes) -> Any:
        return server.http.post("/v1/provenance", files={"video": ("../../x", content)}).json()

    assert asked(content) == found
    assert asked(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])["state"] == "tampered"
    plain = runtime.Video(frames_of(content), fps=8, num_frames=9, height=64, width=64).save(tmp_path / "plain.mp4")
    assert asked(plain.read_bytes())["state"] == "missing" and asked(b"text")["state"] == "unsupported"
    for body in ({}, {"video": "x"}, {"video": {"id": "video_0"}}, {"video": {"id": longer}, "path": "/etc/passwd"}):
        answer = server.http.post("/v1/provenance", json=body)
        assert answer.status_code in (400, 404) and answer.json()["error"]["message"], answer.text
    shown = server.http.get(f"/v1/videos/{longer}/content", params={"format": "gif"}).content
    again = asked(shown)
    assert (again["state"], again["actions"]) == ("valid", ["c2pa.opened", "c2pa.transcoded"])
    assert (
        again["made"]["seed"] == found["made"]["seed"]
        and again["ingredients"][0]["ingredients"] == found["ingredients"]
    )
    picture = base64.b64decode(
        server.create({"prompt": "a ball", "num_inference_steps": 1, "size": "64x64"}, "/v1/images/generations")[
            "data"
        ][0]["b64_json"]
    )
    assert asked(picture)["state"] == "valid"
    shown = server.http.post("/v1/videos", files={"input_reference": picture}, data=TINY | {"num_frames": "5"}).json()[
        "id"
    ]
    server.done(shown)
    (start,) = server.create({"video": {"id": shown}}, "/v1/provenance")["ingredients"]
    assert (start["relation"], start["state"]) == ("inputTo", "valid"), "a picture keeps what it says of itself"
    assert not list((server.data / "jobs").glob("upload_*"))
