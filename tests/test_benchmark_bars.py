"""`python -m benchmarks bars`: every bar stands where the benchmarks put their numbers, and is judged as it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.bars import BARS, FIGURES
from benchmarks.operation_bars import Bar, kernel_times
from benchmarks.pairs import pair_cases
from benchmarks.published import ATTENTION_TOO, FP8, PARTS, TILED
from runtime.kernels.cases import cases

MACHINE = {"name": "a GPU", "versions": {"torch": "2"}, "commit": "abc", "date": "2026"}


WAYS = ("16 bits", FP8, ATTENTION_TOO, TILED)


def test_places_exist() -> None:
    real = {(case.operation, case.name) for case in [*cases(real=True), *pair_cases()]}
    for bar in BARS:
        benchmark, name, which = bar.place
        assert (name, which) in real if benchmark == "kernels" else name in PARTS and which in WAYS
    steps = {bar.place: bar.seconds for bar in BARS if bar.seconds is not None and bar.place[0] == "published"}
    for (_, name, which), seconds in steps.items():
        assert seconds == (PARTS[name].fp8_bar if which == FP8 else PARTS[name].bar)


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"reference": [9e-4], "triton": [4e-4, 3.5e-4, 3.4e-4], "cuda": [5e-4], "torch.compile": [6e-4]}
    case = {"operation": "qk_norm_rope", "case": "wan-14b 480p dense", "seconds": seconds, "least_us": 312.0,
            "bound": "memory", "bytes": 1342e6, "flops": 0}  # fmt: skip
    part = {"name": "step-14b-480p", "floor": 4.25, "bars": {"16 bits": 5.0, FP8: 3.9}, "seconds": {
        "ours, eager": [5.2], "ours, cuda_graph": [5.1], FP8: [3.7], "diffusers": [9.0]}}  # fmt: skip
    decode = {"name": "decode-720p", "floor": 0.8, "bars": {"16 bits": 2.0, TILED: None},
              "seconds": {"ours": [1.0], TILED: [1.3]}}  # fmt: skip
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps({"benchmark": "kernels", "machine": MACHINE, "kernels": [case]}))
    files[1].write_text(json.dumps({"benchmark": "published", "machine": MACHINE, "parts": [part, decode]}))
    assert main(["bars", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    dense = [line for line in lines if "qk_norm_rope" in line and "dense" in line]
    assert len(dense) == 3
    for line in dense:
        assert "| 312 us |" in line and "| 350 us | 89% |  | torch.compile 600 us | met |" in line
    steps = [line for line in lines if "step-14b" in line]
    assert [line.split("|")[-2].strip() for line in steps] == ["missed by 2.0 %", "met", "not measured", "met", ""]
    assert "| 5.1 s | 83% | diffusers 9 s |  | missed by 2.0 % |" in steps[0] and "| 3.7 s |" in steps[3]
    whole, _, tiled = (line for line in lines if "decode-720p" in line)
    assert "| <= 2 s | 1 s | 80% |  |  | met |" in whole
    assert "ours, in tiles |" in tiled and "| <= 1.25 x ours | 1.3 s | 62% |  | ours 1 s | missed by 4.0 % |" in tiled
    assert sum("not measured | | | |" in line for line in lines) == len(BARS) + len(FIGURES) - 10


def test_tables_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    part = {"name": "decode-480p", "floor": 0.4, "bars": {"16 bits": 0.9, FP8: None}, "seconds": {"ours": [0.8]},
            "difference": {"ours": 0.0}, "skipped": {}, "peaks": {"17": 2**30, "81": 2**30, "321": 2**31}}  # fmt: skip
    file.write_text(json.dumps({"benchmark": "published", "machine": MACHINE, "parts": [part], "left_out": []}))
    assert main(["bars", "--tables", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("| decode-480p | ours | 0.800 s | 1 | 50% | 0.9 s: met |") < shown.index("best published")
    assert "| ours, memory of 17, 81, 321 frames | 1.00, 1.00, 2.00 GiB | 1 | | within 5 %: missed | |" in shown


def test_bars_that_are_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decode = {"name": "decode-480p", "psnr": 49.5, "peaks": {"17": 100, "81": 104, "321": 102}}
    times = {"exact": [4.0, 6.0], "high": [2.0, 3.0], "fast": [1.0, 1.5]}
    saved = {"name": "qualities-1.3b-480p", "seconds": times, "cpu": {"faster": {"high": 2.5, "fast": 4.0}}}
    warm = {"benchmark": "warm", "machine": MACHINE, "seconds": {"warm": [[1.0] * 5 + [0.8] * 5, [1.0] * 10]}}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps({"benchmark": "published", "machine": MACHINE, "parts": [decode, saved]}))
    files[1].write_text(json.dumps(warm))
    assert main(["bars", *map(str, files)]) == 0
    shown = capsys.readouterr().out
    for cells in ("bfloat16 beside float32 | | | >= 50 dB | 49.5 dB | | | | missed", "<= 1.05 | 1.04 | | | | met",
                  "quality high, times faster / the CPU's | | | >= 0.9 | 0.8 | | | | missed", "0.9 | 1 | | | | met",
                  "<= 1.1 | 1.12 | | | | missed"):  # fmt: skip
        assert f"{cells} |" in shown, cells


def test_which_version_is_judged() -> None:
    seconds = {"triton": [2.0], "picked": [1.0], "SDPA cuDNN": [1.0]}
    each = {"seconds": seconds, "least_us": 1, "bound": "compute", "bytes": 1, "flops": 1}
    assert [kernel_times(each, which).ours for which in ("", "triton", "picked", "cuda")] == [1.0, 2.0, 1.0, None]


def test_rates_and_ratios() -> None:
    place = ("kernels", "mlp", "a")
    assert Bar(place, "", rate=3.7e12).met(1e-3, 3.8e9, {}) and not Bar(place, "", rate=3.7e12).met(1e-3, 3.6e9, {})
    best = Bar(place, "", over="", ratio=1.01)
    assert best.met(1.0, 0, {"a": 1.0, "b": 2.0}) and not best.met(1.02, 0, {"a": 1.0}) and best.met(1, 0, {}) is None
