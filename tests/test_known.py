"""Known frames: equality with diffusers' pipelines, held latents, spliced frames, every conditioning kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import runtime
from benchmarks import pixels
from runtime import Clip, Request
from runtime.clips import fit_frame
from runtime.denoising import Known, held, renoised
from runtime.known import filled, latent_holds
from runtime.models.layers import _axis_table, rotary_table
from runtime.models.spec import Stretch
from runtime.pipeline import final_request, from_calmest
from runtime.planner import find_model, plan_request
from runtime.samplers import SamplerState
from runtime.schedules import make_schedule
from runtime.splicing import FADE, LAST, LEAST, Splicer, dithered
from runtime.tasks import Given, Window, plan_task
from tests.published import Tiny, image_pipeline, pipeline, relative, write

PROMPT = "a red ball rolls left over green grass"
TI2V = Tiny(residual=True, channels=8, seed=60)
PLAIN = Tiny(seed=61)
RANDOM = np.random.default_rng(0)
DRIFT = 8  # levels of 255 within which the ground stays over a minute; 3 were measured


def noisy_clip(frames: int, height: int, width: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def conditioned(model: runtime.Model, kind: str) -> runtime.Model:
    """The same weights, their known frames consumed in another way."""
    checkpoint = replace(model.checkpoint, spec=replace(model.spec, conditioning=kind))
    return replace(model, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def demo() -> runtime.Model:
    return runtime.load("demo")


def theirs(pipe: object, request: Request, **more: object) -> torch.Tensor:
    """Return diffusers' latents [C, T, H, W] for a request."""
    out = pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
        **more,
    )
    return torch.as_tensor(out.frames[0])


def test_animate_equals_diffusers(tmp_path: Path) -> None:
    """Wan 2.2 TI2V: the first latent frame clean, its tokens at time 0."""
    pipe = write(TI2V, tmp_path / "ti2v", image_pipeline)
    picture = noisy_clip(1, 64, 96)[0]
    asked = {"num_frames": 9, "steps": 12, "guidance": 4.0, "seed": 5, "width": 96, "height": 64}
    request = Request(prompt=PROMPT, negative_prompt="blurry", clips=(Clip(picture),), **asked)
    model = runtime.load(tmp_path / "ti2v")
    assert model.spec.conditioning == "clean_tokens"
    video = runtime.generate(model, request)
    resolved = request.resolved(model.spec)
    latents = theirs(pipe, resolved, image=Image.fromarray(picture), num_frames=9, max_sequence_length=24)
    assert relative(video.latents, latents) <= 1e-3
    assert np.array_equal(video.frames[0], picture)


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.15])
def test_edit_equals_diffusers(tmp_path: Path, strength: float) -> None:
    """SDEdit: diffusers counts strength in steps; the same step's sigma is ours."""
    pipe = WanVideoToVideoPipeline.from_pipe(write(PLAIN, tmp_path / "plain"))
    pipe.set_progress_bar_config(disable=True)
    clip = noisy_clip(9, 48, 64)
    model = runtime.load(tmp_path / "plain")
    steps = 20
    sigma = float(make_schedule("flow_linear", steps, 3.0)[steps - int(steps * strength)])
    request = Request(prompt=PROMPT, steps=steps, guidance=4.0, seed=5, clips=(Clip(clip),), strength=sigma).resolved(
        model.spec
    )
    latents = theirs(pipe, request, video=[Image.fromarray(f) for f in clip], strength=strength, max_sequence_length=24)
    assert relative(runtime.generate(model, request).latents, latents) <= 1e-3


CLIP = Given(0, 0, 9, 0)


@pytest.mark.parametrize(
    ("given_parts", "tail", "holds"),
    [
        ((), 0, [0, 0, 0, 0, 0]),
        ((Given(0, 0, 1, 0),), 0, [1, 0, 0, 0, 0]),
        ((Given(0, 0, 1, 16),), 0, [0, 0, 0, 0, 1]),
        ((Given(0, 0, 1, 6),), 0, [0, 0, 1, 0, 0]),  # a picture holds its whole latent frame
        ((Given(0, 0, 9, 0),), 0, [1, 1, 1, 0, 0]),
        ((Given(0, 0, 8, 0),), 0, [1, 1, 0, 0, 0]),  # only some frames of the third, which go on from the second
        ((Given(0, 0, 7, 0), Given(1, 0, 5, 12)), 0, [1, 1, 0, 0, 1]),  # and only one of the fourth
        ((Given(0, 0, 1, 0), Given(1, 0, 3, 14)), 0, [1, 0, 0, 0, 0.5]),  # nothing else of that clip is known
        ((Given(0, 0, 5, 7),), 0, [0, 0, 0.5, 0.5, 0]),
        ((Given(0, 0, 17, 0, hold=0.25),), 0, [0.25] * 5),
        ((Given(0, 0, 17, 0, hold=0.25), Given(1, 0, 1, 7)), 0, [0.25, 0.25, 1, 0.25, 0.25]),  # a picture in it
        ((Given(0, 0, 4, 13),), 5, [1, 1, 0, 0, 1]),
    ],
)
def test_which_latent_frames_are_held(given_parts: tuple, tail: int, holds: list[float]) -> None:
    assert latent_holds(Window((16, 5, 8, 8), 17, given=given_parts, tail=tail), 4) == holds


def test_places_that_are_not_given_show_the_nearest() -> None:
    frames = {2: np.array(2), 7: np.array(7)}
    assert [int(f) for f in filled(frames, 10)] == [2, 2, 2, 2, 2, 7, 7, 7, 7, 7]


@pytest.mark.parametrize("clean", [True, False])
def test_held_frames_follow_the_path_to_what_is_known(clean: bool) -> None:
    """Whatever the network says, a held frame is (1 - sigma) * known + sigma * its noise at every step."""
    known = Known(torch.randn(1, 4, 3, 2, 2), torch.tensor([1.0, 0.0, 0.5]))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def network(x: torch.Tensor, sigma: torch.Tensor, context: object) -> torch.Tensor:
        seen.append((x, sigma))
        return torch.randn(x.shape)

    noise = torch.randn(1, 4, 3, 2, 2)
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)
    x = noise
    for i in range(10):
        velocity = held(network, known, clean=clean)(x, sigmas[i : i + 1], None)
        x = x + velocity * float(sigmas[i + 1] - sigmas[i])
        level = float(sigmas[i + 1])
        assert torch.allclose(x[:, :, 0], (1 - level) * known.latents[:, :, 0] + level * noise[:, :, 0], atol=1e-5)
        if level >= 0.5:
            assert torch.allclose(x[:, :, 2], (1 - level) * known.latents[:, :, 2] + level * noise[:, :, 2], atol=1e-5)
    assert not torch.allclose(x[:, :, 2], known.latents[:, :, 2], atol=1e-2)
    for i, (x, sigma) in enumerate(seen):
        level = float(sigmas[i])
        if clean:
            assert torch.equal(x[:, :, 0], known.latents[:, :, 0])
            expected = [0.0, level, 0.0 if level > 0.5 else level]
            assert sigma.tolist() == [pytest.approx(expected)]
        else:
            assert sigma.tolist() == [level]


def test_renoising_gives_the_level_it_came_from() -> None:
    """Statistics: a point at sigma 0.3 taken back to 0.8 is 0.2 * video + 0.8 * unit noise."""
    video = torch.full((1, 1, 1, 400, 400), 2.0)
    after = SamplerState(1, 0.7 * video + 0.3 * torch.randn(video.shape))
    before = SamplerState(0, video, history=(video,), corrected=video)
    back = renoised(before, after, [0.8, 0.3], torch.Generator().manual_seed(0))
    assert (back.step, back.corrected) == (0, None)
    assert back.history == (video,)
    assert abs(float(back.x.mean()) - 0.4) < 0.01
    assert abs(float(back.x.std()) - 0.8) < 0.01


VERBS = {
    "animate": ({"clips": (Clip(noisy_clip(1, 64, 64)),)}, 17, {0: 0}),
    "keyframes": (
        {"clips": (Clip(noisy_clip(1, 64, 64), at="end"), Clip(noisy_clip(1, 64, 64)))}, 17, {16: 0, 0: 1}
    ),
    "fill": ({"clips": (Clip(noisy_clip(7, 64, 64)), Clip(noisy_clip(4, 64, 64), at=13))}, 17, {0: 0, 6: 6, 13: 7}),
    "extend": ({"clips": (Clip(noisy_clip(9, 64, 64)),), "direction": "forward"}, 21, {0: 0, 8: 8}),
    "windows": ({"clips": (Clip(noisy_clip(9, 64, 64)),), "direction": "forward", "num_frames": 17, "window": 13}, 26,
                {0: 0, 8: 8}),
    "short": ({"clips": (Clip(noisy_clip(1, 64, 64)),), "direction": "forward", "num_frames": 6}, 7, {0: 0}),
    "prepend": ({"clips": (Clip(noisy_clip(9, 64, 64)),), "direction": "backward"}, 21, {12: 0, 20: 8}),
    "connect": (
        {"clips": (Clip(noisy_clip(9, 64, 64)), Clip(noisy_clip(2, 64, 64))), "direction": "between", "num_frames": 6},
        17, {0: 0, 8: 8, 15: 9, 16: 10},
    ),
    "loop a clip": ({"clips": (Clip(noisy_clip(9, 64, 64)),), "periodic": True}, 16, {0: 0, 8: 8}),
    "loop": ({"periodic": True}, 16, {}),
    "edit": ({"clips": (Clip(noisy_clip(6, 64, 64)),), "strength": 0.5}, 6, {}),
    "long": ({"seconds": 7.5, "width": 32, "height": 32}, 60, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["clean_tokens", "blend"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb(demo: runtime.Model, verb: str, kind: str) -> None:
    """Length, determinism, and that given frames come back byte for byte: {place: which of the clips' frames}."""
    asked, length, kept = VERBS[verb]
    model = conditioned(demo, kind)
    request = Request(prompt=PROMPT, steps=2, guidance=1, resample=1, seed=7, **asked)
    video = runtime.generate(model, request)
    frames = video.frames
    assert len(frames) == length
    given_frames = np.concatenate([clip.video.frames for clip in request.clips]) if request.clips else None
    for place, index in kept.items():
        assert np.array_equal(frames[place], given_frames[index])
    again = runtime.generate(model, request)
    assert np.array_equal(again.frames, frames)
    assert len(video.receipt.seams) == len({s.frame for s in video.receipt.seams})
    assert bool(video.receipt.seams) == bool(kept or verb == "long")


def test_known_latents_come_out_as_they_went_in(demo: runtime.Model) -> None:
    clip = noisy_clip(5, 64, 64)
    request = Request(prompt=PROMPT, steps=4, seed=1, num_frames=17, clips=(Clip(clip),))
    for kind in ("clean_tokens", "blend"):
        latents = runtime.generate(conditioned(demo, kind), request).latents
        assert torch.equal(latents[:, :2], runtime.encode(demo, clip))


def test_more_visits_change_what_is_blended_and_nothing_else(demo: runtime.Model) -> None:
    clip = noisy_clip(5, 64, 64)
    asked = {"prompt": PROMPT, "steps": 4, "seed": 1, "num_frames": 17}
    blending = conditioned(demo, "blend")
    known = [runtime.generate(blending, Request(**asked, clips=(Clip(clip),), resample=n)).latents for n in (1, 2)]
    assert not torch.allclose(known[0][:, 2:], known[1][:, 2:], atol=1e-2)
    free = [runtime.generate(blending, Request(**asked, resample=n)).latents for n in (1, 2)]
    assert torch.equal(*free)


def test_a_loop_has_no_first_frame(demo: runtime.Model) -> None:
    """Turning the noise turns the loop: only the turns of the steps themselves tell frames apart."""
    request = Request(prompt=PROMPT, steps=25, seed=3, periodic=True)
    frames = runtime.generate(demo, request).frames.astype(float)
    steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    closing_step = np.abs(frames[0] - frames[-1]).mean()
    assert closing_step <= steps.min()


@settings(deadline=None)
@given(levels=st.lists(st.integers(0, 255), min_size=1, max_size=12))
def test_a_loop_begins_after_its_least_step(levels: list[int]) -> None:
    made = [int(frame[0, 0]) for frame in from_calmest(np.full((1, 1), n, np.uint8) for n in levels)]
    assert any(made == [*levels[start:], *levels[:start]] for start in range(len(levels)))
    assert abs(made[0] - made[-1]) == min(abs(a - b) for a, b in zip([levels[-1], *levels], levels, strict=False))


@settings(deadline=None, max_examples=60)
@given(
    places=st.sets(st.integers(0, 40), min_size=1, max_size=12),
    start=st.integers(0, 20),
)
def test_splicing(places: set[int], start: int) -> None:
    """Given frames stay; a made frame next to one moves by the given one's difference, a far one not at all."""
    rng = np.random.default_rng(len(places))
    decoded = rng.integers(60, 200, (41, 2, 2, 3), dtype=np.uint8)
    given_frames = {p: np.clip(decoded[p] + rng.integers(-9, 9, (2, 2, 3)), 0, 255).astype(np.uint8) for p in places}
    splicer = Splicer(decoded, given_frames, offset=start)
    out = np.stack(list(splicer.frames()))
    for p in range(41):
        if p in places:
            assert np.array_equal(out[p], given_frames[p])
        elif min(abs(p - q) for q in places) > FADE:
            assert np.array_equal(out[p], decoded[p])
    assert sorted(s.frame - start for s in splicer.seams) == [
        p for p in range(1, 41) if (p in places) != (p - 1 in places)
    ]


def test_a_step_at_a_seam_is_made_as_large_as_those_inside() -> None:
    """Frames brighten by 2 a frame; what is made jumps by 20 more, and the decoder is off by 5 in what is given."""
    ramp = np.arange(20)[:, None, None, None] * 2 + np.full((20, 4, 4, 3), 60)
    given_frames = {p: ramp[p].astype(np.uint8) for p in range(8)}
    decoded = (ramp + 5 + 20 * (np.arange(20) >= 8)[:, None, None, None]).astype(np.uint8)
    splicer = Splicer(decoded, given_frames)
    out = np.stack(list(splicer.frames())).mean((1, 2, 3))
    (seam,) = splicer.seams
    assert (seam.frame, seam.colour, seam.detail) == (8, (-5, -5, -5), 5)
    assert (seam.step, seam.colour_step, seam.usual) == (11, 11, (2, 2))
    assert out[8] - out[7] == pytest.approx(2, abs=0.51)
    assert np.diff(out[8:]).max() <= 2 + 27 / FADE + 1.01  # the rest comes back over the fade
    assert out[16] == decoded[16].mean()


def test_a_colour_step_smaller_than_a_level_is_evened_too() -> None:
    """A clip that stands still, and things that move 2 levels on average: rounding would lose half a level."""
    given_frames = np.full((8, 32, 32, 3), 90, np.uint8)
    decoded = np.full((16, 32, 32, 3), 90, np.uint8)
    decoded[8:, :4, :30] += 17  # moves, so it stays, and the mean differs by 2
    decoded[8:, 4:8, :30] -= 9
    splicer = Splicer(decoded, dict(enumerate(given_frames)))
    out = np.stack(list(splicer.frames()))
    (seam,) = splicer.seams
    assert seam.usual == (LEAST[0], LEAST[1]) and seam.colour_step > 1.5
    assert pixels.colour_steps(out)[7] <= 1.05 * LEAST[1]
    assert np.abs(out.astype(int) - decoded).max() <= 17


@settings(deadline=None)
@given(value=st.floats(0, 255), height=st.integers(1, 9), width=st.integers(1, 9))
def test_dithering_keeps_the_mean(value: float, height: int, width: int) -> None:
    frame = np.full((4 * height, 4 * width, 3), value, np.float32)
    assert abs(dithered(frame).mean() - value) <= 1 / 32 + 1e-4
    assert np.array_equal(dithered(np.rint(frame)), np.rint(frame))


@pytest.mark.parametrize("backward", [False, True])
def test_what_moves_leaves_no_ghost_and_what_stands_still_does_not_change(backward: bool) -> None:
    """A bright square moves on a ground that the decoder makes 4 levels brighter and blurs."""
    frames = np.full((16, 64, 64, 3), 80.0)
    for p in range(16):
        frames[p, 24:40, 3 * p : 3 * p + 16] = 220
    decoded = frames + 4
    decoded[:, 24:40] -= 30 * (frames[:, 24:40] > 200)  # and its square is duller
    known = range(8, 16) if backward else range(8)
    splicer = Splicer(decoded.astype(np.uint8), {p: frames[p].astype(np.uint8) for p in known})
    out = np.stack(list(splicer.frames())).astype(float)
    first, given_next = (7, 8) if backward else (8, 7)
    assert np.abs(out[first, :16] - out[given_next, :16]).max() <= 1.5  # the ground far from the square
    (seam,) = splicer.seams
    assert seam.lasting < 0.5
    for p in range(8) if backward else range(8, 16):
        left = np.ones((64, 64), bool)
        left[22:42, max(0, 3 * p - 2) : 3 * p + 18] = False
        lasting = seam.lasting * 140 if abs(p - first) < LAST else 0
        assert np.abs(out[p][left] - 82).max() <= 8 + lasting  # neither where the square was nor where it will be
    assert pixels.seam_ratio(pixels.steps(out), [8]) <= 1.5


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"clips": (Clip(noisy_clip(1, 64, 64), at=17),), "num_frames": 17}, "a place from 0 to 16"),
        ({"clips": (Clip(noisy_clip(3, 64, 64)), Clip(noisy_clip(1, 64, 64), at=2))}, "both give frame 2"),
        ({"clips": (Clip(noisy_clip(1, 64, 64), at=4), Clip(noisy_clip(1, 64, 64), at=4))}, "both give frame 4"),
        ({"clips": (Clip(noisy_clip(1, 64, 64)),), "periodic": True}, "1 frame; a loop takes at least 2"),
        ({"periodic": True, "num_frames": 17}, "take 16 or 20"),
        ({"clips": (Clip(noisy_clip(5, 64, 64)),), "direction": "backward", "num_frames": 100, "window": 17},
         "more than one window of 17"),
    ],
)  # fmt: skip
def test_refused_tasks(demo: runtime.Model, asked: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        runtime.generate(demo, Request(prompt="a", steps=1, **asked))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"direction": "forward"}, "0 clips are given; the task 'extend' takes 1"),
        ({"direction": "between", "clips": (Clip("a.mp4"),)}, "takes 2"),
        ({"direction": "sideways"}, "legal: backward, between, forward"),
        ({"strength": 0.5}, "the task 'edit' takes 1"),
        ({"strength": 1.5, "clips": (Clip("a.mp4"),)}, "up to 1"),
        ({"strength": 0}, "more than 0"),
        ({"strength": 0.5, "periodic": True}, "three tasks"),
        ({"fit": "tile"}, "legal: crop, pad, stretch"),
        ({"clips": ("a.mp4",)}, "legal: runtime.Clip"),
    ],
)
def test_refused_requests(asked: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Request(prompt="a", **asked)


@settings(deadline=None, max_examples=200)
@given(
    first=st.integers(1, 60), second=st.integers(1, 60), new=st.integers(1, 50),
    direction=st.sampled_from(["forward", "backward", "between"]), overlap=st.integers(0, 4),
)  # fmt: skip
def test_plans_add_up(demo: runtime.Model, first: int, second: int, new: int, direction: str, overlap: int) -> None:
    """Every part lies inside its source, known and new frames are disjoint, and the length is clips plus new."""
    clips = (first, second)[: 2 if direction == "between" else 1]
    request = Request(
        prompt="a", direction=direction, num_frames=new, overlap=1 + 4 * overlap, steps=1,
        clips=tuple(Clip(np.zeros((n, 64, 64, 3), np.uint8)) for n in clips),
    ).resolved(demo.spec)  # fmt: skip
    plan = plan_task(request, demo.spec, clips)
    assert plan.num_frames == sum(clips) + new
    for part in plan.parts:
        if part.source == "clip":
            assert (part.start, part.stop) == (0, clips[part.index])
            continue
        window = plan.windows[part.index]
        assert window.num_frames == 4 * window.shape[1] - 3
        assert 0 <= part.start < part.stop <= window.num_frames
        places = {g.at + i for g in window.given for i in range(g.count)} | set(range(window.tail))
        assert max(places) < window.num_frames
        assert places.isdisjoint(range(part.start, part.stop))
        assert part.start - 1 in places or part.stop in places
        holds = latent_holds(window, 4)
        short = not window.tail and max(g.count for g in window.given) < 4  # no latent frame is known as a whole
        assert any(hold == 1 for hold in holds) or (short and any(hold > 0 for hold in holds))


def test_a_clip_keeps_its_size_and_rate_and_resolving_twice_changes_nothing(demo: runtime.Model) -> None:
    video = runtime.Video(noisy_clip(9, 96, 64), fps=12, num_frames=9, height=96, width=64)
    request = Request(prompt="a", direction="forward", clips=(Clip(video),), seed=1).resolved(demo.spec)
    assert (request.width, request.height, request.fps) == (64, 96, 12)
    assert request.resolved(demo.spec) == request


def test_a_draft_costs_a_fifth_and_its_final_looks_like_it(demo: runtime.Model) -> None:
    request = Request(prompt=PROMPT, seed=7).resolved(demo.spec)
    draft = request.drafted(demo.spec)
    assert (draft.width, draft.height, draft.steps) == (80, 48, 8)
    small = replace(request, width=64, height=64).drafted(demo.spec)
    assert (small.width, small.height, small.steps) == (64, 64, 5)
    rough = runtime.generate(demo, draft).frames
    final = final_request(demo, draft, 128, 96, steps=6)
    assert (final.seed, final.num_frames, final.task) == (7, 17, "edit")
    frames = runtime.generate(demo, final).frames
    wide = np.stack([fit_frame(frame, 128, 96, "crop") for frame in rough])
    low = [clip.reshape(17, 12, 8, 16, 8, 3).mean((2, 4), dtype=float) for clip in (wide, frames)]
    assert 10 * np.log10(255**2 / np.mean((low[0] - low[1]) ** 2)) >= 24


@pytest.mark.parametrize("name", ["demo", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"])
def test_a_draft_costs_a_fifth_of_all_arithmetic(name: str) -> None:
    """Text, denoising and decoding together, and the encoding of a picture that it is given."""
    spec, _ = find_model(name)
    own = Request(prompt="a", seed=0).resolved(spec)
    costs = []
    for request in (own, own.drafted(spec)):
        asked = {"width": request.width, "height": request.height, "steps": request.steps}
        flops = plan_request(name, gpu="h200", num_frames=own.num_frames, memory="999GiB", **asked).flops
        costs.append((flops["total"], flops["total"] + flops["encode"]))
    assert all(draft <= final / 5 for final, draft in zip(*costs, strict=True))


def test_pictures_of_a_draft_stand_in_its_final(demo: runtime.Model) -> None:
    first, last = noisy_clip(2, 96, 160)
    clips = Clip(first), Clip(last, at="end")
    draft = Request(prompt=PROMPT, seed=7, num_frames=9, steps=4, clips=clips).resolved(demo.spec).drafted(demo.spec)
    assert (draft.width, draft.height, draft.steps) == (80, 48, 1)
    final = final_request(demo, draft, 160, 96, steps=2)
    assert (final.task, final.num_frames, len(final.clips)) == ("edit", 9, 3)
    frames = runtime.generate(demo, final).frames
    assert np.array_equal(frames[[0, 8]], [first, last])
    with pytest.raises(ValueError, match="the task 'extend'; legal: a draft of a prompt"):
        final_request(demo, replace(final, strength=None, clips=clips[:1], direction="forward"), 160, 96)


def test_pipelines_of_pictures_are_read(tmp_path: Path) -> None:
    assert pipeline(PLAIN).config.expand_timesteps is False
    write(PLAIN, tmp_path / "plain")
    assert runtime.load(tmp_path / "plain").spec.conditioning == "blend"


@pytest.mark.slow
def test_a_minute(demo: runtime.Model) -> None:
    """960 frames at 16 per second in constant memory; the ground keeps its colour, and no window begins with a jump."""
    request = Request(prompt=PROMPT, seconds=60, fps=16, seed=7, width=96, height=64, steps=12)
    video = runtime.generate(demo, request)
    frames = np.stack(list(video))
    assert len(frames) == 960
    grounds = np.array([np.median(part[:, [0, 1, -2, -1]].reshape(-1, 3), axis=0) for part in np.split(frames, 60)])
    assert np.ptp(grounds, axis=0).max() <= DRIFT
    seams = range(17, 960, 12)
    assert pixels.seam_ratio(pixels.steps(frames), seams) <= 1.5
    colours = [pixels.seam_ratio(pixels.colour_steps(frames), [place], least=0.5) for place in seams]
    assert np.mean(np.array(colours) <= 1.5) >= 0.95
    peaks = video.receipt.stages["denoise"].peak_bytes, video.receipt.stages["decode"].peak_bytes
    short = runtime.generate(demo, replace(request, seconds=3)).receipt.stages["denoise"].peak_bytes
    assert max(peaks) <= short + (64 << 20)


def test_positions_are_spread_only_beyond_the_models_own_size() -> None:
    own = rotary_table(64, (5, 4, 4), 1024)
    for kind in ("ntk", "riflex"):
        stretch = Stretch(kind, (5, 4, 4))
        assert torch.equal(rotary_table(64, (5, 4, 4), 1024, stretch=stretch), own)
        wide, plain = (rotary_table(64, (10, 4, 8), 1024, stretch=s).view(10, 4, 8, 32, 2) for s in (stretch, None))
        angle, was = (torch.atan2(t[..., 1], t[..., 0]) for t in (wide, plain))
        time, width = slice(0, 12), slice(22, 32)
        changed = (angle[1, 0, 0, time] - was[1, 0, 0, time]).abs() > 1e-6
        assert changed.sum() == (1 if kind == "riflex" else 11)  # the highest frequency of all stays with ntk
        assert bool((angle[0, 0, 1, width] != was[0, 0, 1, width]).any()) == (kind == "ntk")
    # the longest wave of ntk turns at the last position as far as it did at the last one trained
    far = _axis_table(22, 10, 1e4, "ntk", 5)[9, -1], _axis_table(22, 5, 1e4)[4, -1]
    ratio = torch.atan2(far[0][1], far[0][0]) / torch.atan2(far[1][1], far[1][0])
    assert float(ratio) == pytest.approx(9 / 4 / 2, rel=1e-3)


def test_spread_positions_stand_in_the_receipt(demo: runtime.Model) -> None:
    asked = {"prompt": PROMPT, "steps": 1, "seed": 1, "width": 320, "height": 96, "num_frames": 1}
    plain, ntk = (runtime.generate(demo, Request(**asked, positions=kind)) for kind in (None, "ntk"))
    assert ntk.receipt.approximations == ["positions spread by ntk"]
    assert not torch.equal(plain.latents, ntk.latents)
    with pytest.raises(ValueError, match="legal: ntk, riflex"):
        Request(prompt="a", positions="yarn")
