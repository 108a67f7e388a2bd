"""The compile report: what it reads, when it fails, and that kernels pass; always in a process that compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import compile_report
from benchmarks.compile_report import CHIPS, KIB, Row, parse_resources
from runtime.kernels.cases import CASES

pytest.importorskip("triton")


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python without the interpreter that the other tests run kernels in."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def report(file: Path, *options: str) -> list[dict]:
    done = python("-m", "benchmarks", "kernels", "--compile-report", "--json", file, *options)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads(file.read_text())["compile_report"]
    assert done.stdout.count("| sm_") == len(rows)
    return rows


def test_one_case(tmp_path: Path) -> None:
    rows = report(tmp_path / "r.json", "--arch", "sm_90", "sm_120", "--only", "modulate", "--case", "wan-14b 480p rms")
    ours = [row for row in rows if row["case"] != "csrc"]
    assert [row["arch"] for row in ours] == ["sm_90", "sm_120"]
    for row in ours:
        assert row["kernel"] == "modulate_kernel" and row["spills"] == 0 and not row["faults"]
        assert 16 <= row["registers"] <= 255 and 0 < row["occupancy"] <= 1


def test_hopper_code(tmp_path: Path) -> None:
    """Attention multiplies by warp groups while its next tiles come in; rows are read 16 bytes a thread, in 8 bits too.

    The latter never leave their threads: shared memory is for the sums over a row alone.
    """
    options = ("--arch", "sm_90", "--only", "attention,modulate_fp8", "--case", "wan-14b 480p over itself")
    (attention,) = report(tmp_path / "a.json", *options)
    assert attention["code"]["loop_counts"]["HGMMA"] >= 8
    assert {name for name in attention["code"]["loop_counts"] if name.startswith(("LDG", "HMMA"))} == {"LDGSTS.128"}
    (rows,) = report(tmp_path / "b.json", *options[:-1], "wan-14b 480p rms")
    counts = rows["code"]["counts"]
    assert {name for name in counts if name.startswith(("LDG", "ST"))} == {"LDG.128", "STG.64", "STG.32", "STS"}
    assert counts["STS"] <= 4


@pytest.mark.slow
def test_every_kernel_on_every_chip(tmp_path: Path) -> None:
    rows = report(tmp_path / "r.json")
    assert {row["operation"] for row in rows} >= set(CASES)
    assert {row["arch"] for row in rows} == set(CHIPS)


SPILLING = """
import sys
import torch
import triton
import triton.language as tl
from benchmarks.compile_report import compiled, specialised
from runtime.kernels.backend import Launch
from runtime.kernels.cases import Case


@triton.jit
def hoard(x, out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    values = tl.load(x + lanes)
    total = tl.sum(values, axis=0)
    tl.store(out + lanes, values * total)


x = torch.empty(2**14, device="meta")
launch = Launch(hoard, (1,), {"x": x, "out": x}, {"BLOCK": 2**14}, {"num_warps": 1, "num_stages": 1})
sys.modules["spilling"] = sys.modules[__name__]
hoard.fn.__module__ = "spilling"
print(*compiled(specialised(Case("hoard", "", lambda maker: {}), launch), "sm_90").faults)
"""


def test_spills_are_seen(tmp_path: Path) -> None:
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    done = python("-c", f"import runpy; runpy.run_path({str(script)!r}, run_name='spilling')")
    assert "spilled" in done.stdout, done.stderr


GOOD = Row("modulate", "a case", "a_kernel", "sm_90", warps=4, registers=32, shared=227 * KIB)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (GOOD, None),
        (Row("modulate", "a case", "a_kernel", "sm_90", spills=8), "8 bytes of registers spilled"),
        (Row("modulate", "a case", "a_kernel", "sm_90", shared=228 * KIB), "233472 bytes of shared memory; sm_90"),
        (Row("modulate", "a case", "a_kernel", "sm_120", shared=100 * KIB), "sm_120 has 101376"),
        (Row("modulate", "a case", "a_kernel", "sm_80", error="CompilationError: no"), "CompilationError: no"),
    ],
)
def test_exit_status(
    row: Row, sentence: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_report, "report", lambda *_: [row])
    assert command.main(["kernels", "--compile-report"]) == (0 if sentence is None else 1)
    printed = capsys.readouterr().err
    assert sentence is None or (f"a_kernel (a case, {row.arch}): " in printed and sentence in printed)


def test_refuses_to_interpret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["kernels", "--compile-report"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_resources_are_read() -> None:
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z2t2Pf:
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function k:
  REG:255 STACK:72 SHARED:1280 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert parse_resources(text) == {
        "_Z2t2Pf": {"REG": 10, "STACK": 0, "SHARED": 0, "LOCAL": 0},
        "k": {"REG": 255, "STACK": 72, "SHARED": 1280, "LOCAL": 0},
    }
    with pytest.raises(ValueError, match="not a resource usage"):
        parse_resources("cuobjdump fatal: no such file")


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 128, 0, 8, 0.25),
        ("sm_90", 255, 0, 4, 0.125),  # 8192 registers a warp
        ("sm_90", 40, 100 * KIB, 8, 0.25),  # two blocks of shared memory
        ("sm_90", 32, 0, 1, 0.5),  # 32 blocks at most
        ("sm_120", 40, 0, 4, 1.0),
        ("sm_80", 168, 64 * KIB, 8, 0.125),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, warps: int, expected: float) -> None:
    assert CHIPS[arch].occupancy(registers, shared, warps) == expected
