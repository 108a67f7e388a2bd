"""What profilers are told: the names of the receipt and finer ones, with colours and numbers, and nothing unasked."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import runtime
from runtime import trace

SMALL = runtime.Request(prompt="a red ball", width=64, height=64, num_frames=5, steps=3, seed=1)


class Listener:
    """Stands where nvtx.Domain stands when a tool is attached."""

    def __init__(self) -> None:
        self.open: list[Any] = []
        self.seen: list[Any] = []

    def get_event_attributes(self, **attributes: Any) -> SimpleNamespace:
        return SimpleNamespace(**attributes)

    def push_range(self, attributes: Any) -> None:
        self.open.append(attributes)
        self.seen.append((*(each.message for each in self.open[:-1]), attributes))

    def pop_range(self) -> None:
        self.open.pop()


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    found = Listener()
    trace._attributes.cache_clear()
    monkeypatch.setattr(trace, "_domain", found)
    yield found
    trace._attributes.cache_clear()


def test_a_request_in_nvtx(listener: Listener) -> None:
    model = runtime.load("demo")
    video = runtime.generate(model, SMALL)
    assert video.frames.shape[0] == 5 and listener.open == []
    blocks = len(model.transformers[0].blocks)
    calls = Counter(attributes.message for *_, attributes in listener.seen)
    steps, chunks = 3, 2
    assert calls["denoise/step"] == steps and calls["denoise/block"] == steps * blocks
    assert calls["denoise/attention"] == calls["denoise/mlp"] == steps * blocks
    assert calls["decode"] >= chunks and calls["request"] == calls["text"] == 1
    around = {attributes.message: outside for *outside, attributes in listener.seen}
    assert around["denoise/mlp"] == ["request", "denoise", "denoise/step", "denoise/block"]
    numbers = [attributes.payload for *_, attributes in listener.seen if attributes.message == "denoise/step"]
    assert numbers == [1, 2, 3]
    assert all(attributes.color == trace.COLOURS[attributes.category] for *_, attributes in listener.seen)
    assert set(video.receipt.stages) <= set(calls), "a stage of the receipt that profilers do not see"


def test_nothing_is_made_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "Mark", None)
    assert runtime.generate(runtime.load("demo"), SMALL).frames.shape[0] == 5


def test_the_real_package_takes_our_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tool it hands out a domain that does nothing; ours is then absent."""
    monkeypatch.delenv(trace.TOOL, raising=False)
    assert trace.nvtx is not None and trace._find_domain() is None
    domain = object.__new__(trace.nvtx.Domain)
    monkeypatch.setattr(trace.nvtx, "get_domain", lambda name: domain)
    assert trace._find_domain() is domain


def test_a_tool_that_calls_every_domain_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Nsight Systems 2023.4 does: there is a real domain nevertheless, which takes ranges."""
    monkeypatch.setenv(trace.TOOL, "/a/tool.so")
    monkeypatch.setattr(trace, "_domain", trace._find_domain())
    trace._attributes.cache_clear()
    assert isinstance(trace._domain, trace.nvtx.Domain)
    with trace.mark("denoise/step", 3), trace.mark("denoise/block"):
        pass
    trace._attributes.cache_clear()


def test_the_profiler_of_pytorch_sees_the_same_names() -> None:
    model = runtime.load("demo")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _ = runtime.generate(model, SMALL).frames
    names = Counter(event.name for event in profiler.events())
    assert names["denoise/step"] == 3 and names["denoise/mlp"] == names["denoise/attention"] > 3
    assert {"request", "text", "denoise", "decode"} <= names.keys()


def test_a_watcher_sees_spans_begin_and_end() -> None:
    seen: list[tuple[str, bool]] = []
    watching = trace.watched(lambda name, entered: seen.append((name, entered)))
    with watching, trace.span("a"), pytest.raises(KeyError), trace.span("b"):
        raise KeyError
    with trace.span("c"):
        pass
    assert seen == [("a", True), ("b", True), ("b", False), ("a", False)]
