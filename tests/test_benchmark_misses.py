"""Why a bar is missed: the counters that are read, the process that is profiled, and what stands in the results."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import misses
from benchmarks.operation_bars import measured_of
from benchmarks.pairs import PAIR

pytest.importorskip("triton")

NORM, ATTENTION = ("norm_silu", "wan-vae 480p 96 channels", "triton"), ("attention", "a case", "picked")
# Page raw as CSV, as the Nsight Compute CLI guide has it: messages, names, units, one line per launch; some of the
# columns of the sections asked for.
RAW = """==PROF== Connected to process 7 (/usr/bin/python3.12)
==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 9 passes
"ID","Process ID","Kernel Name","CC","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"gpu__time_duration.sum","launch__registers_per_thread","lts__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",\
"sm__inst_executed_pipe_tensor_op_imma.avg.pct_of_peak_sustained_active",\
"sm__warps_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_barrier_not_issued_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
"","","","","%","usecond","register/thread","%","%","%","%","inst","inst","inst"
"0","7","spin_kernel(long)","9.0","0.1","4.1","16","0.1","0","0","1.5","0","0","0.1"
"1","7","norm_silu_kernel","9.0","71.5","1,250.0","48","40.25","0","0","81.2","9","1.25","7.5"
"2","7","spin_kernel(long)","9.0","0.1","4.1","16","0.1","0","0","1.5","0","0","0.1"
"3","7","cudnn_generated_fort_native_sdpa","9.0","12.5","2,000.0","168","30.0","88.5","0","18.7","9","2.5","0.5"
"""


def test_counters_of_nsight_compute() -> None:
    read = misses.read(RAW, [NORM, ATTENTION])
    ((norm,), (attention,)) = read[NORM], read[ATTENTION]
    assert norm["kernel"] == "norm_silu_kernel" and norm["us"] == pytest.approx(1250) and norm["memory %"] == 71.5
    assert norm["registers"] == 48 and norm["occupancy %"] == 81.2 and "waves" not in norm
    assert norm["waits"] == {"long_scoreboard": 7.5, "barrier": 1.25}
    assert attention["tensor %"] == 88.5 and [*attention["waits"]] == ["barrier", "long_scoreboard"]
    with pytest.raises(ValueError, match="none of the kernels asked for"):
        misses.read("\n".join(RAW.splitlines()[:5]), [NORM])
    with pytest.raises(ValueError, match="counted no kernel"):
        misses.read("==ERROR== ERR_NVGPUCTRPERM", [NORM])


def program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand a script in for ncu."""
    ncu = folder / "ncu"
    ncu.write_text(f"#!/bin/sh\n{script}\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_process_that_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, seen = tmp_path / "raw.csv", tmp_path / "seen"
    raw.write_text(RAW)
    take = 'while [ "$1" != --log-file ]; do shift; done; cp {raw} "$2"; for last; do :; done; cp "$last" {seen}'
    program(tmp_path, f'echo "$@" > {tmp_path}/given; ' + take.format(raw=raw, seen=seen), monkeypatch)
    read = misses.counters([NORM, ATTENTION], time.monotonic() + 100)
    assert isinstance(read, dict) and read[NORM][0]["registers"] == 48
    given = (tmp_path / "given").read_text()
    assert "--profile-from-start off --clock-control none" in given and "-m benchmarks.misses" in given
    seconds, *versions = json.loads(seen.read_text())
    assert 50 < seconds < 100 and [tuple(each) for each in versions] == [NORM, ATTENTION]


def test_why_there_are_no_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "echo '==ERROR== Failed to initialize the profiler: LibraryNotLoaded'; exit 1", monkeypatch)
    told = misses.counters([NORM], time.monotonic() + 100)
    assert isinstance(told, str) and "LibraryNotLoaded" in told
    assert misses.counters([NORM], time.monotonic() + 5) == "no time was left"
    monkeypatch.setattr(misses, "NCU", ("no such program",))
    assert misses.counters([NORM], time.monotonic() + 100) == "ncu is not here"


def measured(operation: str, case: str, seconds: dict[str, float], **limits: Any) -> dict[str, Any]:
    """A case as `kernels` keeps it."""
    taken = {name: [value] for name, value in seconds.items()}
    return {"operation": operation, "case": case, "seconds": taken, "least_us": 100.0, "bound": "memory",
            "bytes": 4.3e8, "flops": 0} | limits  # fmt: skip


def test_every_missed_bar_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = measured(*NORM[:2], {"reference": 9e-4, "triton": 2e-4, "cuda": 3e-4, "torch.compile": 3e-4})
    pair = measured(
        PAIR, "wan-vae 480p 96 to 96 at 832x480x4", {"picked": 1.0, "cuDNN": 1.2, "cuDNN channels_last": 1.4}
    )
    record = {"benchmark": "kernels", "kernels": [slow, pair]}
    wanted = {bar.name: measured_of(bar, record) for bar, _ in misses.missed(record)}
    assert {name: each and each.version for name, each in wanted.items()} == {
        "norm_silu wan-vae 480p 96 channels": "triton", f"{PAIR} wan-vae 480p 96 to 96 at 832x480x4": "picked",
    }  # fmt: skip
    monkeypatch.setattr(misses, "counters", lambda versions, end: misses.read(RAW, versions))
    monkeypatch.setattr(misses, "codes", lambda *version: [f"{version[2]}: 424 instructions"])
    told = misses.explain(record, 0.0)
    assert [each["missed"] for each in told] == ["missed by 72.1 %", "missed by 25.0 %"]
    text = misses.table(json.loads(json.dumps(told)))
    assert "- norm_silu wan-vae 480p 96 channels >= 3.7 T/s: missed by 72.1 % by triton (200 us)" in text
    assert "  - machine code: triton: 424 instructions" in text
    assert "norm_silu_kernel: us 1250, memory % 71.5" in text and "long_scoreboard 7.5, barrier 1.2" in text
    monkeypatch.setattr(misses, "counters", lambda *_: "ncu is not here")
    assert "  - counters: ncu is not here" in misses.table(misses.explain(record, 0.0))
    assert misses.explain({"benchmark": "kernels", "kernels": []}, 0.0) == []


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="Triton compiles here")
def test_machine_code_of_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert misses.codes("attention", "wan-14b 480p over itself", "picked") == [
        "a library's kernels, which are not ours to read"
    ]
