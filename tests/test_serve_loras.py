"""LoRAs that requests name: as a model loaded with them makes it, and nothing of them left for who comes after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import runtime
from runtime.lora import Lora
from runtime.model import DEMO
from runtime.serve.settings import read_settings
from tests.serving import TINY, Server, frames_of

RANK = 4


def lora(file: Path, seed: int, width: int) -> Path:
    """Write a LoRA of two matrices of the built-in model."""
    generator = torch.Generator().manual_seed(seed)
    halves = {"lora_A": (RANK, width), "lora_B": (width, RANK)}
    save_file(
        {
            f"transformer.blocks.{block}.attn1.to_{part}.{half}.weight": torch.randn(shape, generator=generator) / RANK
            for block, part in ((0, "q"), (1, "v"))
            for half, shape in halves.items()
        },
        file,
    )
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    config = json.loads((DEMO / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return {name: lora(folder / f"{name}.safetensors", seed, width) for seed, name in enumerate(("warm", "grain"))}


@pytest.fixture(scope="module")
def server(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--dtype", "bfloat16", "--warm", "64x64x5"]
    flags += ["--lora", f"warm={files['warm']}:0.5", "--lora", f"grain={files['grain']}"]
    started = Server(tmp_path_factory.mktemp("data") / "served", *flags)
    yield started
    assert started.stop() == 0


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("warm", {"warm": 0.5}),
        ("warm:0.9", {"warm": 0.9}),
        (["grain:-1", "warm"], {"grain": -1.0, "warm": 0.5}),
        ([{"name": "warm", "scale": 2}], {"warm": 2.0}),
    ],
)
def test_made_as_with_the_file(server: Server, files: dict[str, Path], tmp_path: Path, asked: Any, meant: Any) -> None:
    plain = server.done(server.create()["id"])
    worn = server.done(server.create(TINY | {"lora": asked})["id"])
    again = server.done(server.create()["id"])
    loras = [Lora(files[name], strength) for name, strength in meant.items()]
    request = runtime.Request(prompt=TINY["prompt"], width=64, height=64, num_frames=5, steps=2, seed=3)
    expected = runtime.generate(runtime.load("demo", dtype="bfloat16", loras=loras), request)
    expected.save(tmp_path / "expected.mp4")
    first, second, third = (frames_of(server.content(video["id"])) for video in (plain, worn, again))
    assert (second == frames_of((tmp_path / "expected.mp4").read_bytes())).all()
    assert (first == third).all() and (first != second).any()
    said = [name.partition(":")[0] for name in worn["lora"]]
    assert said == list(meant) and worn["receipt"]["loras"] == worn["lora"] and "lora" not in again
    assert worn["receipt"]["model_hash"] == expected.receipt.model_hash != plain["receipt"]["model_hash"]
    assert worn["receipt"]["dtype"] == "bfloat16"
    assert str(files["warm"].parent) not in json.dumps(worn)


@pytest.mark.fault(14, 15)
@pytest.mark.parametrize(
    "asked",
    [
        "cold", "../../etc/passwd", "/etc/passwd:0.5", "warm:strong", "warm:1e9", "warm:nan", ["warm", "warm:0.2"],
        {"name": "warm", "path": "/etc/passwd"}, [["warm"]], 3, ["warm"] * 9,
        {"name": "warm", "scale": 1, "strength": 1},
    ],
)  # fmt: skip
def test_no_name_is_a_path(server: Server, asked: Any) -> None:
    answer = server.http.post("/v1/videos", json=TINY | {"lora": asked})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "lora"
    if asked == "cold":
        assert "legal: warm, grain" in answer.json()["error"]["message"]


@pytest.mark.parametrize("fields", [{"lora_strength": 1}, {"lora_name": "warm", "lora": "warm"}])
def test_names_as_other_clients_write_them(server: Server, fields: dict[str, Any]) -> None:
    answer = server.http.post("/v1/videos", json=TINY | fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora", answer.text


def test_where_else_they_are_told_of(server: Server) -> None:
    assert server.http.get("/v1/models").json()["data"][0]["loras"] == ["warm", "grain"]
    with runtime.Client(server.url) as client:
        assert client.plan(prompt="a", lora="warm")["lora"] == ["warm"]
        assert client.plan(prompt="a", lora_name="warm", lora_strength=0.5)["lora"] == ["warm:0.5"]
        assert client.image("a ball", size="64x64", num_inference_steps=1, lora=["grain:0.3"])
        said = [("prompt", "a"), ("num_frames", "5"), ("lora[]", "warm:0.1"), ("lora[]", "grain")]
        form = server.http.post("/v1/videos", files=[(name, (None, value)) for name, value in said])
        draft = client.create("a ball", quality="draft", num_frames=5, num_inference_steps=1, lora="warm:0.25")
        final = client.finish(client.wait(draft), size="64x64", num_inference_steps=1)
    assert form.json()["lora"] == ["warm:0.1", "grain"] and final["lora"] == ["warm:0.25"]
    server.done(final["id"])


def test_what_an_operator_may_say(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('lora = "warm=a.safetensors"\nwebhook_host = "example.com"\nwebhook_secret = "secret"\n')
    settings = read_settings(["--config", str(config)])
    assert settings.lora == ("warm=a.safetensors",) and settings.webhook_host == ("example.com",)
    assert settings.webhook_secret == Path("secret")
    for wrong in ("a.safetensors", "=a.safetensors", "../x=a.safetensors", "warm="):
        with pytest.raises(ValueError, match="legal: NAME=FILE"):
            read_settings(["--lora", wrong])
