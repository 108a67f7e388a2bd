"""Prompt expansion against a chat endpoint on this machine: answers, errors, cache, receipt."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import runtime
from runtime import Request
from runtime.__main__ import main
from runtime.expansion import KEY, Expansion, by_rules, expand


class Endpoint:
    """A chat endpoint that says what it is told to; remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, object]] = []
        self.asked: list[tuple[dict, str | None]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.asked.append((body | {"path": self.path}, self.headers.get("Authorization")))
                status, answer = endpoint.answers.pop(0) if len(endpoint.answers) > 1 else endpoint.answers[0]
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def says(text: object) -> dict:
    return {"choices": [{"message": {"content": text}}]}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr("runtime.expansion.time.sleep", lambda _: None)
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_it_asks_and_remembers(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    endpoint.answers = [(200, says(" a red ball \n rolls over grass "))]
    who = Expansion(model="writer", url=endpoint.url + "/")
    assert expand("a ball", who, "write captions") == ("a red ball rolls over grass", [])
    assert expand("a ball", who, "write captions") == ("a red ball rolls over grass", [])
    assert len(endpoint.asked) == 1
    body, key = endpoint.asked[0]
    assert (body["model"], body["path"], key) == ("writer", "/v1/chat/completions", "Bearer secret")
    assert [m["content"] for m in body["messages"]] == ["write captions", "a ball"]
    expand("a ball", who, "write other captions")
    assert len(endpoint.asked) == 2


def test_it_tries_again_where_that_may_help(endpoint: Endpoint) -> None:
    endpoint.answers = [(503, {}), (429, {}), (200, says("done"))]
    assert expand("a", Expansion(model="m", url=endpoint.url), "x")[0] == "done"
    assert len(endpoint.asked) == 3
    endpoint.answers = [(401, {})]
    with pytest.raises(ConnectionError, match="answers 401"):
        expand("b", Expansion(model="m", url=endpoint.url), "x")
    assert len(endpoint.asked) == 4


@pytest.mark.parametrize("answer", [b"not json", {}, {"choices": []}, says(None), says("  ")])
def test_answers_without_words(endpoint: Endpoint, answer: object) -> None:
    endpoint.answers = [(200, answer)]
    with pytest.raises(ValueError, match="answer"):
        expand("a", Expansion(model="m", url=endpoint.url), "x")


def test_a_dead_endpoint(endpoint: Endpoint) -> None:
    dead = Expansion(model="m", url="http://127.0.0.1:9/v1", timeout=1)
    with pytest.raises(ConnectionError, match="127.0.0.1:9/v1/chat/completions does not expand"):
        expand("a", dead, "x")
    kept, (note,) = expand("a", Expansion(model="m", url=dead.url, timeout=1, optional=True), "x")
    assert kept == "a"
    assert "not expanded" in note


def test_the_receipt_holds_both(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answers = [(200, says("a red ball rolls left over green grass"))]
    receipt, out = tmp_path / "r.json", str(tmp_path / "out.mp4")
    command = ["generate", "ball", "--frames", "5", "--steps", "1", "--seed", "1", "--quiet", "-o", out, "--expand"]
    assert main([*command, "--expand-url", endpoint.url, "--expand-model", "m", "--receipt", str(receipt)]) == 0
    record = json.loads(receipt.read_text())
    assert record["request"]["prompt"] == "ball"
    assert record["expanded"] == {"ball": "a red ball rolls left over green grass"}
    model = runtime.load("demo")
    plain = Request(prompt="a red ball rolls left over green grass", num_frames=5, steps=1, seed=1)
    again = runtime.generate(model, Request.from_receipt(receipt))
    assert (again.frames == runtime.generate(model, plain).frames).all()


@pytest.mark.usefixtures("endpoint")  # which waits for nothing between its tries
def test_the_command_line_goes_on_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody answers: without "optional" nothing is made, with it the prompt is taken, and the receipt says so."""
    out, receipt = tmp_path / "a.png", tmp_path / "r.json"
    who = ["--expand-url", "http://127.0.0.1:9/v1", "--expand-model", "m", "--receipt", str(receipt)]
    command = ["image", "a red ball", "--steps", "1", "--quiet", *who, "-o", str(out), "--expand"]
    assert main(command) == 2 and not out.exists()
    assert "error: the endpoint" in capsys.readouterr().err
    assert main([*command, "optional"]) == 0
    assert "note: the prompt was not expanded: the endpoint" in capsys.readouterr().err
    record = json.loads(receipt.read_text())
    assert out.exists() and record["expanded"] == {"a red ball": "a red ball"}
    assert "not expanded: the endpoint" in record["notes"][0]


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "a.mp4"), "--steps", "1", "--frames", "1"]
    assert main(["image", "a", "--expand", "--expand-url", "http://localhost:1", "-o", str(tmp_path / "a.png")]) == 2
    assert "no model is named" in capsys.readouterr().err
    assert main(["generate", "a", "--expand", "--expand-model", "m", "--expand-url", "ftp://x", *out]) == 2
    assert "legal: http://" in capsys.readouterr().err
    assert main(["generate", "a", "--expand", "--expand-model", "/nowhere", *out]) == 2
    assert "no chat model" in capsys.readouterr().err


def test_a_model_on_this_machine(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tests.published import DEMO, randomise

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    randomise(LlamaForCausalLM(config), 0).save_pretrained(tmp_path)
    first = expand("a red ball", Expansion(model=str(tmp_path)), "write")[0]
    assert first.strip()
    assert expand("a red ball", Expansion(model=str(tmp_path), timeout=5), "write")[0] == first


def test_a_checkpoint_brings_its_own_rules() -> None:
    model = runtime.load("demo")
    request = Request(prompt="A red ball rolls left on grass.", steps=1, num_frames=1, seed=0, expand=Expansion())
    receipt = runtime.generate(model, request).receipt
    said = "A red ball rolls left on grass by day under a clear sky, the camera stands still"
    assert receipt.expanded == {"A red ball rolls left on grass.": said}
    with pytest.raises(ValueError, match="brings no rules"):
        by_rules("a", None)
    kept, (note,) = expand("a", Expansion(optional=True), "x")
    assert kept == "a" and "brings no rules" in note
    with pytest.raises(ValueError, match="no model is named"):
        Expansion(url="http://localhost:1/v1")
