"""Requests: defaults, and what is refused with which sentence."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import runtime
from runtime.model import DEMO
from runtime.models import open_checkpoint
from runtime.request import Request

SPEC = open_checkpoint(DEMO).spec


def test_none_means_the_models_own_default() -> None:
    request = Request(prompt="a ball").resolved(SPEC)
    assert (request.width, request.height, request.num_frames, request.fps) == (160, 96, 17, 8)
    assert (request.steps, request.guidance, request.shift, request.sampler) == (25, 4.0, 3.0, "unipc")
    assert request.guidance_2 is None
    assert 0 <= request.seed < 2**31
    assert Request(prompt="a ball").resolved(SPEC).seed != request.seed


def test_given_values_stay() -> None:
    request = Request(prompt="a", width=96, height=32, num_frames=5, fps=12.5, steps=3, guidance=1, shift=2, seed=5)
    assert request.resolved(SPEC) == replace(request, sampler="unipc", window=17, overlap=5)


def test_second_guidance_follows_the_published_or_the_first() -> None:
    two = replace(SPEC, boundary=0.9)
    assert Request(prompt="a", guidance=6.0).resolved(two).guidance_2 == 6.0
    published = replace(two, defaults=replace(SPEC.defaults, guidance_2=3.0))
    assert Request(prompt="a").resolved(published).guidance_2 == 3.0
    assert Request(prompt="a").resolved(two).boundary == 0.9
    assert Request(prompt="a", boundary=0.5).resolved(two).boundary == 0.5
    for alone in ({"guidance_2": 3.0}, {"boundary": 0.5}):
        with pytest.raises(ValueError, match="one expert"):
            Request(prompt="a", **alone).resolved(SPEC)


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(TypeError):
        Request("a ball")
    with pytest.raises(FrozenInstanceError):
        Request(prompt="a").prompt = "b"
    with pytest.raises(TypeError):
        Request(prompt="a", colour="red")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": 3}, "legal: text"),
        ({"guidance": math.nan}, "guidance is nan; legal: a finite number"),
        ({"guidance": math.inf}, "finite"),
        ({"guidance_2": -math.inf}, "finite"),
        ({"shift": 0}, "more than 0"),
        ({"boundary": 1.5}, "up to 1"),
        ({"guidance": 1e308}, "up to 1000"),
        ({"seconds": 1e300}, "up to 1000000"),
        ({"guidance_2": -1e6}, "up to 1000"),
        ({"fps": -1.0}, "more than 0"),
        ({"fps": math.nan}, "finite"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "whole number"),
        ({"width": True}, "whole number"),
        ({"num_frames": -4}, "at least 1"),
        ({"seed": -1}, "from 0 to"),
        ({"seed": 2**64}, "from 0 to"),
        ({"sampler": "ddim"}, "legal: euler, lcm, unipc"),
    ],
)
def test_refused_for_any_model(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Request(**{"prompt": "a", **values})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"width": 65}, "is 65x96; the width and height of a video are even: take 64x96 or 66x96"),
        ({"width": 1, "height": 1}, "makes 16x16 at least: take 16x16"),
        ({"width": 15, "height": 97}, "makes 16x16 at least: take 16x98"),
        ({"num_frames": 16}, "take 13 or 17"),
        ({"num_frames": 2}, "take 1 or 5"),
        ({"num_frames": 4097, "window": 4097}, "4093 at most"),
        ({"window": 16}, "window is 16; legal: 1 \\+ 4"),
        ({"overlap": 9, "window": 9}, "at least 13"),
        ({"seconds": 2.0, "num_frames": 17}, "are 16; give one of them"),
        ({"width": 16400}, "16384 at most"),
        ({"width": 99999}, "16384 at most"),
        ({"seconds": 1e6}, "up to 1000000"),
    ],
)
def test_refused_by_the_model(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Request(prompt="a", **values).resolved(SPEC)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), frames=st.integers(1, 400))
def test_the_sizes_it_proposes_are_legal(width: int, height: int, frames: int) -> None:
    try:
        Request(prompt="a", width=width, height=height, num_frames=frames).resolved(SPEC)
    except ValueError as error:
        for proposal in str(error).rsplit("take ", 1)[1].split(" or "):
            if "x" in proposal:
                w, h = map(int, proposal.split("x"))
                Request(prompt="a", width=w, height=h, num_frames=5).resolved(SPEC)
            else:
                Request(prompt="a", num_frames=int(proposal)).resolved(SPEC)


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [
        (torch.zeros(32, 5, 12, 9), r"shape \[32, 5, 12, 9\]; legal: \[32, 5, 12, 20\]"),
        (torch.zeros(2, 32, 5, 12, 20), "shape"),
        (torch.zeros(32, 5, 12, 20, dtype=torch.int64), "floating-point"),
        (torch.full((32, 5, 12, 20), math.nan), "NaN or infinity in latent frame 0"),
        ("noise", "legal: a floating-point torch tensor"),
    ],
)
def test_refused_noise(noise: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        runtime.generate(runtime.load("demo"), Request(prompt="a", steps=1), noise=noise)
