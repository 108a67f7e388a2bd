"""Few-step weights are sampled as published: schedules, fresh noise, one forward a step; and nothing is skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.schedulers import scheduling_flow_match_lcm
from hypothesis import given
from hypothesis import strategies as st

import runtime
from runtime import budget, rungs
from runtime.__main__ import main
from runtime.checkpoints import Checkpoints
from runtime.denoising import Cancelled
from runtime.recipes import RECIPES
from runtime.samplers import fresh_noise, make_sampler, start
from runtime.schedules import given_schedule
from tests.published import Tiny, relative, write

LEVELS = [1.0, 0.75, 0.5, 0.25]
ASKED: dict[str, Any] = {"prompt": "a cat jumps", "width": 32, "height": 32, "num_frames": 5, "seed": 11}


class FourSteps(FlowMatchEulerDiscreteScheduler):
    """As the publisher's own script sets it."""

    def set_timesteps(self, *_: Any, **more: Any) -> None:
        super().set_timesteps(len(LEVELS), device=more.get("device"), sigmas=LEVELS)


class FourNoisySteps(FlowMatchLCMScheduler):
    """The same, with fresh noise behind each step."""

    def set_timesteps(self, *_: Any, **more: Any) -> None:
        super().set_timesteps(len(LEVELS), device=more.get("device"), sigmas=LEVELS)


PUBLISHED = {"lightning-4": FourSteps, "lightx2v-4": FourNoisySteps}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Two experts whose scheduler does not round times."""
    folder = tmp_path_factory.mktemp("experts")
    pipe = write(Tiny(experts=2), folder)
    FourSteps(shift=5.0).save_pretrained(folder / "scheduler")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("FourSteps", "FlowMatchEulerDiscreteScheduler"))
    return pipe, folder


@pytest.fixture(scope="module")
def model(experts: tuple[Any, Path]) -> runtime.Model:
    return runtime.load(experts[1], device="cpu")


def our_noise(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let the published sampler draw what ours draws."""
    drawn: list[int] = []

    def draw(shape: torch.Size, **_: Any) -> torch.Tensor:
        drawn.append(len(drawn))
        return fresh_noise(torch.empty(shape), seed, drawn[-1])

    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", draw)


@pytest.mark.parametrize("name", ["lightning-4", "lightx2v-4"])
def test_levels_are_those_of_the_published_scheduler(name: str) -> None:
    theirs = PUBLISHED[name](shift=5.0)
    theirs.set_timesteps()
    assert given_schedule(RECIPES[name].sigmas).numpy() == pytest.approx(theirs.sigmas.numpy(), abs=1e-6)


def test_fresh_noise_equals_the_published_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    our_noise(monkeypatch, 5)
    theirs = FourNoisySteps(shift=5.0)
    theirs.set_timesteps()
    noise = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    step, state, x = make_sampler("lcm", {"seed": 5, "order": 2}), start(noise), noise
    for time in theirs.timesteps:
        state = step(state, torch.cos(3 * state.x), given_schedule(RECIPES["lightx2v-4"].sigmas).tolist())
        x = theirs.step(torch.cos(3 * x), time, x, return_dict=False)[0]
    assert relative(state.x, x) <= 1e-5
    assert torch.equal(fresh_noise(x, 5, 1), fresh_noise(x, 5, 1))
    assert not torch.equal(fresh_noise(x, 5, 1), fresh_noise(x, 5, 2))


@pytest.mark.parametrize("name", ["lightning-4", "lightx2v-4"])
def test_a_whole_request_equals_diffusers(
    experts: tuple[Any, Path], model: runtime.Model, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = experts[0]
    our_noise(monkeypatch, ASKED["seed"])
    pipe.scheduler = PUBLISHED[name](shift=5.0)
    latents = pipe(
        prompt=ASKED["prompt"], height=32, width=32, num_frames=5, num_inference_steps=4, guidance_scale=1.0,
        max_sequence_length=24, generator=torch.Generator().manual_seed(ASKED["seed"]), output_type="latent",
    ).frames[0]  # fmt: skip
    video = runtime.generate(model, runtime.Request(**ASKED, recipe=name))
    assert relative(video.latents, torch.as_tensor(latents)) <= 1e-3
    asked = video.receipt.request
    assert (asked["steps"], asked["guidance"], asked["guidance_2"], asked["recipe"]) == (4, 1.0, 1.0, name)


def test_each_step_is_one_forward_of_its_expert(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    for number, network in enumerate(model.transformers):
        real = network.forward  # type: ignore[attr-defined]

        def forward(x: Any, sigma: Any, projected: Any, *more: Any, number: int = number, real: Any = real) -> Any:
            calls.append((number, projected.keys[0].shape[0]))
            return real(x, sigma, projected, *more)

        monkeypatch.setattr(network, "forward", forward)
    runtime.generate(model, runtime.Request(**ASKED, recipe="lightning-4"))
    assert calls == [(0, 1), (0, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_draws_the_same_noise(model: runtime.Model, tmp_path: Path, at: int) -> None:
    request = runtime.Request(**ASKED, recipe="lightx2v-4")
    whole = runtime.generate(model, request).frames

    def stop(step: int, *_: object) -> None:
        if step == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        runtime.generate(model, request, on_step=stop, checkpoints=Checkpoints(tmp_path, "key", steps=1))
    assert np.array_equal(runtime.generate(model, request, checkpoints=Checkpoints(tmp_path, "key")).frames, whole)
    other = runtime.generate(model, runtime.Request(**ASKED | {"seed": 12}, recipe="lightx2v-4")).frames
    assert not np.array_equal(other, whole)


@pytest.mark.parametrize("sampler", ["euler", "lcm", "unipc"])
def test_any_levels_may_be_given(model: runtime.Model, sampler: str) -> None:
    request = runtime.Request(**ASKED, sigmas=(1.0, 0.7, 0.2), sampler=sampler).resolved(model.spec)
    assert request.steps == 3
    sigmas = request.schedule(model.spec)
    assert sigmas.tolist() == pytest.approx([1.0, 0.7, 0.2, 0.0], abs=2e-6)
    assert request.schedule(model.spec, 0.5).tolist() == pytest.approx([0.5, 0.0])
    again = runtime.Request(**json.loads(json.dumps(request.record()))).resolved(model.spec)
    assert again.record() == request.record()
    assert runtime.generate(model, request).frames.shape == (5, 32, 32, 3)
    assert request.drafted(model.spec).steps == 3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sigmas": ()}, "falling numbers from 1 at most"),
        ({"sigmas": (0.5, 0.7)}, "falling numbers from 1 at most"),
        ({"sigmas": (1.2, 0.7)}, "falling numbers from 1 at most"),
        ({"sigmas": (1.0, 0.0)}, "falling numbers from 1 at most"),
        ({"sigmas": "1,0.5"}, "falling numbers from 1 at most"),
        ({"sigmas": (1.0, float("nan"))}, "falling numbers from 1 at most"),
        ({"recipe": "turbo"}, "recipe is 'turbo'; legal: fastwan-3, lightning-4, lightx2v-4"),
        ({"recipe": "fastwan-3", "steps": 4}, "steps is 4, and 3 sigmas are given"),
    ],
)
def test_what_is_no_schedule_is_refused(model: runtime.Model, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        runtime.Request(**ASKED, **given).resolved(model.spec)


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=8, unique=True))
def test_falling_levels_are_kept(levels: list[float]) -> None:
    falling = sorted(levels, reverse=True)
    assert runtime.Request(prompt="a", sigmas=tuple(falling)).sigmas == tuple(falling)
    if len(levels) > 1:
        with pytest.raises(ValueError, match="falling numbers"):
            runtime.Request(prompt="a", sigmas=tuple(reversed(falling)))


def test_a_checkpoint_may_name_its_recipe(tmp_path: Path) -> None:
    write(Tiny(), tmp_path)
    settings = json.loads((tmp_path / "runtime.json").read_text())
    for own, levels, sampler in (
        ({"recipe": "fastwan-3"}, (1.0, 0.757, 0.522), "lcm"),
        ({"sigmas": [1.0, 0.4], "guidance": 1.0, "sampler": "euler"}, (1.0, 0.4), "euler"),
    ):
        (tmp_path / "runtime.json").write_text(json.dumps(settings | {"defaults": settings["defaults"] | own}))
        spec = runtime.load(tmp_path, device="cpu").spec
        asked = runtime.Request(prompt="a cat").resolved(spec)
        assert (asked.sigmas, asked.sampler, asked.guidance) == (levels, sampler, 1.0)
        assert runtime.Request(prompt="a cat", steps=6).resolved(spec).sigmas is None


def test_a_pipeline_of_distilled_weights_brings_its_recipe(tmp_path: Path) -> None:
    write(Tiny(), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    model = runtime.load(tmp_path, device="cpu")
    asked = runtime.generate(model, runtime.Request(**ASKED)).receipt.request
    assert (asked["recipe"], asked["steps"], asked["sampler"], asked["guidance"]) == ("fastwan-3", 3, "lcm", 1.0)
    network: Any = model.transformers[0]
    assert [float(network.times(s[None])) for s in torch.tensor(asked["sigmas"], dtype=torch.float64)] == [
        1000,
        757,
        522,
    ]


def test_quality_skips_none_of_few_steps_and_says_so(
    model: runtime.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "files", lambda model: (tmp_path / "beside.json", tmp_path / "stored.json"))
    request = runtime.Request(**ASKED, recipe="lightx2v-4", quality="fast")
    video = runtime.generate(model, request)
    assert any("of 4 given levels, too far apart" in note for note in video.receipt.notes)
    exact = runtime.generate(model, runtime.Request(**ASKED, recipe="lightx2v-4"))
    assert np.array_equal(video.frames, exact.frames)
    few = runtime.Request(**ASKED, recipe="lightx2v-4")
    found = rungs.calibrate(model, few, ("a cat", "a dog", "a cow", "a hen"), fp8=False)
    assert found.rungs == ()
    budget.write(model, found)
    assert budget.read(tmp_path / "beside.json") == [found]
    again = runtime.generate(model, request)
    assert any("none is measured" in note for note in again.receipt.notes)


def test_from_the_command_line(experts: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["generate", "a cat", "--model", str(experts[1]), "--size", "32x32", "--frames", "5", "--device", "cpu"]
    made += ["-o", str(tmp_path / "cat.gif"), "--quiet"]
    assert main([*made, "--recipe", "lightning-4"]) == 0
    assert main([*made, "--sigmas", "1,0.5"]) == 0
    assert main([*made, "--sigmas", "0.5,1"]) == 2
    assert "falling numbers from 1 at most" in capsys.readouterr().err
