"""The ladder, the thread that decodes ahead, dtypes, constant memory."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runtime
from runtime.decoding import Rung, ahead, decode_chunks, fitting, ladder
from runtime.receipt import Receipt
from tests.failing import Failing
from tests.published import Tiny, write

LATENTS = torch.randn(4, 3, 30, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    folder = tmp_path_factory.mktemp("tiny")
    write(Tiny(), folder)
    return runtime.load(folder)


@pytest.fixture(scope="module")
def whole(model: runtime.Model) -> np.ndarray:
    return runtime.decode(model, LATENTS).frames


@pytest.mark.parametrize("failures", [[0], [1], [2], [0, 0], [1, 2], [2, 2]])
def test_out_of_memory_steps_down_and_loses_nothing(
    model: runtime.Model, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch, failures: list[int]
) -> None:
    network = Failing(model.vae, list(failures))
    monkeypatch.setattr(model, "vae", network)
    notes: list[str] = []
    tried: list[str] = []
    shape = LATENTS[None]
    frames = np.concatenate(list(decode_chunks(model, shape, None, torch.float32, notes, tried)))
    assert frames.shape == whole.shape
    # The rungs agree to rounding in float32; a level of 255 may flip where it lies on the edge.
    assert np.abs(frames.astype(int) - whole.astype(int)).max() <= 1
    assert len(notes) == len(failures) == len(tried) - 1
    assert "whole frames ran out of memory" in notes[0]
    assert "went on with tiles of" in notes[-1]
    assert network.tiles[0] is None
    assert all(tile is not None for tile in network.tiles[1:])


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(failures=st.lists(st.integers(0, 2), max_size=5).map(sorted))
def test_any_frames_at_every_rung_down_to_the_cpu(model: runtime.Model, whole: np.ndarray, failures: list[int]) -> None:
    """As on a GPU, whose ladder ends on the CPU: the video is the same whatever ran out of memory, wherever."""
    network, notes, tried = Failing(model.vae, list(failures)), [], []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "vae", network)
        patched.setattr("runtime.decoding.ladder", lambda *given: [*ladder(*given), Rung("the CPU", None, True)])
        frames = np.concatenate(list(decode_chunks(model, LATENTS[None], None, torch.float32, notes, tried)))
    apart = np.abs(frames.astype(int) - whole.astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 1e-4  # to rounding: a level flips only where it lies on the edge
    assert len(notes) == len(failures)
    assert len(network.tiles) == len(failures) + 1
    for note, frame in zip(notes, failures, strict=True):
        assert f"ran out of memory at latent frame {frame} of 3" in note
    if len(failures) == 5:
        assert notes[-1].endswith("went on with the CPU")


def test_the_last_rung_raises(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [rung.tile for rung in ladder(model, 240, 384, None)]
    assert tiles == [None, (240, 224), (152, 224), (128, 160), (96, 112)]
    tall = [rung.tile for rung in ladder(model, 1280, 720, None)][1:3]
    assert tall == [(672, 720), (672, 392)]  # halves of the longer side first, then two by two; halo on one side
    monkeypatch.setattr(model, "vae", Failing(model.vae, [0] * 9))
    with pytest.raises(torch.OutOfMemoryError):
        list(decode_chunks(model, LATENTS[None], None, torch.float32, [], []))


def test_other_errors_are_not_taken_for_it(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Failing(model.vae, [])
    monkeypatch.setattr(network, "decode_stream", lambda *_: iter(int(x) for x in "a"))
    monkeypatch.setattr(model, "vae", network)
    with pytest.raises(ValueError, match="invalid literal"):
        list(decode_chunks(model, LATENTS[None], None, torch.float32, [], []))


def test_notes_stand_in_the_receipt(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    request = runtime.Request(prompt="a", width=352, height=240, num_frames=5, steps=1, seed=0)
    monkeypatch.setattr(model, "vae", Failing(model.vae, [None, 1]))  # the first call only checks the tile
    video = runtime.generate(model, request)
    assert len(list(video)) == 5
    assert "ran out of memory at latent frame 1 of 2" in video.receipt.notes[0]
    assert video.receipt.decoding[0] == "whole frames"
    assert video.receipt.decoding[1].startswith("tiles of")


@settings(deadline=None, max_examples=30)
@given(count=st.integers(0, 12), depth=st.integers(1, 4))
def test_ahead_keeps_order_and_is_bounded(count: int, depth: int) -> None:
    made = []

    def make() -> Iterator[int]:
        for i in range(count):
            made.append(i)
            yield i

    taken = []
    for item in ahead(make, depth):
        taken.append(item)
        assert len(made) <= len(taken) + depth + 1
    assert taken == list(range(count))


def test_ahead_works_while_the_consumer_does() -> None:
    reached = threading.Event()

    def make() -> Iterator[int]:
        yield 0
        reached.set()
        yield 1

    items = ahead(make)
    assert next(items) == 0
    assert reached.wait(5)
    items.close()


def test_ahead_raises_and_stops() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("x")

    items = ahead(broken)
    assert next(items) == 1
    with pytest.raises(KeyError):
        next(items)
    before = threading.active_count()
    endless = ahead(lambda: iter(range(10**9)))
    next(endless)
    endless.close()
    for _ in range(50):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_another_dtype() -> None:
    model = runtime.load("demo")
    video = runtime.generate(model, runtime.Request(prompt="a red ball rolls left over green grass", seed=7))
    rounded = runtime.decode(model, video.latents, dtype="bfloat16").frames.astype(float)
    assert 0 < np.mean((rounded - video.frames) ** 2) < 255**2 / 10**5.0  # 50 dB, bytes' own rounding included
    with pytest.raises(ValueError, match="legal: auto, float32"):
        runtime.decode(model, video.latents, dtype="int8")
    exact, near = (
        runtime.decode(model, runtime.encode(model, video.frames[:5], dtype=dtype)).frames.astype(float)
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.mean((near - exact) ** 2) < 255**2 / 10**5.0


def test_where_16_bits_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: both ways, said in the receipt, and the kernels laid out before they are rounded."""
    whole = runtime.load("demo")
    monkeypatch.setattr("runtime.model.vae_dtype", lambda device, dtype: torch.bfloat16)
    model = runtime.load("demo")
    kept = whole.checkpoint.vae.keep_float32
    for (name, exact), rounded in zip(whole.vae.named_parameters(), model.vae.parameters(), strict=True):
        assert torch.equal(exact if kept(name) else exact.to(torch.bfloat16), rounded)
    assert {name.rpartition(".")[0] for name, _ in whole.vae.named_parameters() if kept(name)} == {
        "quant_conv", "post_quant_conv", "decoder.conv_in", "encoder.conv_out",
    }  # fmt: skip
    assert model.autoencoder(model.device, torch.bfloat16) is model.vae
    clip = runtime.Clip(np.full((5, 64, 64, 3), 90, np.uint8))
    request = runtime.Request(prompt="a", width=64, height=64, num_frames=9, steps=1, seed=0, clips=(clip,))
    video = runtime.generate(model, request)
    assert len(list(video)) > 0
    assert [text.split(";")[0] for text in video.receipt.approximations] == [
        "known frames encoded in 16 bits", "decoded in 16 bits",
    ]  # fmt: skip
    wide = model.autoencoder(model.device, torch.float32)
    for exact, again in zip(whole.vae.parameters(), wide.parameters(), strict=True):
        assert torch.equal(exact, again)


MEMORY = """
import sys, numpy as np, torch, runtime, runtime.video
from pathlib import Path

runtime.video.KEEP_BYTES = 0
way, count = sys.argv[1], int(sys.argv[2])
model = runtime.load("demo")

def read(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

def run(frames):
    if way == "decode":
        for frame in runtime.decode(model, torch.zeros(32, (frames + 3) // 4, 8, 8)):
            pass
    else:
        source = lambda: (np.zeros((64, 64, 3), np.uint8) for _ in range(frames))
        runtime.encode(model, runtime.Video(source, fps=8, num_frames=frames, height=64, width=64))

run(5)
before = read("VmRSS")
run(count)
print(read("VmHWM"), read("VmHWM") - before)
"""


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_memory_does_not_grow_with_the_clip(way: str) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    peaks, grown = [], []
    for frames in (17, 81, 321):
        command = [sys.executable, "-c", MEMORY, way, str(frames)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, growth = map(int, run.stdout.split())
        peaks.append(peak)
        grown.append(growth)
    assert max(peaks) <= 1.05 * min(peaks), peaks
    assert max(grown) - min(grown) < 12 << 20, grown  # the allocator's; 321 frames alone are 15 MiB in float32


def test_encoding_a_video_takes_frames_as_they_come(model: runtime.Model) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    taken: list[int] = []

    def source() -> Iterator[np.ndarray]:
        for i, frame in enumerate(frames):
            taken.append(i)
            yield frame

    video = runtime.Video(source, fps=8, num_frames=9, height=32, width=48)
    assert torch.equal(runtime.encode(model, video), runtime.encode(model, frames))
    assert taken == list(range(9))


def test_a_decode_begins_with_what_fits(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole frames, tiles where memory is short, what takes least where nothing fits; a budget's own tile before."""
    latents = torch.randn(4, 2, 60, 104, generator=torch.Generator().manual_seed(0))
    shape = (2, 60, 104)
    needed = {
        rung.name: model.costs.decode(shape, rung.tile, 4, parked=False).live for rung in ladder(model, 480, 832, None)
    }
    whole, tiles, *_ = needed
    least = min(needed, key=needed.__getitem__)
    assert needed[least] < needed[tiles] < needed[whole] < needed[list(needed)[-1]]
    expected = runtime.decode(model, latents).frames
    for free, begun in ((2 * needed[whole], whole), (1.1 * needed[tiles], tiles), (0, least)):
        monkeypatch.setattr("runtime.decoding.free_memory", lambda _, free=free: free)
        receipt = cast(Receipt, SimpleNamespace(approximations=[], stages={}, notes=[], decoding=[]))
        frames = np.stack(list(runtime.decode(model, latents, receipt=receipt)))
        assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 1
        assert not receipt.notes
        assert receipt.decoding == [begun]
    assert fitting(replace(model, memory=1, tile=(96, 112)), shape, torch.float32) == (96, 112)
