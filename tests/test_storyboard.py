"""Storyboards: the rule for holes and overlaps, prompts per section, pictures in their places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime import Card, Clip, Request
from runtime.__main__ import main
from runtime.reading import read_video
from runtime.storyboard import read_storyboard
from runtime.tasks import plan_task

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def story(*cards: Card) -> Request:
    return Request(prompt="", storyboard=cards, steps=1, guidance=1, seed=1)


def test_holes_belong_to_the_card_before() -> None:
    spec = runtime.load("demo").spec
    request = story(Card(3, 4, "second"), Card(0.5, 1, "first")).resolved(spec)
    plan = plan_task(request, spec)
    assert plan.num_frames == request.num_frames == 32
    made = [(window.prompt, part.stop - part.start) for window, part in zip(plan.windows, plan.parts, strict=True)]
    assert sum(count for prompt, count in made if prompt == "first") == 24
    assert sum(count for prompt, count in made if prompt == "second") == 8
    assert [prompt for prompt, _ in made] == sorted(prompt for prompt, _ in made)


def test_a_picture_is_known_to_what_leads_up_to_it() -> None:
    model = runtime.load("demo")
    cards = Card(0, 1, "a red ball"), Card(1, 2.5, "a blue ball", Clip(PICTURE)), Card(2.5, 3, "it rests")
    video = runtime.generate(model, story(*cards))
    frames = video.frames
    assert len(frames) == 24
    assert np.array_equal(frames[8], PICTURE)
    plan = plan_task(story(*cards).resolved(model.spec), model.spec, [1])
    assert plan.windows[0].given[0].at == 8
    assert np.array_equal(runtime.generate(model, story(*cards)).frames, frames)
    assert video.receipt.request["storyboard"][0] == {"from": 0, "to": 1, "prompt": "a red ball"}


def test_a_clip_stands_where_its_card_begins() -> None:
    """What is longer than its card is cut; the rest of a longer card goes on from the clip."""
    model = runtime.load("demo")
    clip = np.random.default_rng(1).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    cards = Card(0, 1, "a red ball", Clip(clip)), Card(1, 1.5, "it rests", Clip(clip)), Card(1.5, 2, "it rolls")
    frames = runtime.generate(model, story(*cards)).frames
    assert len(frames) == 16
    assert np.array_equal(frames[:6], clip) and np.array_equal(frames[8:12], clip[:4])


def test_other_prompts_make_other_frames() -> None:
    model = runtime.load("demo")
    one, other = (runtime.generate(model, story(Card(0, 2, "a red ball"), Card(2, 4, p))).frames for p in ("a", "b c"))
    assert np.array_equal(one[:16], other[:16])
    assert not np.array_equal(one[16:], other[16:])


def test_from_a_file(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    cards = [{"from": 0, "to": 1, "prompt": "a ball", "image": "a.png"}, {"from": 1, "to": 1.5, "prompt": "it rests"}]
    (tmp_path / "story.json").write_text(json.dumps({"cards": cards}))
    target = tmp_path / "film"
    command = ["generate", "--storyboard", str(tmp_path / "story.json"), "-o", str(target), "--steps", "1", "--quiet"]
    assert main([*command, "--receipt", str(tmp_path / "r.json")]) == 0
    frames = read_video(target).frames
    assert len(frames) == 12
    assert np.array_equal(frames[0], PICTURE)
    again = Request.from_receipt(tmp_path / "r.json")
    assert [card.end for card in again.storyboard] == [1, 1.5]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no JSON"),
        ("{}", "holds no cards"),
        ('[{"from": 0, "to": 2, "prompt": "a"}, {"from": 1, "to": 3, "prompt": "b"}]', "0 to 2 seconds overlaps"),
        ('[{"from": 2, "to": 1, "prompt": "a"}]', "legal: onward"),
        ('[{"from": 0, "to": "x", "prompt": "a"}]', "legal: seconds"),
        ('[{"from": 0, "to": 1, "prompt": " "}]', "no prompt"),
        ('[{"from": 0, "to": 1}]', "legal: an object with from"),
        ('[{"from": 0, "to": 1, "prompt": "a", "colour": "red"}]', "legal: an object with from"),
        ('[{"from": 0, "to": 1, "prompt": "a", "image": "a.png", "clip": "b.mp4"}]', "an image and a clip"),
    ],
)
def test_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "story.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_storyboard(tmp_path / "story.json")


def test_nothing_beside_a_storyboard() -> None:
    with pytest.raises(ValueError, match="by itself"):
        Request(prompt="", storyboard=(Card(0, 1, "a"),), periodic=True)
