"""Our own client, and `python -m runtime remote` over it, against a started server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import runtime
from runtime.__main__ import main
from runtime.client import ServerError
from runtime.reading import read_video
from tests.serving import TINY, Server

KEY = "k" * 16
FEW = ["--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "3"]
FIELDS = {name: value for name, value in TINY.items() if name != "prompt"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("client")
    (folder / "keys").write_text(KEY)
    started = Server(folder / "data", "--api-key", str(folder / "keys"))
    yield started
    assert started.stop() == 0


def remote(server: Server, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run one verb; return what it printed."""
    capsys.readouterr()
    given = main(["remote", *arguments[:1], "--url", server.url, *arguments[1:]])
    printed = capsys.readouterr()
    assert given == code, printed.err
    return printed.err if code else printed.out


def test_the_command_line(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A film and what is made of it, by file and by id; told, fetched, and removed."""
    monkeypatch.chdir(tmp_path)
    assert "key" in remote(server, capsys, "list", code=2)
    monkeypatch.setenv("DIT_RUNTIME_API_KEY", KEY)
    assert "5 frames, 64x64, seed 3" in remote(server, capsys, "generate", "a red ball", *FEW, "-o", "a.mp4")
    first = json.loads(remote(server, capsys, "list", "--json"))
    assert read_video("a.mp4").num_frames == 5 and first["status"] == "completed"
    few = ["--steps", "2", "--frames", "4", "--no-wait"]
    made = {
        9: remote(server, capsys, "extend", "a.mp4", "on", "--backward", *few),
        14: remote(server, capsys, "connect", "a.mp4", first["id"], "on", *few),
        5: remote(server, capsys, "edit", first["id"], "snow", "--steps", "3", "--strength", "0.7", "--no-wait"),
        8: remote(server, capsys, "loop", "a ball", "--steps", "2", "--frames", "8", "--size", "64x64", "--no-wait"),
    }
    for count, line in made.items():
        video = line.strip()
        remote(server, capsys, "watch", video, "--quiet")
        assert json.loads(remote(server, capsys, "get", video))["num_frames"] == count
    remote(server, capsys, "download", made[9].strip(), "-o", "b.webm")
    remote(server, capsys, "download", made[9].strip(), "-o", "c.gif", "--from", "3")
    assert read_video("c.gif").num_frames == 6
    remote(server, capsys, "download", made[9].strip(), "-o", "b.webp", "--variant", "thumbnail")
    assert read_video("b.webm").num_frames == 9 and Path("b.webp").read_bytes()[:4] == b"RIFF"
    told = json.loads(remote(server, capsys, "verify", "a.mp4"))
    assert told["state"] == "valid" and told["trusted"]
    remote(server, capsys, "image", "a ball", "--size", "64x64", "--steps", "1", "--set", "n=2", "-o", "p.png")
    assert read_video("p.png").width == read_video("p-2.png").width == 64
    assert len(remote(server, capsys, "list").splitlines()) == 5
    for line in made.values():
        remote(server, capsys, "delete", line.strip())
    assert "no video" in remote(server, capsys, "get", made[9].strip(), code=2)


def test_what_the_command_line_refuses(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIT_RUNTIME_API_KEY", KEY)
    for arguments, says in (
        (["generate", "x", "--size", "65x64"], "65"), (["extend", "no.mp4", "x"], "no file here"),
        (["generate", "x", "-o", "a.avi"], "unknown suffix"), (["generate", "x", "--set", "colour"], "FIELD=JSON"),
        (["generate", "x", "--set", "colour=red"], "colour is not known"), (["get", "video_0"], "no video"),
        (["list", "--key-file", "none"], "No such file"), (["list", "--url", "nonsense"], "no address"),
        (["list", "--url", "http://127.0.0.1:9"], "cannot be reached"),
    ):  # fmt: skip
        assert says in remote(server, capsys, *arguments, code=2), arguments
    assert list(tmp_path.iterdir()) == []
    long = remote(server, capsys, "generate", "a ball", *FEW[:4], "--steps", "900", "--no-wait").strip()
    assert json.loads(remote(server, capsys, "cancel", long))["id"] == long
    assert "cancelled" in remote(server, capsys, "watch", long, code=2)
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.delenv("DIT_RUNTIME_API_KEY")
    assert long in remote(server, capsys, "list", "--key-file", "key")


def test_nothing_heavy_is_loaded_for_it() -> None:
    code = "import sys, runtime.__main__, runtime.cli.remote; runtime.Client(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_rest_of_the_surface(server: Server, tmp_path: Path) -> None:
    with runtime.Client(server.url, key=KEY) as client:
        assert client.models() == ["demo"]
        draft = client.create("a red ball", draft=True, **{**FIELDS, "size": "128x64"})
        assert client.plan(prompt="x", **FIELDS)["predicted"]["fits"]
        assert client.expand("a red ball")["prompt"] == "a red ball"
        client.wait(draft)
        final = client.wait(client.finish(draft, num_inference_steps=3))
        assert final["status"] == "completed" and final["id"] != draft["id"]
        (picture,) = client.image("a ball", size="64x64", num_inference_steps=1)
        (path := tmp_path / "a.png").write_bytes(picture)
        (changed,) = client.edit_image(path, "a blue ball", num_inference_steps=2)
        assert changed[:4] == picture[:4] == b"\x89PNG"
        framed = client.create("a ball", keyframes=[{"frame": 0, "image": path}, {"frame": 4, "image": path}], **FIELDS)
        events = list(client.events(framed))
        assert events[-1][0] == "done" and events[-1][1]["status"] == "completed"
        character = client.create_character("Ball", path)
        assert character["id"] in [each["id"] for each in client.characters()]
        client.delete_character(character["id"])
        client.delete(framed, undo=60)
        assert client.restore(framed)["id"] == framed["id"]
        assert framed["id"] in [each["id"] for each in client.list(search="a ball", status="completed", limit=1)]
        assert client.verify(framed)["ingredients"][0]["relation"] == "inputTo"


LOADING = 7  # answers of a server whose model is being loaded: more than a busy one is asked


def test_a_busy_server_is_asked_again_and_a_lost_answer_makes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """429 with Retry-After, then no answer at all, then success: one idempotency key for all of them.

    A server that still loads its model is waited for, up to an end.
    """
    seen: list[tuple[str, bytes]] = []

    class Site(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.headers["idempotency-key"], body))
            if self.path.endswith("finish") and len(seen) <= 4 + LOADING:
                self.answer(
                    503, {"error": {"code": "not_ready", "message": "no model is loaded yet"}}, ("retry-after", "0")
                )
            elif self.path.endswith("remix"):
                self.answer(409, {"error": {"code": "x", "message": "not now"}})
            elif len(seen) == 1:
                self.answer(429, {}, ("retry-after", "0"))
            elif len(seen) == 2:
                self.connection.close()
            else:
                self.answer(200, {"id": "video_1"})

        def answer(self, status: int, found: Any, *headers: tuple[str, str]) -> None:
            body = json.dumps(found).encode()
            self.send_response(status)
            for name, value in (*headers, ("content-length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with runtime.Client(f"http://127.0.0.1:{server.server_port}") as client:
            assert client.edit(Path(__file__), "x")["id"] == "video_1"
            assert len({key for key, _ in seen}) == 1 and len(seen) == 3
            assert all(Path(__file__).read_bytes() in body for _, body in seen)
            with pytest.raises(ServerError, match="not now") as caught:
                client.remix("video_1", "x")
            assert caught.value.status == 409 and len(seen) == 4
            assert client.finish("video_1")["id"] == "video_1" and len(seen) == 4 + LOADING + 1
            monkeypatch.setattr("runtime.client.STARTING", 0.0)
            seen.clear()
            with pytest.raises(ServerError, match="no model is loaded yet"):
                client.finish("video_1")
            assert len(seen) == 3
    finally:
        server.shutdown()
        server.server_close()
