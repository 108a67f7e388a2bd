"""Schedules and samplers against diffusers' schedulers, and as what they claim to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.samplers import effective_order, make_sampler, start
from runtime.schedules import make_schedule
from tests.published import relative


def unipc_reference(steps: int, shift: float, **options: object) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift, **options
    )
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
    """A field that is neither constant nor linear."""
    return torch.sin(3 * x + step) + 0.3 * x


@settings(deadline=None, max_examples=150)
@given(steps=st.integers(1, 200), shift=st.floats(0.5, 20.0))
def test_flow_linear_equals_published(steps: int, shift: float) -> None:
    ours, theirs = make_schedule("flow_linear", steps, shift), unipc_reference(steps, shift)
    assert torch.equal(ours.float(), theirs.sigmas)
    # The model is told whole-number times; one thousandth off is another video.
    assert torch.equal((ours[:-1] * 1000.0).floor().long(), theirs.timesteps)


@settings(deadline=None, max_examples=100)
@given(steps=st.integers(1, 200), shift=st.floats(0.5, 20.0))
def test_flow_euler_equals_published(steps: int, shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    ours = make_schedule("flow_euler", steps, shift)
    assert torch.allclose(ours.float(), theirs.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_unipc_equals_published(steps: int, order: int, solver: str, shift: float) -> None:
    theirs = unipc_reference(steps, shift, solver_order=order, solver_type=solver)
    compare(theirs, steps, shift, {"order": order, "solver": solver})


def test_unipc_without_corrector_at_some_steps() -> None:
    theirs = unipc_reference(12, 3.0, disable_corrector=[0, 1, 5])
    compare(theirs, 12, 3.0, {"skip_corrector": (0, 1, 5)})


def compare(theirs: UniPCMultistepScheduler, steps: int, shift: float, options: dict) -> None:
    """Step both side by side; their coefficients are float32, which a solve amplifies at order 3, ours float64."""
    noise = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    step, state, x = make_sampler("unipc", options), start(noise.clone()), noise.clone()
    sigmas = make_schedule("flow_linear", steps, shift).tolist()
    for i, time in enumerate(theirs.timesteps):
        state = step(state, velocity(state.x, i), sigmas)
        if options.get("solver") == "bh1" and i == steps - 1:
            # The published bh1 multiplies infinity by zero at sigma 0; ours lands on the prediction.
            assert torch.equal(state.x, state.history[0])
            return
        x = theirs.step(velocity(x, i), time, x, return_dict=False)[0]
        assert relative(state.x, x) <= (1e-4 if options.get("order", 2) < 3 else 1e-3)
    assert state.step == steps


def test_euler_equals_published() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(20)
    noise = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    step, state, x = make_sampler("euler"), start(noise), noise
    for i, time in enumerate(theirs.timesteps):
        state = step(state, velocity(state.x, i), make_schedule("flow_euler", 20, 3.0).tolist())
        x = theirs.step(velocity(x, i), time, x, return_dict=False)[0]
    assert relative(state.x, x) <= 1e-5


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_a_constant_clean_prediction_is_reached(name: str) -> None:
    clean, noise = torch.full((1, 1, 1, 2, 2), 0.7), torch.randn(1, 1, 1, 2, 2)
    sigmas = make_schedule("flow_linear", 10, 3.0).tolist()
    step, state = make_sampler(name), start(noise)
    for i in range(10):
        state = step(state, (state.x - clean) / sigmas[i], sigmas)
    assert torch.allclose(state.x, clean, atol=1e-5)


def test_unipc_converges_faster_than_euler() -> None:
    """On x' = v(x, sigma) with a known fine solution, the second-order method has the smaller error."""

    def solve(name: str, steps: int) -> float:
        step, state = make_sampler(name), start(torch.tensor([0.9], dtype=torch.float32))
        sigmas = make_schedule("flow_linear", steps, 1.0).tolist()
        for i in range(steps):
            state = step(state, torch.cos(2 * state.x) * (1 + sigmas[i]), sigmas)
        return float(state.x)

    truth = solve("euler", 4000)
    assert abs(solve("unipc", 20) - truth) < 0.2 * abs(solve("euler", 20) - truth)


def test_a_step_leaves_its_state_alone() -> None:
    sigmas = make_schedule("flow_linear", 6, 3.0).tolist()
    step, state = make_sampler("unipc"), start(torch.randn(1, 1, 1, 2, 2))
    for i in range(4):
        before = (state.x.clone(), [h.clone() for h in state.history])
        following = step(state, velocity(state.x, i), sigmas)
        assert torch.equal(state.x, before[0])
        assert all(torch.equal(a, b) for a, b in zip(state.history, before[1], strict=True))
        assert torch.equal(step(state, velocity(state.x, i), sigmas).x, following.x)
        state = following


def test_order_falls_at_both_ends() -> None:
    assert [effective_order(i, 6, 3) for i in range(6)] == [1, 2, 3, 3, 2, 1]


def test_unknown_sampler_names_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="euler, lcm, unipc"):
        make_sampler("ddim")


def test_start_below_one_skips_high_sigmas() -> None:
    full, part = make_schedule("flow_linear", 20, 3.0), make_schedule("flow_linear", 20, 3.0, start=0.6)
    assert part[0] == 0.6
    assert np.array_equal(part[1:].numpy(), full[len(full) - len(part) + 1 :].numpy())
    assert full[len(full) - len(part)] <= 0.6 < full[len(full) - len(part) - 1]
