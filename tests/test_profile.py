"""tools.profile: PyTorch's profiler for real, Nsight Systems too where it is installed; else by small exports.

The exports are written here after the documented schemas (Nsight Systems User Guide, SQLite schema reference; Nsight
Compute CLI, page raw as CSV), and hold GPU work, which a machine without a GPU cannot record.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import runtime
from runtime.decoding import ahead, decode_chunks
from tools.profile import capture, readers
from tools.profile.__main__ import main
from tools.profile.capture import steps_of
from tools.profile.readers import Counted, Range, Timeline, Work
from tools.profile.report import kernel_report, timeline_report

MS = 1_000_000  # nanoseconds
ONE, OTHER = 0x1_0001 << 24, 0x1_0002 << 24  # threads 0 of two processes
QUICK = ["--size", "64x64", "--frames", "5", "--steps", "3", "--seed", "7", "--quiet"]


def export(file: Path) -> Path:
    """Two steps of 10 ms: the first keeps the GPU busy for 9 ms, the second for 1 ms after a gap."""
    base = sqlite3.connect(file)
    base.executescript(
        """
        CREATE TABLE StringIds (id INTEGER, value TEXT);
        CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, textId INTEGER,
                                  domainId INTEGER, globalTid INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, correlationId INTEGER, nameId INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, correlationId INTEGER, shortName INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER, end INTEGER, correlationId INTEGER);
        """
    )
    base.executemany("INSERT INTO StringIds VALUES (?, ?)", [(1, "attention"), (2, "mlp"), (3, "denoise/step")])
    base.executemany(
        "INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (0, None, 75, "dit-runtime", None, 7, ONE),
            (0, None, 75, "another library", None, 8, ONE),
            (0, None, 75, "dit-runtime", None, 8, OTHER),
            (0, 10 * MS, 59, None, 3, 7, ONE),
            (10 * MS, 20 * MS, 59, "denoise/step", None, 7, ONE + 1),
            (0, 20 * MS, 59, "not ours", None, 8, ONE),
            (15 * MS, None, 59, "cut off", None, 7, ONE),
        ],
    )
    calls = [(MS, 1), (MS + 1, 2), (12 * MS, 3)]
    base.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, 0, ?, 0)", calls)
    kernels = [(2 * MS, 8 * MS, 1, 1), (8 * MS, 11 * MS, 2, 2)]
    base.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?)", kernels)
    base.execute("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, ?)", (14 * MS, 15 * MS, 3))
    base.commit()
    base.close()
    return file


COUNTERS = """==PROF== Connected to process 1
"ID","Kernel Name","MEMORY","gpu__time_duration.sum","COMPUTE"
"","","%","usecond","%"
"0","attention","12.5","1,500.0","80.0"
"1","modulate","90.0","250.0","15.0"
"2","attention","12.5","500.0","60.0"
""".replace("MEMORY", readers.MEMORY).replace("COMPUTE", readers.COMPUTE)


def test_an_export_of_nsight_systems(tmp_path: Path) -> None:
    found = readers.read_nsys(export(tmp_path / "a.sqlite"))
    assert [(each.name, round(each.start * 1e3), round(each.end * 1e3)) for each in found.ranges] == [
        ("denoise/step", 0, 10),
        ("denoise/step", 10, 20),
    ]
    assert [each.name for each in found.work] == ["attention", "mlp", "memcpy"]
    told = timeline_report(found)
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "denoise/step 2 20.000 10.000 10.000" in lines
    assert "attention 1 6.000 60.0%" in lines
    assert "3.000 9.000 denoise/step" in lines, told  # the gap
    assert "idle 23.1% of 13.000 ms" in told
    assert lines[-1] == "none", "10 of 20 ms are not less than half"


@pytest.mark.skipif(shutil.which("nsys") is None, reason="Nsight Systems is not installed")
def test_nsight_systems_records_our_ranges(tmp_path: Path) -> None:
    """Without a GPU too; its own export is read."""
    report, exported = tmp_path / "a.nsys-rep", tmp_path / "a.sqlite"
    options = ["--trace=nvtx", "--sample=none", "--cpuctxsw=none", f"--output={report}"]
    made = [sys.executable, "-m", "runtime", "generate", "a red ball", *QUICK, "-o", str(tmp_path / "a.mp4")]
    subprocess.run(["nsys", "profile", *options, *made], check=True, capture_output=True, timeout=300)
    export = ["nsys", "export", "--type=sqlite", f"--output={exported}", str(report)]
    subprocess.run(export, check=True, capture_output=True, timeout=300)
    calls = Counter(each.name for each in readers.read_nsys(exported).ranges)
    assert calls["request"] == calls["text"] == 1 and calls["denoise/step"] == 3
    assert calls["denoise/attention"] == calls["denoise/mlp"] == calls["denoise/block"] > 3
    assert {"load", "decode", "save"} <= calls.keys()


def test_what_is_bound_by_the_host() -> None:
    ranges = [Range("text", 0, 1), Range("denoise", 1, 2)]
    told = timeline_report(Timeline(ranges, [Work("a", 0.5, 0.6, 0.4), Work("b", 1.1, 1.9, 1.05)]))
    host = told.split("bound by the host")[1]
    assert "text" in host and "10.0%" in host and "denoise" not in host


def test_counters_of_nsight_compute() -> None:
    found = readers.read_ncu(COUNTERS)
    assert found[0] == Counted("attention", pytest.approx(1.5e-3), 80.0, 12.5)
    lines = [" ".join(line.split()) for line in kernel_report(found).splitlines()]
    assert "attention 2 2.000 88.9% 75 % arithmetic" in lines
    assert "modulate 1 0.250 11.1% 90 % memory" in lines
    with pytest.raises(ValueError, match="counted no kernel"):
        readers.read_ncu("==WARNING== No kernels were profiled.\n")
    with pytest.raises(ValueError, match="lacks gpu__dram"):
        readers.read_ncu(COUNTERS.replace("gpu__dram", "dram"))


def test_operators_without_those_that_they_call() -> None:
    def event(name: str, begin: int, length: int, thread: int = 1) -> dict:
        return {"name": name, "ts": begin, "dur": length, "tid": thread}

    found = readers.own_times(
        [event("outer", 0, 10), event("inner", 1, 4), event("deep", 2, 1), event("outer", 3, 9, 2)]
    )
    assert {name: [round(each * 1e6) for each in times] for name, times in found.items()} == {
        "outer": [6, 9],
        "inner": [3],
        "deep": [1],
    }


def test_pytorchs_profiler_over_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "a red ball", *QUICK, "-o", str(tmp_path / "a.mp4")]
    assert main(["torch", "--steps", "2", "-o", str(tmp_path / "p"), "--", *command]) == 0
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("denoise/step 1 ") for line in told)
    assert any(line.startswith("denoise/attention ") for line in told)
    assert not any(line.startswith("decode ") for line in told), "it was to record one step"
    assert any(line.startswith("aten::") for line in told)
    events = json.loads((tmp_path / "p.trace.json").read_text())["traceEvents"]
    assert "denoise/mlp" in {event.get("name") for event in events}
    assert (tmp_path / "a.mp4").is_file()


def test_steps_that_never_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "a red ball", *QUICK, "-o", str(tmp_path / "a.mp4")]
    assert main(["torch", "--steps", "9", "-o", str(tmp_path / "p"), "--", *command]) == 2
    assert "made no step 9" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "steps"), [("all", None), ("5", (5, 5)), ("2-3", (2, 3))])
def test_steps(text: str, steps: tuple[int, int] | None) -> None:
    assert steps_of(text) == steps


@pytest.mark.parametrize("text", ["0", "3-2", "-1", "two", ""])
def test_illegal_steps(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torch", f"--steps={text}", "--", "generate", "a"]) == 2
    assert "legal: all, a step from 1" in capsys.readouterr().err


def put(folder: Path, name: str, script: str) -> None:
    """Put a program into a folder."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH, where a driver seems to be."""
    folder = tmp_path / "bin"
    folder.mkdir()
    put(folder, "nvidia-smi", "exit 0")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return folder


def test_the_command_line_of_nsight_systems(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tmp_path / "made.sqlite")
    put(programs, "nsys", f'echo "$@" >> {tmp_path}/calls; touch {tmp_path}/p.nsys-rep; '
                          f"[ $1 = export ] && cp {tmp_path}/made.sqlite {tmp_path}/p.sqlite; exit 0")  # fmt: skip
    assert main(["nsys", "--steps", "2-4", "-o", str(tmp_path / "p"), "--", "generate", "a ball"]) == 0
    record, exported = (tmp_path / "calls").read_text().splitlines()
    assert "--capture-range=cudaProfilerApi" in record and "--trace=cuda,nvtx,osrt" in record
    assert record.endswith("-m tools.profile.capture nsys 2-4 generate a ball")
    assert exported.startswith("export --type=sqlite")
    told = capsys.readouterr().out
    assert "time per range" in told and f"nsys-ui {tmp_path / 'p.nsys-rep'}" in told


def test_the_command_line_of_nsight_compute(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table").write_text(COUNTERS)
    put(programs, "ncu", f'echo "$@" >> {tmp_path}/calls; touch {tmp_path}/p.ncu-rep; '
                         f"[ $1 = --import ] && cat {tmp_path}/table; exit 0")  # fmt: skip
    assert main(["ncu", "-o", str(tmp_path / "p"), "--", "generate", "a ball"]) == 0
    record = (tmp_path / "calls").read_text().splitlines()[0]
    assert "--profile-from-start off --clock-control none" in record and readers.COMPUTE in record
    assert "of roofline" in capsys.readouterr().out


def test_counters_that_the_driver_does_not_show(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(programs, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'; exit 1")
    assert main(["ncu", "-o", str(tmp_path / "p"), "--", "generate", "a"]) == 2
    assert "NVreg_RestrictProfilingToAdminUsers=0" in capsys.readouterr().err


def test_profilers_that_are_missing(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nsys", "-o", str(tmp_path / "p"), "--", "generate", "a"]) == 2
    assert "nsys is not installed" in capsys.readouterr().err
    put(programs, "nsys", "exit 0")
    (programs / "nvidia-smi").unlink()
    assert main(["nsys", "-o", str(tmp_path / "p"), "--", "generate", "a"]) == 2
    assert "no NVIDIA driver" in capsys.readouterr().err
    assert main(["torch"]) == 2
    assert "behind --" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU")
def test_a_pytorch_that_sees_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert capture.main(["nsys", "2-3", "generate", "a"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_ranges_of_a_decode_in_its_thread(tmp_path: Path) -> None:
    """As on a GPU, where a thread decodes ahead; the ranges are those that the floors are counted for."""
    model = runtime.load("demo", device="cpu")
    shape = (2, 6, 8)
    latents = torch.randn(1, model.spec.latent_channels, *shape)
    begin, end = capture.torch_profiler(tmp_path / "trace.json")
    begin()
    for _ in ahead(lambda: decode_chunks(model, latents, None, torch.float32, [], [])):
        pass
    end()
    found = {each.name for each in readers.read_chrome(tmp_path / "trace.json").ranges}
    assert found == {*filter(None, model.costs.decode_ranges(shape, 4)), "decode/bytes"}
