"""Moderation: what the operator's rules refuse is not made, or not given out, and recorded."""

from __future__ import annotations

import base64
import io
import json
import re
import sqlite3
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")

from runtime.serve.moderation import Moderator, Refused, Rule, has_any, plain, samples
from runtime.serve.settings import read_settings
from runtime.video import Video
from tests.serving import TINY, Server

POLICY = "content_policy_violation"


@pytest.fixture
def endpoint() -> Iterator[Any]:
    """An endpoint like OpenAI's: it flags the word "storm", and pictures that are mostly blue."""

    class Site(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.seen.append((self.headers["authorization"], body))  # type: ignore[attr-defined]
            pictures = [each["image_url"]["url"] for each in body["input"] if each["type"] == "image_url"]
            text = "".join(each["text"] for each in body["input"] if each["type"] == "text")
            flagged = "storm" in text or any(map(blue, pictures))
            found = {"flagged": flagged, "categories": {"weather": flagged, "other": False}}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"id": "x", "results": [found]}).encode())

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def blue(url: str) -> bool:
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    red, _, other = np.asarray(picture).reshape(-1, 3).mean(0)
    return bool(other > red + 100)


def command(tmp_path: Path, code: str) -> tuple[str, ...]:
    (script := tmp_path / "rule.py").write_text("import json, sys, time\nasked = json.load(sys.stdin)\n" + code)
    return sys.executable, str(script)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("a gun on a table", True), ("A GÜN!", True), ("g\u200bun", True), ("ｇｕｎ", True), ("big-gun.", True),
        ("begun", False), ("the gun's", True), ("red  light,\ndistrict", True), ("red light", False), ("枪战片", True),
        ("", False), ("злой кот", True), ("который", False),
    ],
)  # fmt: skip
def test_words(tmp_path: Path, text: str, refused: bool) -> None:
    (words := tmp_path / "words.txt").write_text("# no weapons\ngun\nRed Light District\n枪\nкот\n", encoding="utf-8")
    moderator = Moderator([Rule("words", file=words)])
    if not refused:
        moderator.check_prompt([text])
        return
    with pytest.raises(Refused, match="not allowed") as caught:
        moderator.check_prompt(["fine", text])
    assert caught.value.code == POLICY and "gun" not in str(caught.value)


def test_words_are_compared_whole() -> None:
    assert plain("  Ünïcode…Text ") == " unicode text "
    assert has_any("a c", [" c "]) and not has_any("abc", [" c "])


def test_an_endpoint_and_a_command_speak_alike(tmp_path: Path, endpoint: Any) -> None:
    (key := tmp_path / "key").write_text("secret-token\n")
    url = f"http://127.0.0.1:{endpoint.server_port}/v1/moderations"
    code = "print(json.dumps({'results': [{'flagged': 'storm' in asked['input'][0]['text'], 'reason': 'no storms'}]}))"
    film = Video(np.tile(np.uint8([0, 0, 255]), (20, 16, 16, 1)), fps=8, num_frames=20, height=16, width=16).save(
        tmp_path / "f.mp4"
    )
    asked = Rule("http", ("prompt", "frames"), url=url, key_file=key, model="m", frames=3)
    for rule, says in (
        (asked, "weather"),
        (Rule("command", ("prompt", "frames"), command=command(tmp_path, code)), "no storms"),
    ):
        moderator = Moderator([rule])
        moderator.check_prompt(["a calm day"])
        with pytest.raises(Refused, match=says):
            moderator.check_prompt(["a storm"])
    with pytest.raises(Refused, match="the video is refused by this server's rules: weather"):
        Moderator([asked]).check_frames(film, ["a calm day"])
    authorization, body = endpoint.seen[-1]
    assert authorization == "Bearer secret-token" and body["model"] == "m" and len(body["input"]) == 4
    assert len(samples(film, 100)) == 20


@pytest.mark.parametrize(
    "code",
    ["sys.exit(1)", "print('hello')", "print('{}')", "print('{\"results\": 3}')", "time.sleep(9)", "print('null')"],
)
def test_what_does_not_answer_is_refused_or_passed_as_the_rule_says(tmp_path: Path, code: str) -> None:
    rule = Rule("command", command=command(tmp_path, code), seconds=0.5)
    with pytest.raises(Refused, match="does not answer") as caught:
        Moderator([rule]).check_prompt(["x"])
    assert caught.value.code == "moderation_unavailable"
    Moderator([Rule.of(rule.record() | {"broken": "accept"})]).check_prompt(["x"])
    for other in (Rule("command", command=("/no/such",)), Rule("http", url="http://127.0.0.1:9/")):
        with pytest.raises(Refused, match="does not answer"):
            Moderator([other]).check_prompt(["x"])


def test_rules_that_cannot_be(tmp_path: Path) -> None:
    (words := tmp_path / "words").write_text("# nothing\n")
    http = {"kind": "http", "url": "x"}
    for table, says in (
        ({"kind": "magic"}, "words, command, http"), ({"kind": "words"}, "needs 'file'"),
        ({"kind": "http"}, "needs 'url'"), ({"kind": "words", "file": "/no"}, "no file"),
        ({"kind": "command", "command": "x", "checks": "sound"}, "legal: prompt"),
        ({"kind": "words", "file": words, "checks": "frames"}, "legal: prompt"),
        (http | {"broken": "y"}, "broken"), (http | {"urls": "y"}, "legal: kind"),
        (http | {"seconds": 0}, "more than 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            Rule.of(table)
    with pytest.raises(ValueError, match="no word"):
        Moderator([Rule("words", file=words)])
    (config := tmp_path / "serve.toml").write_text('[[moderation]]\nkind = "words"\nfile = "/no"\n')
    with pytest.raises(ValueError, match="no file"):
        read_settings(["--config", str(config)])


def test_a_server_with_rules(tmp_path: Path, endpoint: Any) -> None:
    """Prompts are refused at once, results before anybody has them; previews of them are not shown."""
    (tmp_path / "words.txt").write_text("gun\n")
    (tmp_path / "key").write_text("secret-token")
    (tmp_path / "serve.toml").write_text(
        f'[[moderation]]\nkind = "words"\nfile = "{tmp_path}/words.txt"\n'
        f'[[moderation]]\nkind = "http"\nurl = "http://127.0.0.1:{endpoint.server_port}/?token=hidden"\n'
        f'checks = ["prompt", "frames"]\nkey_file = "{tmp_path}/key"\n'
    )
    server = Server(tmp_path / "data", "--config", str(tmp_path / "serve.toml"))
    try:
        refusals = [("/v1/videos", "a Gun"), ("/v1/videos", "a storm"), ("/v1/images/generations", "gun")]
        for path, prompt in [*refusals, ("/v1/prompts/expand", "gun")]:
            answer = server.http.post(path, json={"prompt": prompt})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, POLICY, "prompt"), answer.text
        assert server.done(server.create()["id"])["error"] is None
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), (0, 0, 255)).save(picture, "PNG")
        job = server.http.post("/v1/videos", files={"input_reference": picture.getvalue()}, data=TINY).json()["id"]
        refused = server.done(job, "failed")
        assert refused["error"]["code"] == POLICY and "weather" in refused["error"]["message"]
        left = {path.name for path in (server.data / "jobs" / job).iterdir()}
        assert not [name for name in left if name.startswith(("output", "preview", "."))], left
        endpoint.shutdown()
        endpoint.server_close()
        closed = server.http.post("/v1/videos", json=TINY)
        assert closed.status_code == 503 and closed.json()["error"]["code"] == "moderation_unavailable"
        assert int(closed.headers["retry-after"]) >= 1
        with sqlite3.connect(server.data / "store.db") as db:
            rows = db.execute("SELECT owner, job, stage, rule, code, prompt FROM refusals ORDER BY seq").fetchall()
        by = ["words", "http", "words", "words", "http", "http"]
        stages = ["prompt"] * 4 + ["frames", "prompt"]
        codes = [POLICY] * 5 + ["moderation_unavailable"]
        assert [row[2:5] for row in rows] == list(zip(stages, by, codes, strict=True))
        assert [row[1] for row in rows] == [None] * 4 + [job, None]
        assert rows[0][0] == "local" and rows[0][5] == "a Gun"
        metrics = server.http.get("/metrics").text
        assert re.search(r'dit_refusals_total\{[^}]*stage="frames"[^}]*\} 1', metrics)
        for secret in ("secret-token", "hidden", "Gun"):
            assert secret not in server.log()
        assert "content_policy_violation by words" in server.log()
    finally:
        assert server.stop() == 0
