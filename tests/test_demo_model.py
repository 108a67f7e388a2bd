"""The demo model's tools: world, captions and scorer agree; what is trained is the published modules."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import avg_pool2d
from transformers import AutoTokenizer

from runtime.expansion import by_rules
from tools.demo_model import autoencoder, captions, denoiser, evaluate, pool, score, shapes, text
from tools.demo_model.diffusion import draw_known, word_truth
from tools.demo_model.evaluate import to_bytes
from tools.demo_model.recipe import RECIPES, make
from tools.demo_model.training import Run
from tools.demo_model.world import MOTIONS, SHAPES, Scene, Thing, draw_scene, render, silhouette

BALL = Scene((Thing("ball", "red", "medium", "matte"),), "left", "grass", "day", "clear", "still")


def test_a_scene_is_the_same_at_every_drawing_and_its_annotations_are_where_the_pixels_are() -> None:
    first, again = (render(BALL, 9, 64, 96) for _ in range(2))
    assert torch.equal(first.frames, again.frames)
    assert first.frames.shape == (9, 3, 64, 96) and float(first.frames.min()) >= 0 and float(first.frames.max()) <= 1
    for frame in range(9):
        x, y, radius = first.tracks[0, frame].tolist()
        inside = first.frames[frame, :, int(y), int(x)]
        assert inside[0] > 2 * inside[1], "the middle of a red ball is red"
        assert float(first.masks[0, frame].sum()) == pytest.approx(math.pi * radius**2, rel=0.08)
    assert first.tracks[0, 0, 0] > first.tracks[0, -1, 0] + 40


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (160, 96)])
def test_renders_are_read_right(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    judged = []
    for _ in range(14):
        scene = captions.held_out_scene(rng)
        judged.append(score.judge(scene, score.read(to_bytes(render(scene, 17, *size).frames))))
    for what, (right, of) in score.table(judged).items():
        assert right >= of - 2, f"{what}: {right} of {of}"


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_is_read_and_its_opposite_is_not(motion: str) -> None:
    shape = "star" if motion == "spin" else "ball"
    scene = replace(BALL, things=(Thing(shape, "red", "medium", "matte"),), motion=motion)
    assert score.read(to_bytes(render(scene, 17, 64, 96).frames)).motion == motion


def _disc(x: float, y: float, radius: float) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_read_at_every_turn_and_size_sharp_or_blurred_and_is_no_other(shape: str) -> None:
    rng = np.random.default_rng(3)
    rows, columns = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    for blur in (0, 5, 9) * 6:
        radius, turn, x, y = torch.from_numpy(rng.uniform((14, 0, 60, 46), (26, 6.3, 100, 50))).float()
        cover = silhouette(shape, columns - x, rows - y, radius, turn)[0]
        if blur:
            cover = avg_pool2d(cover[None], blur, stride=1, padding=blur // 2)[0]
        found = shapes.shape_of(cover)
        assert found is not None and found[0] == shape, (blur, radius, turn)


def test_what_is_like_no_shape_is_read_as_none_and_a_blot_is_a_ball() -> None:
    away = torch.arange(96)[:, None].sub(48).square() + torch.arange(160).sub(80).square()
    found = shapes.shape_of(torch.exp(-away / 400))
    assert found is not None and found[0] == "ball"
    bar = torch.zeros(96, 160)
    bar[42:54, 50:110] = 1
    assert shapes.shape_of(bar) is None
    bar[:, 100:110] = 1
    assert shapes.shape_of(bar) is None, "the frame cuts it"


def test_things_that_touch_are_parted_and_one_thing_is_not() -> None:
    pair = _disc(70, 30, 16) | _disc(72, 60, 16)
    found = shapes.parted(pair, 100)
    assert len(found) == 2 and not (found[0] & found[1]).any() and torch.equal(found[0] | found[1], pair)
    assert len(shapes.parted(pair | _disc(120, 40, 9), 100)) == 3
    assert shapes.parted(_disc(70, 30, 3), 100) == []
    columns, rows = torch.arange(160)[None] - 80.0, torch.arange(96)[:, None] - 48.0
    for shape in SHAPES:
        mask = silhouette(shape, columns, rows, torch.tensor(24.0), torch.tensor(0.3))[0] > 0.5
        (whole,) = shapes.parted(mask, 100)
        assert torch.equal(whole, mask)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_video_of_another_shape_is_judged_wrong(shape: str) -> None:
    reading = score.read(
        to_bytes(render(replace(BALL, things=(replace(BALL.things[0], shape=shape),)), 5, 96, 160).frames)
    )
    for asked in SHAPES:
        scene = replace(BALL, things=(replace(BALL.things[0], shape=asked),))
        assert score.judge(scene, reading)["shape"] == (asked == shape)


def test_an_empty_scene_has_no_thing() -> None:
    reading = score.read(to_bytes(render(replace(BALL, things=()), 5, 64, 96).frames))
    assert (reading.count, reading.ground, reading.shapes) == (0, "grass", ())


def test_held_out_scenes_are_never_trained_on() -> None:
    rng = np.random.default_rng(0)
    assert not any(captions.held_out(captions.training_scene(rng, hard)) for hard in (False, True) for _ in range(200))
    share = np.mean([captions.held_out(draw_scene(rng)) for _ in range(2000)])
    assert 0.05 < share < 0.15


def test_hard_scenes_show_several_things_that_differ() -> None:
    rng = np.random.default_rng(0)

    def differing(hard: bool) -> float:
        return float(np.mean([len({t.colour for t in draw_scene(rng, hard).things}) > 1 for _ in range(400)]))

    assert differing(True) > 0.4 > 0.2 > differing(False)


def test_captions_hold_only_known_words_and_every_style_names_the_thing() -> None:
    rng = np.random.default_rng(1)
    words = set(captions.vocabulary())
    for _ in range(200):
        scene = draw_scene(rng)
        for style in captions.STYLES:
            found = captions.caption(scene, style, rng)
            assert set(found.replace(",", " ").split()) <= words, found
    assert captions.caption(BALL, "terse") == "a red ball rolls left over green grass"


def test_every_word_of_a_thing_is_told_from_the_others(tmp_path: Path) -> None:
    pair = replace(BALL, things=(BALL.things[0], Thing("cube", "blue", "small", "shiny", (0.2, 0.0))))
    told = captions.owners("a red ball and a shiny blue cube roll left over green grass", pair)
    assert [t[0].shape if t else "" for t in told] == ["ball"] * 3 + [""] + ["cube"] * 4 + [""] * 5
    two = replace(BALL, things=BALL.things * 2)
    assert [len(t) for t in captions.owners("two red balls roll left", two)] == [2, 2, 2, 0, 0]
    text.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    colours = {word: colour for colour, words in captions.COLOUR_WORDS.items() for word in words}
    rng = np.random.default_rng(4)
    for _ in range(100):
        scene = draw_scene(rng, hard=True)
        found = captions.training_caption(scene, rng)
        told = captions.owners(found, scene)
        assert len(told) + 1 == len(tokenizer(found)["input_ids"]), "a token each, and the end"
        seen = [t for t in told if t]
        assert {thing for things in seen for thing in things} == set(scene.things)
        for word, things in zip(found.replace(",", " ,").split(), told, strict=True):
            assert not things or word not in colours or things[0].colour == colours[word], found
        truth, tells = word_truth(["", found], [scene, scene], len(told) + 1)
        assert tells.sum(1).tolist() == [0, len(seen)]
        assert (truth[..., :-2].sum(2) == 2 * tells).all()


def test_rules_expand_terse_captions_into_descriptive_ones() -> None:
    rules = captions.expansion_rules()
    rng = np.random.default_rng(2)
    for _ in range(60):
        scene = replace(draw_scene(rng), time="day", weather="clear", camera="still", post=False)
        things = tuple(replace(t, size="medium", material="matte") for t in scene.things)
        scene = replace(scene, things=things)
        prompt = captions.caption(scene, "terse")
        prompt = by_rules(prompt, rules)
        assert prompt == captions.caption(scene, "descriptive")


def test_the_tokenizer_reads_words_whole_and_spells_what_it_does_not_know(tmp_path: Path) -> None:
    text.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("A Red ball, please") == ["▁A", "▁Red", "▁ball", ",", "▁", "p", "l", "e", "a", "s", "e"]
    assert tokenizer.unk_token_id not in tokenizer(captions.caption(BALL, "descriptive"))["input_ids"]


def test_whole_clips_are_encoded_and_decoded_as_the_published_module_does_it() -> None:
    torch.manual_seed(0)
    vae = autoencoder.build()
    for p in vae.parameters():
        p.data += 0.02 * torch.randn_like(p)
    pixels = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        mean, logvar = autoencoder.encode(vae, pixels)
        published = vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, published.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logvar, published.logvar, rtol=1e-4, atol=1e-5)
        ours, theirs = autoencoder.decode(vae, mean), vae.decode(mean).sample
        torch.testing.assert_close(ours.clamp(-1, 1), theirs, rtol=1e-4, atol=1e-5)


def test_the_training_forward_is_the_published_one_with_512_text_tokens() -> None:
    torch.manual_seed(0)
    dit = denoiser.build(width=128, layers=2, ffn=256, text=64, channels=8)
    for p in dit.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, sigma, words = torch.randn(2, 8, 3, 8, 12), torch.rand(2, 3), torch.randn(2, 7, 64)
    steps = (sigma * 1000)[:, :, None].expand(2, 3, 24).flatten(1)
    padded = torch.cat([words, torch.zeros(2, 505, 64)], 1)
    bias = torch.zeros(2, 1, 1, 8)
    bias[..., 7] = math.log(505)
    with torch.no_grad():
        theirs = dit(x, steps, padded, return_dict=False)[0]
        ours, _ = denoiser.forward(
            dit, x, sigma, torch.cat([words, torch.zeros(2, 1, 64)], 1), bias, denoiser.Rotary(64)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_square_crops_are_the_middle_of_wide_and_tall_clips() -> None:
    bucket = pool.Bucket(1.0, 5, 48, 48, crop=True)
    wide = render(BALL, 5, 48, 80).frames[..., 16:64]
    assert torch.equal(pool.draw(BALL, bucket, 1, "cpu")[0], wide)
    assert pool.draw(BALL, bucket, 0, "cpu")[1].shape == (1, 5, 48, 48)


def test_known_frames_never_are_all_of_them() -> None:
    known = draw_known(400, 5, np.random.default_rng(0))
    assert not known.all(1).any() and 0.2 < known.any(1).float().mean() < 0.5
    assert not draw_known(10, 1, np.random.default_rng(0)).any()


def test_cover_tells_a_tokens_cells_row_by_row_at_its_last_frame() -> None:
    masks = torch.zeros(1, 5, 32, 48)
    masks[0, 4, 16:20, 4:10] = 1  # the second row of tokens, its first row of cells: the second cell, half the third
    cover = pool.token_cover(masks)
    assert cover.shape == (2, 2, 3, 16)
    assert cover[1, 1, 0].tolist() == [0, 1, 0.5] + [0] * 13
    assert cover.sum() == 1.5
    kinds = pool.token_kinds(masks, (Thing("star", "blue", "small", "matte"),))
    shown = kinds[1, 1, 0]
    assert shown[pool.KINDS.index("star")] == shown[pool.KINDS.index("blue")] == 4 * 24 / 256
    assert kinds.sum() == 2 * 4 * 24 / 256


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def some(folder: Path, until: int) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        run = Run(folder, layer, [torch.optim.AdamW(layer.parameters(), lr=0.1)], 6, warm=2)
        while run.step < until:
            run.update(layer(torch.randn(3, 4)).square().mean())
        run.save()
        return run.averaged()["weight"]

    whole = some(tmp_path / "whole", 6)
    some(tmp_path / "parts", 3)
    assert torch.equal(some(tmp_path / "parts", 6), whole)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A training of smoke size from nothing, and what it said."""
    said: list[str] = []
    return make(tmp_path_factory.mktemp("whole"), RECIPES["smoke"], say=said.append), said


def test_one_command_makes_a_checkpoint_that_diffusers_and_this_runtime_load(made: tuple[Path, list[str]]) -> None:
    from diffusers import WanPipeline

    import runtime

    folder, said = made
    assert any(line.startswith("probe") for line in said)
    pipeline = WanPipeline.from_pretrained(folder)
    assert pipeline.config.expand_timesteps
    for part in ("transformer", "vae"):
        weights = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    model = runtime.load(str(folder))
    request = runtime.Request(prompt="a red ball", width=64, height=64, num_frames=5, steps=2, seed=0)
    assert runtime.generate(model, request).frames.shape == (5, 64, 64, 3)


def test_one_command_stopped_and_given_again_ends_with_the_same_checkpoint(
    made: tuple[Path, list[str]], tmp_path: Path
) -> None:
    def stop(line: str) -> None:
        if line.startswith("probe after 12"):  # in the second stage
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, RECIPES["smoke"], say=stop)
    said: list[str] = []
    folder = make(tmp_path, RECIPES["smoke"], say=said.append)
    assert not any(line.startswith(("vae-clips", "probe after 8")) for line in said), "what was done is done again"
    for file in (f.relative_to(folder) for f in folder.rglob("*.safetensors")):
        assert (folder / file).read_bytes() == (made[0] / file).read_bytes(), file


def test_a_ladder_is_a_table_and_a_sheet_of_checkpoints(tmp_path: Path) -> None:
    found = evaluate.ladder(["demo"], 1, tmp_path)
    assert found["demo"]["background"] == (1, 1)
    assert json.loads((tmp_path / "ladder.json").read_text()) == {
        "demo": {k: list(v) for k, v in found["demo"].items()}
    }
    with Image.open(tmp_path / "ladder.png") as sheet:
        assert sheet.size == (2 * 160, 96)


def test_rows_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="recontructions.*choose from renders"):
        evaluate.evaluate("demo", 1, rows=["recontructions"])


def test_given_frames_are_gone_on_with() -> None:
    judged = evaluate.evaluate("demo", 1, steps=4, rows=["animation", "extension"])
    assert judged["animation"]["count"][1] == judged["extension"]["colour"][1] == 1
