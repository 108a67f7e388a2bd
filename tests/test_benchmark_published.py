"""`python -m benchmarks published` on a CPU, with small networks: what it writes and tells. No timing is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import published, savings
from benchmarks.__main__ import main
from benchmarks.profiled import floors, kind_of, summary
from runtime.machine import GPUS
from runtime.models.costs import Shape
from runtime.planner import find_model
from runtime.request import QUALITIES as FLOORS
from tests.test_benchmark_latency import small  # noqa: F401
from tools.profile.readers import Range, Timeline, Work

ASKED = ["published", "--device", "cpu", "--only", "step-1.3b-480p,decode-480p", "--against", "diffusers", "--json"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, and a compiler that only traces."""
    for name, part in published.PARTS.items():
        side = 128 if part.stage == "decode" else 32  # tiles need more than their halo
        monkeypatch.setitem(published.PARTS, name, replace(part, width=side, height=side, frames=9))
    monkeypatch.setattr(published, "SECONDS", 0.0)
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: real(self, backend="eager", **given))


@pytest.mark.usefixtures("small", "quick")
def test_both_sides_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A published step and decode, eager and compiled, near to ours; the profile says why it is missing."""
    file = tmp_path / "a.json"
    assert main([*ASKED, str(file), "--profile"]) == 0
    step, decode = json.loads(file.read_text())["parts"]
    ours = {"ours, eager", "ours, cuda_graph", "ours, fp8", "ours, fp8, attention too"}
    assert set(step["seconds"]) == ours | {"diffusers", "diffusers, compiled"}
    assert set(decode["seconds"]) == {"ours", "ours, in tiles", "diffusers", "diffusers, compiled"}
    for found in (step, decode):
        assert found["skipped"] == {"profile": "ValueError: the profiler recorded no work of a GPU"}
        assert all(len(samples) == 2 and min(samples) > 0 for samples in found["seconds"].values())
    assert step["difference"]["ours, cuda_graph"] == 0 and step["difference"].pop("ours, fp8") < 0.3
    assert step["difference"].pop("ours, fp8, attention too") < 0.3
    assert max(step["difference"].values()) < 0.05
    assert min(decode["difference"].values()) > 30 and 30 < decode["psnr"] < 100
    shown = capsys.readouterr().out
    assert f"| decode-480p | ours beside float32, a short clip | {decode['psnr']:.1f} dB | 1 |" in shown
    assert "| step-1.3b-480p | ours, " in shown and "0.85 s: " in shown


@pytest.mark.usefixtures("small", "quick")
def test_what_fails_or_comes_too_late_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel\nmore of it")

    monkeypatch.setattr(published.Diffusers, "step", broken)
    file = tmp_path / "a.json"
    assert main([*ASKED, str(file), "--budget", "30"]) == 0
    step = json.loads(file.read_text())["parts"][0]
    assert step["skipped"] == {
        "diffusers": "RuntimeError: no such kernel", "diffusers, compiled": "too little time was left",
    }  # fmt: skip
    assert set(step["seconds"]) == {"ours, eager", "ours, cuda_graph", "ours, fp8", "ours, fp8, attention too"}
    assert main([*ASKED, str(file), "--budget", "-1"]) == 0
    assert json.loads(file.read_text())["left_out"] == ["step-1.3b-480p", "decode-480p"]
    assert "Left out when the time was up: step-1.3b-480p, decode-480p." in capsys.readouterr().out


@pytest.mark.usefixtures("small", "quick")
def test_what_qualities_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps of the built-in model's calibration are computed, none more, whatever random weights say of it."""
    file = tmp_path / "a.json"
    assert main(["published", "--device", "cpu", "--only", "qualities-1.3b-480p", "--json", str(file)]) == 0
    [found] = json.loads(file.read_text())["parts"]
    rungs = savings.calibrated().rungs
    least = {name: FLOORS[name] for name in savings.QUALITIES}
    fewest = {name: next(len(each.computed) for each in rungs if each.floor >= floor) for name, floor in least.items()}
    assert found["skipped"] == {} and found["computed"] == {"exact": found["steps"]} | fewest
    assert all(len(samples) == savings.TAKES and min(samples) > 0 for samples in found["seconds"].values())
    assert set(found["cpu"]["faster"]) == {"high", "fast"} and min(found["cpu"]["faster"].values()) > 1
    shown = capsys.readouterr().out
    assert f"high, {fewest['high']} of {found['steps']} steps computed |" in shown and "; on the CPU, with" in shown
    twice = found | {"seconds": {"exact": [4.0, 6.0], "high": [2.0, 3.0]}, "cpu": {"faster": {"high": 2.5}}}
    assert savings.faster(twice, "high") == 2 and savings.kept(twice, "high") == 0.8
    assert (
        "times faster; on the CPU, with the built-in model, 2.50; at least 0.9 of it: missed" in savings.rows(twice)[1]
    )


def test_profile_summary() -> None:
    work = [
        Work("nvjet_gemm", 0.0, 1.0, 0.0),
        Work("modulate_kernel", 1.5, 2.0, 0.2),
        Work("nvjet_gemm", 2.0, 4.0, 0.6),
    ]
    found = summary(Timeline([Range("denoise/mlp", 0.5, 0.7), Range("denoise/attention", 0.0, 0.4)], work))
    assert (found.whole, found.idle, found.long_gaps) == (4.0, 0.5, 1)
    assert found.ranges == [("denoise/mlp", 1, 2.0), ("denoise/attention", 1, 1.5)]
    assert found.kernels == [("nvjet_gemm", 2, 3.0), ("modulate_kernel", 1, 0.5)]
    assert found.kinds == [("linear", 2, 3.0), ("modulate", 1, 0.5)]
    assert found.within == [
        ("denoise/mlp: linear", 1, 2.0, 0.0), ("denoise/attention: linear", 1, 1.0, 0.0),
        ("denoise/attention: modulate", 1, 0.5, 0.5),
    ]  # fmt: skip
    shown = found.table(2.0, {"denoise/mlp": 1.0, "linear": 2.5, "modulate": 0.4})
    assert "| denoise/attention: modulate | 1 | 500.00 | 12.5% |  |  | 500.00 |" in shown
    assert "| nvjet_gemm | 2 | 3000.00 | 75.0% |  |  |" in shown and "floor 2000.0 ms" in shown
    assert "| denoise/mlp | 1 | 2000.00 | 50.0% | 1000.00 | 50% |" in shown and "| linear | 2 | 3000.00 |" in shown
    assert shown.splitlines()[-3:] == [
        "1. linear: 500.0 ms above its floor of 2500.0 ms, most of it in nvjet_gemm (3000.0 ms)",
        "2. idle: 500.0 ms above its floor of 0.0 ms",
        "3. modulate: 100.0 ms above its floor of 400.0 ms, most of it in modulate_kernel (500.0 ms)",
    ]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"), ("attention_kernel", "attention"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "linear"), ("linear_kernel", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linear"),
        ("causal_conv3d_kernel", "convolution"), ("sm80_xmma_dgrad_implicit_gemm_indexed_bf16", "convolution"),
        ("void rows_kernel<dit::qk_norm_rope::Body>", "qk_norm_rope"), ("gate_residual_kernel", "gate_residual"),
        ("void at::native::elementwise_kernel<128, 4>", "other"), ("Memcpy DtoH (Device -> Pinned)", "copies"),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_floors() -> None:
    """Ranges and kinds hold the same operations; the sum of a step's is near the whole step's, which overlaps them."""
    spec, costs = find_model("wan2.1-t2v-14b")
    shape = Shape(latents=spec.latent_shape(81, 480, 832)[1:], text=512, rows=2)
    found = floors(GPUS["h200"], costs.ranges(shape))
    ranges = sum(seconds for name, seconds in found.items() if name.startswith("denoise/") and ":" not in name)
    kinds = sum(seconds for name, seconds in found.items() if "/" not in name and ":" not in name)
    assert kinds == pytest.approx(sum(seconds for name, seconds in found.items() if ":" in name))
    whole = GPUS["h200"].seconds(costs.forward(shape), "step")
    assert 0.95 * whole < ranges < kinds < 1.1 * whole
    assert {"attention", "linear", "modulate", "gate_residual", "qk_norm_rope"} <= set(found)
    work = costs.decode((21, 60, 104), None, 2)
    decode = floors(GPUS["h200"], costs.decode_ranges((21, 60, 104), 2))
    assert {name for name in decode if not name.startswith(("decode/", "no range"))} == {
        "convolution", "norm_silu", "attention", "linear",
    }  # fmt: skip
    levels = [decode[f"decode/{name}"] for name in ("middle", "up_0", "up_1", "up_2", "up_3", "head")]
    needed = [each for each in work.operations if each.kind != "pass"]  # all but what copies for the next frames cost
    assert sum(levels) + decode["no range: linear"] == pytest.approx(floors(GPUS["h200"], {"all": needed})["all"])
    assert decode["decode/up_0"] > decode["decode/up_0/upsample"] > 0
    assert decode["decode/middle: attention"] == decode["attention"]
