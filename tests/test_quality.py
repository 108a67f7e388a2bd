"""Quality: what is skipped, that nothing disturbs it, and that nothing is given up silently."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import runtime
import runtime.pipeline
from runtime import budget, fidelity, rungs
from runtime.__main__ import main
from runtime.caches import Line, Moments, Skips, cached, growth, search
from runtime.checkpoints import Checkpoints
from runtime.denoising import Cancelled
from runtime.schedules import flow_linear
from tests.published import Tiny, write

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 5, "steps": 16, "seed": 3, "prompt": "a red ball"}
PROMPTS = ("a red ball rolls left", "a blue cube spins", "a green ring rises", "a white star falls")


@pytest.fixture(scope="module")
def model() -> runtime.Model:
    return runtime.load("demo", device="cpu")


@pytest.fixture(scope="module")
def measured(model: runtime.Model) -> budget.Calibrated:
    return rungs.calibrate(model, runtime.Request(**SMALL), PROMPTS)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """Places of calibrations that are the test's own; nothing is there yet."""
    places = tmp_path / "beside.json", tmp_path / "stored.json"
    monkeypatch.setattr(budget, "files", lambda model: places)
    return places


def walk(skips: Skips, sigmas: list[float], law: Any) -> tuple[list[float], list[int]]:
    """Return the velocities over a schedule where the network says law(sigma), and the steps at which it was asked."""
    asked: list[int] = []

    def network(x: torch.Tensor, sigma: torch.Tensor, context: object) -> torch.Tensor:
        asked.append(sigmas.index(float(sigma)))
        return law(float(sigma)) * torch.ones_like(x)

    denoiser = cached(network, skips, sigmas)
    found = [float(denoiser(torch.zeros(3), torch.tensor([s], dtype=torch.float64), None)[0]) for s in sigmas[:-1]]  # type: ignore[arg-type]
    return found, asked


def test_a_line_is_continued_and_a_bend_is_noticed() -> None:
    sigmas = flow_linear(20, 3.0).tolist()
    skips = Skips(frozenset({0, 1, 5, 9, 13, 17}), Line(sigmas, 0.05), order=2, bound=1.0)
    found, asked = walk(skips, sigmas, lambda sigma: 2 - sigma)
    assert found == pytest.approx([2 - sigma for sigma in sigmas[:-1]], rel=1e-5)
    assert asked == [0, 1, 5, 9, 13, 17]

    bent, more = walk(skips, sigmas, lambda sigma: 2 - sigma + 5 * max(0.0, 0.8 - sigma) ** 2)
    turn = next(step for step in more if step not in asked)
    assert turn - 1 in asked  # a planned step showed it, and the next one is computed too
    assert set(more) > set(asked)
    assert bent != pytest.approx([2 - sigma for sigma in sigmas[:-1]], rel=1e-2)


def test_where_all_frames_are_shown_clean_the_network_is_asked() -> None:
    sigmas = flow_linear(20, 3.0).tolist()
    skips = Skips(frozenset({0}), Line(sigmas, 0.05), order=2, bound=1.0)
    denoiser = cached(lambda x, sigma, context: x + 1, skips, sigmas)
    clean = torch.zeros(1, 3, dtype=torch.float64)
    assert float(denoiser(torch.ones(3), clean, None)[0]) == 2  # type: ignore[arg-type]
    assert denoiser.past.count == 0


def moments_of(rows: np.ndarray, order: int) -> Moments:
    """Moments of trajectories [steps, numbers]."""
    return Moments(rows @ rows.T / rows.shape[1], order)


@given(seed=st.integers(0, 1000), order=st.sampled_from([1, 2]))
def test_weights_are_those_of_least_squares(seed: int, order: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(4, 50))
    weights, expected = moments_of(rows, order).weigh(3, (2, 0))
    past = rows[[2, 0][:order]]
    best = np.linalg.lstsq(past.T, rows[3], rcond=None)[0]
    assert weights == pytest.approx(best, abs=1e-3)
    left = np.linalg.norm(rows[3] - best @ past) / np.linalg.norm(rows[3])
    assert expected == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_the_search_finds_the_best_steps(order: int) -> None:
    walk_of = np.cumsum(np.random.default_rng(5).normal(size=(8, 40)) * np.linspace(1, 0.1, 8)[:, None], axis=0)
    predictor, sigmas = moments_of(walk_of, order), flow_linear(8, 3.0).tolist()

    def loss(chosen: tuple[int, ...]) -> float:
        total, past = 0.0, (0,)
        for step in range(1, 8):
            if step in chosen:
                past = (step, *past)[:order]
            else:
                reach = growth(sigmas[step]) * (sigmas[step] - sigmas[step + 1]) ** 2
                total += reach * predictor.weigh(step, past)[1] ** 2
        return total

    every = [(0, *rest) for rest in itertools.combinations(range(1, 8), 3)]
    assert search(predictor, sigmas, 4, order) == min(every, key=loss)


def test_exact_is_the_default_and_asks_the_network_at_every_step(model: runtime.Model) -> None:
    plain = runtime.generate(model, runtime.Request(**SMALL))
    exact = runtime.generate(model, runtime.Request(**SMALL, quality="exact"))
    assert np.array_equal(plain.frames, exact.frames)
    assert exact.receipt.quality is None
    assert exact.receipt.approximations == []


def test_without_a_calibration_a_table_serves_and_says_so(model: runtime.Model, files: Any) -> None:
    exact = runtime.generate(model, runtime.Request(**SMALL)).frames
    video = runtime.generate(model, runtime.Request(**SMALL, quality="high"))
    said = video.receipt.quality
    assert said is not None
    assert said["basis"] == "table"
    assert said["windows"][0]["computed"] < SMALL["steps"]
    assert any("was not calibrated" in note for note in video.receipt.notes)
    assert "steps predicted, by the table" in video.receipt.approximations[0]
    assert 20 < fidelity.psnr(video.frames, exact) < fidelity.EQUAL


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"quality": 90.0}, "no more than 32 dB"),
        ({"quality": "high", "steps": 8}, "no fewer than 16 steps"),
        ({"quality": "fast", "periodic": True, "num_frames": 8}, "this task is made exactly"),
    ],
)
def test_a_budget_that_nothing_is_known_to_keep_runs_exact(
    model: runtime.Model, files: Any, more: dict[str, Any], sentence: str
) -> None:
    video = runtime.generate(model, runtime.Request(**SMALL | more))
    exact = runtime.generate(model, runtime.Request(**SMALL | more | {"quality": "exact"}))
    assert np.array_equal(video.frames, exact.frames)
    assert video.receipt.quality is not None
    assert video.receipt.quality["basis"] == "exact"
    assert any(sentence in note for note in video.receipt.notes)


def test_a_calibration_is_kept_found_and_kept_to(
    model: runtime.Model, measured: budget.Calibrated, files: tuple[Path, Path]
) -> None:
    assert budget.write(model, measured) == files[0]
    assert budget.read(files[0]) == [measured]
    floors = [rung.floor for rung in measured.rungs]
    counts = [len(rung.computed) for rung in measured.rungs]
    assert floors == sorted(floors)
    assert counts == sorted(counts)
    assert all(rung.floor < rung.psnr for rung in measured.rungs)

    wanted = measured.rungs[1]
    request = runtime.Request(**SMALL, quality=max(wanted.floor, 1.0))
    video = runtime.generate(model, request)
    runtime.pipeline.compare_exact(model, video)
    said = video.receipt.quality
    assert said is not None
    assert said["basis"] == "calibrated"
    assert said["rung"]["floor"] == wanted.floor
    window = said["windows"][0]
    assert window["computed"] == len(wanted.computed) + window["forced"]
    assert window["estimated_psnr"] <= wanted.psnr
    exact = runtime.generate(model, runtime.Request(**SMALL)).frames
    assert said["measured"]["psnr"] == fidelity.psnr(video.frames, exact)
    assert said["measured"]["frame_psnr"] == fidelity.frame_psnr(video.frames, exact)
    json.loads(video.receipt.to_json())


def test_the_planner_counts_the_steps_that_are_computed(
    model: runtime.Model, measured: budget.Calibrated, files: tuple[Path, Path]
) -> None:
    budget.write(model, measured)
    for quality in ("exact", 95.0, measured.rungs[0].floor if measured.rungs[0].floor > 0 else 1.0):
        request = runtime.Request(**SMALL, quality=quality).resolved(model.spec)
        found = budget.computed_steps(model, request)
        said = runtime.generate(model, request).receipt.quality
        asked = SMALL["steps"] if said is None else said["windows"][0]["computed"] - said["windows"][0].get("forced", 0)
        assert (found or SMALL["steps"]) == asked


def test_nothing_calibrated_keeps_it(model: runtime.Model, measured: budget.Calibrated, files: Any) -> None:
    budget.write(model, measured)
    video = runtime.generate(model, runtime.Request(**SMALL, quality=95))
    assert any("keeps 95 dB" in note and "is made exactly" in note for note in video.receipt.notes)
    assert np.array_equal(video.frames, runtime.generate(model, runtime.Request(**SMALL)).frames)


@pytest.mark.parametrize("damage", ["cut", "format", "shape", "nan", "step", "not json"])
def test_a_damaged_calibration_is_ignored_with_a_warning(
    model: runtime.Model, measured: budget.Calibrated, files: tuple[Path, Path], damage: str
) -> None:
    file = budget.write(model, measured)
    text = file.read_text()
    given = json.loads(text)
    entry = given["calibrations"][0]
    if damage == "cut":
        text = text[: len(text) // 2]
    elif damage == "format":
        text = json.dumps(given | {"format": 99})
    elif damage == "shape":
        entry["moments"].pop()
        text = json.dumps(given)
    elif damage == "nan":
        entry["rungs"][0]["floor"] = float("nan")
        text = json.dumps(given)
    elif damage == "step":
        entry["rungs"][0]["computed"] = [0, 99]
        text = json.dumps(given)
    else:
        text = "\x00" * 100
    file.write_text(text)
    video = runtime.generate(model, runtime.Request(**SMALL, quality="fast"))
    assert any("is ignored: it is damaged or of another version" in note for note in video.receipt.notes)
    assert video.receipt.quality is not None
    assert video.receipt.quality["basis"] == "table"


def test_interleaved_requests_are_those_alone(model: runtime.Model, files: Any) -> None:
    outer = runtime.Request(**SMALL, quality="fast")
    inner = runtime.Request(**SMALL | {"steps": 20, "width": 96, "height": 32, "num_frames": 9}, quality="fast")
    alone = [runtime.generate(model, request).frames for request in (outer, inner)]
    between: list[np.ndarray] = []

    def on_step(step: int, *_: object) -> None:
        if step in (7, 8, 9):
            between.append(runtime.generate(model, inner).frames)

    together = runtime.generate(model, outer, on_step=on_step)
    assert np.array_equal(together.frames, alone[0])
    assert all(np.array_equal(frames, alone[1]) for frames in between)
    assert len(between) == 3


@pytest.mark.parametrize("at", [1, 7, 8, 12])
def test_a_resumed_run_equals_an_uninterrupted_one(model: runtime.Model, files: Any, tmp_path: Path, at: int) -> None:
    request = runtime.Request(**SMALL, quality="fast")
    whole = runtime.generate(model, request)

    def stop(step: int, *_: object) -> None:
        if step == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        runtime.generate(model, request, on_step=stop, checkpoints=Checkpoints(tmp_path, "key", steps=1))
    again = runtime.generate(model, request, checkpoints=Checkpoints(tmp_path, "key"))
    assert np.array_equal(again.frames, whole.frames)
    assert again.receipt.quality == whole.receipt.quality
    finished = runtime.generate(model, request, checkpoints=Checkpoints(tmp_path, "key"))
    assert finished.receipt.quality == whole.receipt.quality


def test_two_experts_are_interleaved_and_resumed(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped on both sides of the boundary between them, requests of other steps and sizes in between."""
    monkeypatch.setattr(budget, "TABLE_ERROR", 1e3)  # of random weights no prediction would be trusted
    write(Tiny(experts=2), tmp_path / "model")
    tiny = runtime.load(tmp_path / "model", device="cpu")
    asked = SMALL | {"width": 32, "height": 32, "quality": "fast"}
    outer, inner = runtime.Request(**asked), runtime.Request(**asked | {"steps": 19, "num_frames": 9})
    whole, alone = (runtime.generate(tiny, request) for request in (outer, inner))
    said = whole.receipt.quality
    assert said is not None and said["windows"][0]["computed"] < SMALL["steps"]
    sigmas = outer.resolved(tiny.spec).schedule(tiny.spec).tolist()
    turn = sum(sigma >= (tiny.spec.boundary or 0.0) for sigma in sigmas)
    assert 2 < turn < SMALL["steps"] - 2
    for at in (turn - 1, turn, turn + 1):

        def stop(step: int, *_: object, at: int = at) -> None:
            assert np.array_equal(runtime.generate(tiny, inner).frames, alone.frames)
            if step == at:
                raise Cancelled

        places = tmp_path / str(at)
        places.mkdir()
        with pytest.raises(Cancelled):
            runtime.generate(tiny, outer, on_step=stop, checkpoints=Checkpoints(places, "key", steps=1))
        again = runtime.generate(tiny, outer, checkpoints=Checkpoints(places, "key"))
        assert np.array_equal(again.frames, whole.frames)
        assert again.receipt.quality == said


def test_from_the_command_line(tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS))
    asked = ["--size", "64x64", "--frames", "5", "--steps", "6", "--device", "cpu"]
    assert main(["calibrate", "--prompts", str(prompts), *asked]) == 0
    assert f"kept in {files[0]}" in capsys.readouterr().out
    receipt = tmp_path / "receipt.json"
    made = [
        "generate",
        "a red ball",
        *asked,
        "-o",
        str(tmp_path / "ball.gif"),
        "--receipt",
        str(receipt),
        "--seed",
        "4",
    ]
    assert main([*made, "--quality", "5", "--measure"]) == 0
    assert "quality: 5.0, calibrated" in capsys.readouterr().out
    said = json.loads(receipt.read_text())["quality"]
    assert said["measured"]["psnr"] > 5
    assert len(said["measured"]["frame_ssim"]) == 5
    assert runtime.Request.from_receipt(receipt).quality == 5.0
    assert main([*made, "--quality", "best"]) == 2
    assert "quality is 'best'; legal: exact, high, fast" in capsys.readouterr().err


def test_ssim_is_its_formula_on_every_window() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, (1, 13, 12, 3), np.uint8) for _ in range(2))
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for top, left, colour in itertools.product(range(3), range(2), range(3)):
        a, b = (v[0, top : top + 11, left : left + 11, colour].astype(float) for v in (one, other))
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb, c = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum(), (window * (a - ma) * (b - mb)).sum()
        c1, c2 = 2.55**2, 7.65**2
        found.append((2 * ma * mb + c1) * (2 * c + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert fidelity.frame_ssim(one, other) == pytest.approx([np.mean(found)])
    assert fidelity.frame_ssim(one, one) == pytest.approx([1.0])


def test_psnr_is_its_formula() -> None:
    one = np.zeros((2, 16, 16, 3), np.uint8)
    other = one.copy()
    other[1] = 5
    assert fidelity.frame_psnr(one, other) == pytest.approx([fidelity.EQUAL, 20 * np.log10(255 / 5)])
    assert fidelity.psnr(one, other) == pytest.approx(20 * np.log10(255 / 5) + 10 * np.log10(2))
    with pytest.raises(ValueError, match="legal: the same"):
        fidelity.psnr(one, other[:1])
