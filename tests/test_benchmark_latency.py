"""`python -m benchmarks latency`, `compare` and `serve`: what they write, print and refuse. No timing is judged."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compare, latency, machine, plot, serve, true_size
from benchmarks.__main__ import main
from runtime.models.wan.published import NETWORKS, UMT5_XXL
from runtime.models.wan.vae_config import VAEConfig
from runtime.text import cache_folder
from tests.serving import Server

QUICK = ["latency", "--device", "cpu", "--threads", "1", "--steps", "2", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows are measured in this process: another one each takes most of the time."""
    monkeypatch.setattr(latency, "fresh_process", lambda function, *given: function(*given))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published model is a small one."""
    numbers = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 16}
    monkeypatch.setitem(NETWORKS, "wan2.1-t2v-1.3b", numbers | {"freq_dim": 32})
    text = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3, "vocab_size": 4096}
    for key, value in text.items():
        monkeypatch.setitem(UMT5_XXL, key, value)
    made = VAEConfig(base_dim=4, num_res_blocks=1)
    for module in (true_size, sys.modules["runtime.models.wan.published"]):  # its package has a function of that name
        monkeypatch.setattr(module, "vae_config", lambda channels: made)


@pytest.mark.usefixtures("small")
def test_rows_of_random_weights_beside_diffusers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sides have the same random weights, which are never on disk, and make the same video."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compiled.append(self))
    file, model = tmp_path / "a.json", "wan2.1-t2v-1.3b@random"
    asked = ["--model", model, "--sizes", "32x32,33x32", "--frames", "5", "--against", "both"]
    assert main([*QUICK, *asked, "--dtype", "float32", "--json", str(file)]) == 0
    ours, theirs, faster, *refused = json.loads(file.read_text())["rows"]
    assert len(compiled) == 2 and faster["side"] == "diffusers, compiled"
    for row in (ours, theirs, faster):
        assert "reason" not in row, row["reason"]
        assert set(row["seconds"]) == {"load", "cold", "total", "text", "step", "decode", "encode"}
        assert all(len(samples) == 2 and min(samples) > 0 for samples in list(row["seconds"].values())[2:])
        assert row["memory"]["before"] + row["memory"]["growth"] > 2**20 and row["steps"] == 2
        assert row["floor"]["basis"] == "measured" and row["floor"]["predicted"]["total"] > 0
    assert (ours["side"], ours["engine"], theirs["side"]) == ("dit-runtime", "eager", "diffusers")
    assert theirs["difference"] <= 1
    assert all("take 32x32 or 34x32" in row["reason"] for row in refused) and len(refused) == 3
    told = capsys.readouterr().out
    assert re.search(
        r"\| 32x32 x 5 \| eager \| 2 \|.*GiB \| \d+% \| \d+\.\d\d, \d+\.\d\d \| 50: .* s, extrapolated \|", told
    )
    assert main(["latency", "--show", str(file)]) == 0 and capsys.readouterr().out == told
    assert "not measured: the size is 33x32" in told
    picture = ElementTree.parse(file.with_suffix(".svg")).getroot()
    assert len([each for each in picture.iter() if each.tag.endswith("rect")]) == 1 + 3 * 4
    true_size.write_configs(tmp_path / "m", "wan2.1-t2v-1.3b")
    assert not list((tmp_path / "m").rglob("*.safetensors"))


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row is interrupted; the first stays and is not measured again."""
    file, measured = tmp_path / "a.json", list[str]()

    def row(cell: latency.Cell, settings: latency.Settings, _: latency.Processes) -> dict[str, Any]:
        measured.append(cell.size)
        known = cache_folder() / "a prompt.safetensors"
        assert not known.exists(), "a row has no text from the row before"
        known.parent.mkdir(parents=True)
        known.touch()
        if len(measured) == 2:
            raise KeyboardInterrupt
        return vars(cell) | {"dtype": "float32", "reason": "so it is"}

    monkeypatch.setattr(latency, "row", row)
    asked = [*QUICK, "--sizes", "64x64,96x64,96x96"]
    assert main([*asked, "--json", str(file)]) == 130
    assert [each["size"] for each in json.loads(file.read_text())["rows"]] == ["64x64"]
    assert main([*asked, "--resume", str(file)]) == 0
    assert [each["size"] for each in json.loads(file.read_text())["rows"]] == ["64x64", "96x64", "96x96"]
    assert measured == ["64x64", "96x64", "96x64", "96x96"]
    assert main([*QUICK, "--steps", "3", "--resume", str(file)]) == 2, "of other settings"
    assert main([*asked, "--budget", "-1", "--json", str(tmp_path / "b.json")]) == 0, "no row, no fault"


class InThisProcess:
    """A new process, as far as its memory of a side goes."""

    begun = 0

    def __init__(self) -> None:
        InThisProcess.begun += 1
        latency._loaded.clear()

    def __call__(self, function: Callable[..., Any], *given: Any) -> Any:
        return function(*given)

    def end(self) -> None:
        pass


@pytest.mark.usefixtures("small")
def test_sizes_of_a_side_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A side is loaded once for its sizes; requests are put together from stages; what no longer fits is named."""
    monkeypatch.setattr(latency, "FreshProcess", InThisProcess)
    monkeypatch.setattr(InThisProcess, "begun", 0)
    file = tmp_path / "a.json"
    asked = ["--model", "wan2.1-t2v-1.3b@random", "--sizes", "32x32,48x32", "--frames", "5", "--against", "diffusers",
             "--dtype", "float32", "--together", "--budget", "400"]  # fmt: skip
    known = latency.floor

    def ideal(settings: latency.Settings, request: Any) -> dict[str, Any]:
        seconds = 1e3 if request.width == 48 else 1.0
        return known(settings, request) | {
            "basis": "ideal",
            "predicted": dict.fromkeys(("step", "decode", "total"), seconds),
        }

    monkeypatch.setattr(latency, "floor", ideal)
    assert main([*QUICK, *asked, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["left_out"] == ["48x32 x 5, eager", "48x32 x 5, diffusers"]
    monkeypatch.setattr(latency, "floor", known)
    assert main([*QUICK, *asked, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["side"], row["size"]) for row in rows] == [
        ("dit-runtime", "32x32"), ("dit-runtime", "48x32"), ("diffusers", "32x32"), ("diffusers", "48x32"),
    ]  # fmt: skip
    assert InThisProcess.begun == 4 and ["load" in row["seconds"] for row in rows] == [True, False, True, False]
    assert all({"text", "step", "decode"} == set(row["seconds"]) - {"load"} for row in rows)
    assert rows[3]["difference"] <= 1
    shown = capsys.readouterr().out
    assert shown.count(", combined |") == 6 and "Left out when the time was up: 48x32 x 5, eager; 48x32" in shown
    assert "put together from them for so many steps, not run." in shown


def test_weights_that_do_not_stay_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's answer stands in the row, and nothing is loaded."""
    offload = {"text_encoder": "released", "transformer": "streamed", "blocks": 3}
    plan = SimpleNamespace(choices={"offload": offload}, memory=2**34, most=2**33, seconds={"total": 12.0})
    monkeypatch.setattr(latency, "plan_request", lambda *given, **asked: plan)
    monkeypatch.setattr(latency, "fresh_process", lambda *given: pytest.fail("it was measured"))
    assert main([*QUICK, "--sizes", "64x64", "--frames", "1", "--json", str(tmp_path / "a.json")]) == 0
    [row] = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert "into 16.00 GiB only by weights that come and go" in row["reason"] and "streamed: 8.00 GiB" in row["reason"]


def test_unequal_frames_lose_their_numbers() -> None:
    ours = {"size": "a", "frames": 1, "side": "dit-runtime", "engine": "eager", "dtype": "float32", "shown": "00ff"}
    theirs = ours | {"side": "diffusers", "engine": "", "shown": "04ff", "seconds": {"total": [1.0]}}
    found = latency.compared(theirs, [ours])
    assert "seconds" not in found and "differs by up to 4 of 255" in found["reason"]
    assert latency.compared(theirs | {"dtype": "bfloat16"}, [ours])["difference"] == 2.0
    assert latency.compared(ours, []) == ours


def test_random_weights_of_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--model", "no-model@random"]) == 2
    assert "legal: wan2.1-t2v-1.3b@random" in capsys.readouterr().err


def results(file: Path, **seconds: list[float]) -> str:
    rows = [
        {"size": "480p", "frames": 17, "engine": name, "seconds": {"total": each}} for name, each in seconds.items()
    ]
    file.write_text(json.dumps({"benchmark": "latency", "rows": rows}))
    return str(file)


def test_changes_beyond_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(tmp_path / "a", eager=[1.0, 1.1, 0.9], inductor=[1.0, 1.1, 0.9], gone=[1.0], once=[1.0])
    after = results(tmp_path / "b", eager=[1.05, 1.15, 0.95], inductor=[2.0, 2.1, 1.9], once=[1.04], new=[1.0])
    assert main(["compare", before, after]) == 1
    told = capsys.readouterr().out
    assert "3 measurements in both, 1 changed beyond noise" in told
    assert "2.000 x  1.000 s -> 2.000 s  rows 480p 17 inductor total" in told
    assert main(["compare", after, before]) == 0, "faster is no fault"
    Path(after).write_text(json.dumps({"benchmark": "stages"}))
    assert main(["compare", before, after]) == 2


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.floats(0.5, 2))
def test_a_change_is_seen_the_same_both_ways(samples: list[float], factor: float) -> None:
    other = [sample * factor for sample in samples]
    there, back = (compare.changes({"a": one}, {"a": two})[0] for one, two in ((samples, other), (other, samples)))
    if len(samples) > 1 or not 0.9 < factor < 1.1:
        assert bool(there) == bool(back) or 0.97 < factor < 1.03
    assert not compare.changes({"a": samples}, {"a": samples})[0]


def test_results_in_the_repository_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = (machine.RESULTS / "README.md").read_text()
    measured = [file for file in machine.RESULTS.glob("*/*.json") if "benchmark" in json.loads(file.read_text())]
    assert measured
    for file in measured:
        assert f"({file.relative_to(machine.RESULTS).as_posix()})" in listed, "python -m benchmarks writes the listing"
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    about = {"name": "A GPU", "device": "cuda", "commit": "abc", "date": "2026-01-02T03:04:05"}
    machine.keep({"benchmark": "stages", "machine": about}, machine.results_file(about))
    assert "| 2026-01-02 | stages | A GPU | abc | [a-gpu/2026-01-02-abc.json]" in (tmp_path / "README.md").read_text()


def test_a_plot_of_lines() -> None:
    root = ElementTree.fromstring(plot.lines("t < 1", "per second", {"p50": [(1, 2), (2, 4)], "p99": [(1, 5)]}))
    assert len([each for each in root.iter() if each.tag.endswith("circle")]) == 3


def test_arrivals_are_a_poisson_process() -> None:
    moments = list(serve.arrivals(50, 100, seed=1))
    gaps = torch.tensor(moments).diff()
    assert abs(len(moments) - 5000) < 300 and abs(float(gaps.std() / gaps.mean()) - 1) < 0.1
    assert moments == list(serve.arrivals(50, 100, seed=1)) != list(serve.arrivals(50, 100, seed=2))


def test_load_is_open_and_counted() -> None:
    """The second request arrives while the first is made; the third is refused."""

    def make(number: int) -> Iterator[str]:
        if number == 2:
            raise OSError("too many jobs\nmore")
        yield "queued"
        yield "in_progress"
        yield "completed"

    outcomes = serve.load([0.0, 0.01, 0.02], make)
    assert [each.error for each in outcomes] == ["", "", "too many jobs"]
    found = serve.summary(outcomes, deadline=10)
    assert found["failed"] == 1 and found["goodput"] > 0 and set(found["total"]) == {"p50", "p95", "p99"}
    late = serve.summary([serve.Outcome(0.0, 1.0, 9.0), serve.Outcome(1.0, 1.0, 3.0)], deadline=5)
    assert late["goodput"] == pytest.approx(1 / 9) and late["total"]["p50"] == pytest.approx(6.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path / "served")
    yield started
    assert started.stop() == 0


def test_load_on_a_server(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    asked = [
        "--rates",
        "2",
        "--seconds",
        "1.5",
        "--steps",
        "1",
        "--frames",
        "1",
        "--patience",
        "600",
        "--json",
        str(file),
    ]
    assert main(["serve", "--url", server.url, *asked]) == 0
    [rate] = json.loads(file.read_text())["rates"]
    assert rate["requests"] and rate["failed"] == 0
    assert all(0 <= each["queued"] <= each["total"] for each in rate["requests"])
    assert "goodput within 10 s" in capsys.readouterr().out and file.with_suffix(".svg").exists()
