"""The rivals do what they say at both ends of their thresholds; the table and the picture of a small run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import runtime
from benchmarks.__main__ import main
from benchmarks.alternatives import FirstBlock, OneRow
from benchmarks.quality import kept, matched, ours, plain
from benchmarks.rivals import EasyCache, TeaCache, polynomial
from benchmarks.scatter import scatter
from runtime import budget

REQUEST = runtime.Request(prompt="a red ball", width=64, height=64, num_frames=5, steps=10, seed=2)


@pytest.fixture(scope="module")
def model() -> runtime.Model:
    return runtime.load("demo", device="cpu")


def test_rivals_at_both_ends(model: runtime.Model) -> None:
    request = REQUEST.resolved(model.spec)
    exact = ours(model, "exact", request)
    fit = polynomial(model, request)
    for wrap, least in ((partial(TeaCache, fit=fit), 2), (EasyCache, 3)):  # the last, and the first or a fifth
        closed = plain(model, lambda wrap=wrap: wrap(model, 10, threshold=0.0), 10, request)
        open_wide = plain(model, lambda wrap=wrap: wrap(model, 10, threshold=1e9), 10, request)
        assert closed.asked == exact.asked == 10
        assert np.array_equal(closed.frames, exact.frames)
        assert open_wide.asked == least
        assert not np.array_equal(open_wide.frames, exact.frames)


def test_alternatives_at_both_ends(model: runtime.Model) -> None:
    request = REQUEST.resolved(model.spec)
    exact, blocks = ours(model, "exact", request), len(model.transformers[0].blocks)
    for wrap, asked in (
        (lambda: OneRow(model, 10, reuse=True), 10),
        (lambda: OneRow(model, 4, reuse=True), 7),
        (lambda: OneRow(model, 4, reuse=False), 7),
        (lambda: FirstBlock(model, 10, 0.0), 10),
        (lambda: FirstBlock(model, 10, 1e9), 2 + 8 / blocks),
    ):
        take = plain(model, wrap, 10, request)
        assert take.asked == pytest.approx(asked)
        assert np.array_equal(take.frames, exact.frames) == (asked == 10)


def test_a_threshold_asks_no_less_than_ours(model: runtime.Model) -> None:
    requests = [REQUEST.resolved(model.spec)]
    fit = polynomial(model, requests[0])

    def make(limit: float) -> partial:
        return partial(plain, model, lambda: TeaCache(model, 10, limit, fit), 10)

    limit = matched(make, 5, requests)
    assert 5 <= make(limit)(requests[0]).asked < 10
    assert make(limit * 1.5 + 0.01)(requests[0]).asked <= make(limit)(requests[0]).asked


def test_kept_is_the_worst_but_one_in_twenty() -> None:
    assert kept([30.0 + i for i in range(32)]) == 31
    assert kept([30.0, 50.0]) == 30


def test_the_picture_is_svg_with_a_dot_for_each() -> None:
    root = ElementTree.fromstring(scatter([("high", 2.0, 33.0), ("TeaCache beside <high>", 2.1, 25.5)]))
    dots = [element for element in root if element.tag.endswith("circle")]
    assert len(dots) == 2
    assert float(dots[1].get("cx")) > float(dots[0].get("cx"))
    assert float(dots[1].get("cy")) > float(dots[0].get("cy"))


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "TABLE_STEPS", 8)
    file = tmp_path / "found.json"
    small = ["--width", "64", "--height", "64", "--frames", "5", "--steps", "8", "--device", "cpu"]
    assert main(["stages", "--quality", "--prompts", "2", "--json", str(file), *small]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert names[:5] == ["exact", "high", "fast", "38 dB", "30 dB"]
    assert sum("beside" in name for name in names) == 6
    samples = json.loads(file.read_text())["samples"]
    assert all(len(found["psnr"]) == 2 for found in samples.values())
    assert file.with_suffix(".svg").exists()
