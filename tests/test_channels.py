"""Weights that take known frames in channels of their own, against diffusers: I2V, FLF2V, I2V-A14B, VACE."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import runtime
from runtime import Clip, Request
from runtime.__main__ import main
from runtime.clips import fit_frame
from runtime.models.spec import ImageSize
from runtime.pictures import shown
from runtime.pipeline import final_request
from runtime.reading import read_video
from runtime.video import Video
from tests.published import Tiny, channels_pipeline, control_pipeline, relative, tokenizer, write

PROMPT = "a red ball rolls left over green grass"
TINY = Tiny(text_length=512, seed=70)  # diffusers' picture attention takes 512 text tokens for granted
TWO = Tiny(text_length=512, experts=2, boundary=0.9, seed=71)
SIZE = {"width": 48, "height": 32}


def pictures(count: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def theirs(pipe: Any, request: Request, **more: object) -> torch.Tensor:
    out = pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        **SIZE,
        num_frames=request.num_frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        **more,
    )
    return torch.as_tensor(out.frames[0])


def asked(**more: Any) -> Request:
    return Request(prompt=PROMPT, negative_prompt="blurry", num_frames=9, steps=8, guidance=4.0, seed=5, **SIZE, **more)


@pytest.mark.parametrize("images", [1, 0])
def test_image_to_video(tmp_path: Path, images: int) -> None:
    tiny = TINY if images else TWO
    pipe = write(tiny, tmp_path / "model", partial(channels_pipeline, images=images))
    picture = pictures(1)[0]
    model = runtime.load(tmp_path / "model")
    assert model.spec.conditioning == "channels"
    video = runtime.generate(model, asked(clips=(Clip(picture),)))
    more = {"guidance_scale_2": 4.0} if tiny is TWO else {}
    latents = theirs(pipe, asked(), image=Image.fromarray(picture), **more)
    assert relative(video.latents, latents) <= 1e-3
    assert np.array_equal(video.frames[0], picture)
    with pytest.raises(ValueError, match="give a picture"):
        runtime.generate(model, asked())


def test_first_and_last_frame(tmp_path: Path) -> None:
    pipe = write(TINY, tmp_path / "model", partial(channels_pipeline, images=2))
    first, last = pictures(2)
    model = runtime.load(tmp_path / "model")
    request = asked(clips=(Clip(first), Clip(last, at="end")))
    video = runtime.generate(model, request)
    latents = theirs(pipe, asked(), image=Image.fromarray(first), last_image=Image.fromarray(last))
    assert relative(video.latents, latents) <= 1e-3
    assert np.array_equal(video.frames[[0, -1]], [first, last])


@pytest.mark.parametrize("references", [0, 2])
def test_vace(tmp_path: Path, references: int) -> None:
    pipe = write(TINY, tmp_path / "model", control_pipeline)
    clip, looks = pictures(9), pictures(references, seed=1)
    mask = np.zeros((9, 32, 48), bool)
    mask[3:] = True
    mask[:, 8:20, 10:30] = True
    model = runtime.load(tmp_path / "model")
    assert model.spec.conditioning == "control"
    request = asked(clips=(Clip(clip, mask=mask),), references=tuple(Clip(look) for look in looks))
    video = runtime.generate(model, request)
    latents = theirs(
        pipe,
        asked(),
        video=[Image.fromarray(frame) for frame in clip],
        mask=[Image.fromarray(m.astype(np.uint8) * 255) for m in mask],
        reference_images=[Image.fromarray(look) for look in looks] or None,
    )
    assert relative(video.latents, latents[:, references:]) <= 1e-3


def test_vace_of_text_alone(tmp_path: Path) -> None:
    pipe = write(TINY, tmp_path / "model", control_pipeline)
    video = runtime.generate(runtime.load(tmp_path / "model"), asked())
    assert relative(video.latents, theirs(pipe, asked())) <= 1e-3


VERBS = {
    "animate": {"clips": (Clip(pictures(1)),)},
    "extend": {"clips": (Clip(pictures(6)),), "direction": "forward"},
    "connect": {"clips": (Clip(pictures(6)), Clip(pictures(3))), "direction": "between"},
    "loop": {"clips": (Clip(pictures(6)),), "periodic": True},
    "fill": {"clips": (Clip(pictures(3)), Clip(pictures(2), at=7))},
}


@pytest.mark.parametrize("kind", ["channels", "control"])
def test_every_verb(tmp_path: Path, kind: str) -> None:
    build = control_pipeline if kind == "control" else channels_pipeline
    write(Tiny(seed=72), tmp_path / "model", build)
    model = runtime.load(tmp_path / "model")
    for name, verb in VERBS.items():
        request = Request(prompt=PROMPT, steps=1, guidance=1, seed=3, **SIZE, **verb)
        frames = runtime.generate(model, request).frames
        kept = verb["clips"][0].video.frames
        assert np.array_equal(frames[: len(kept)], kept), name
        assert np.array_equal(runtime.generate(model, request).frames, frames), name


def test_pictures_are_shown_as_the_published_processor_does() -> None:
    from transformers import CLIPImageProcessor

    assert tokenizer()
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    size = ImageSize(1, 28, (28, 28), tuple(processor.image_mean), tuple(processor.image_std))
    for height, width in ((28, 28), (64, 96), (97, 61), (20, 24)):
        picture = pictures(1, height, width)[0]
        published = processor(images=Image.fromarray(picture), return_tensors="pt").pixel_values[0]
        assert float((shown(picture, size) - published).abs().max()) <= 1.01 / 255 / min(size.std)


@pytest.mark.parametrize("images", [1, 2])
def test_a_draft_of_pictures_is_finished(tmp_path: Path, images: int) -> None:
    """The draft is known softly, the pictures firmly: in the channels, to the image encoder, and in the result."""
    write(TINY, tmp_path / "model", partial(channels_pipeline, images=images))
    model = runtime.load(tmp_path / "model")
    first, last = pictures(2)
    clips = (Clip(first), Clip(last, at="end"))[:images]
    final = final_request(model, asked(clips=clips).resolved(model.spec), 96, 64, steps=3)
    frames = runtime.generate(model, final).frames
    assert frames.shape == (9, 64, 96, 3)
    for place, picture in ((0, first), (-1, last))[:images]:
        assert np.array_equal(frames[place], fit_frame(picture, 96, 64, "crop"))
    with pytest.raises(ValueError, match="goes on from known frames"):
        runtime.generate(model, asked(clips=(Clip(pictures(9)),), strength=0.5))


def test_masks_and_references_on_the_command_line(tmp_path: Path) -> None:
    write(Tiny(seed=72), tmp_path / "model", control_pipeline)
    clip, mask = pictures(5), np.zeros((64, 96, 3), np.uint8)
    mask[:, 48:] = 255
    Video(clip, fps=8, num_frames=5, height=32, width=48).save(tmp_path / "clip/")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(clip[0]).save(tmp_path / "look.png")
    command = ["edit", str(tmp_path / "clip"), "winter", "--model", str(tmp_path / "model"), "--steps", "1"]
    more = ["--mask", str(tmp_path / "mask.png"), "--reference", str(tmp_path / "look.png"), "--seed", "3", "--quiet"]
    assert main([*command, *more, "-o", str(tmp_path / "out")]) == 0
    half = np.zeros((32, 48), bool)
    half[:, 24:] = True
    request = Request(
        prompt="winter", steps=1, seed=3, clips=(Clip(clip, mask=half),), references=(Clip(clip[0]),), fps=24
    )
    expected = runtime.generate(runtime.load(tmp_path / "model"), request)
    assert np.array_equal(read_video(tmp_path / "out").frames, expected.frames)


@pytest.mark.parametrize(("shape", "given"), [((32, 32), "32, 32"), ((4, 32, 48), "4, 32, 48"), ((48, 32), "48, 32")])
def test_a_mask_of_another_size_is_refused(tmp_path: Path, shape: tuple[int, ...], given: str) -> None:
    write(Tiny(seed=72), tmp_path / "model", control_pipeline)
    clip = Clip(pictures(5), mask=np.ones(shape, bool))
    with pytest.raises(ValueError, match=rf"mask is \[{given}\]; legal for this clip: \[32, 48\]"):
        runtime.generate(runtime.load(tmp_path / "model"), asked(clips=(clip,)))


def test_masks_and_references_are_for_vace() -> None:
    model = runtime.load("demo")
    for more in ({"references": (Clip(pictures(1)),)}, {"clips": (Clip(pictures(1), mask=np.ones((32, 48), bool)),)}):
        with pytest.raises(ValueError, match="take VACE"):
            runtime.generate(model, Request(prompt="a", **more))
