"""The verbs of the command line: what they ask for, and what they write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.__main__ import main, parser
from runtime.cli.arguments import parse_ranges
from runtime.cli.verbs import keyframe
from runtime.clips import runs
from runtime.reading import read_video
from runtime.request import Request
from runtime.video import Video

QUICK = ["--steps", "1", "--guidance", "1", "--seed", "7", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip as mp4 and as pictures, and one picture alone."""
    place = tmp_path_factory.mktemp("clips")
    frames = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    video = Video(frames, fps=8, num_frames=9, height=64, width=64)
    video.save(place / "clip.mp4")
    video.save(place / "pictures/")
    Image.fromarray(frames[0]).save(place / "a.png")
    return place


def asked(*arguments: object) -> Request:
    options = parser().parse_args([str(a) for a in arguments])
    return options.verb.request(options)


def test_requests(folder: Path) -> None:
    clip, picture = folder / "clip.mp4", folder / "a.png"
    assert asked("generate", "a ball").task == "text"
    request = asked("generate", "a ball", "--image", picture, "--image", f"8:{picture}", "--image", f"end:{picture}")
    assert [c.at for c in request.clips] == [0, 8, "end"]
    assert asked("extend", clip, "a ball", "--seconds", 2).direction == "forward"
    assert asked("extend", clip, "a ball", "--backward").direction == "backward"
    assert asked("connect", clip, clip, "a ball").task == "connect"
    assert asked("loop", "a ball").clips == ()
    assert len(asked("loop", clip).clips) == 1
    assert asked("edit", clip, "winter", "--strength", 0.3).strength == 0.3
    masked = asked("edit", clip, "winter", "--mask", picture, "--reference", picture, "--reference", picture)
    assert (masked.task, masked.clips[0].masked.shape, len(masked.references)) == ("place", (64, 64), 2)
    assert asked("edit", clip, "winter").strength == 0.6
    with pytest.raises(ValueError, match="two ways to edit"):
        asked("edit", clip, "winter", "--mask", picture, "--strength", 0.5)
    assert asked("image", "a ball", "--size", "96x64").num_frames == 1
    filled = asked("fill", clip, "a ball", "--missing", "2-4,6")
    assert ([c.at for c in filled.clips], filled.num_frames) == ([0, 5, 7], 9)


def test_a_folder_with_gaps(folder: Path, tmp_path: Path) -> None:
    for number in (0, 1, 2, 5, 6, 8):
        (tmp_path / f"{number + 10:05d}.png").symlink_to(folder / f"pictures/{number:05d}.png")
    clips, total = runs(tmp_path, {1})
    assert [(c.at, c.video.num_frames) for c in clips] == [(0, 1), (2, 1), (5, 2), (8, 1)]
    assert total == 9
    assert np.array_equal(clips[2].video.frames, read_video(folder / "pictures").frames[5:7])
    with pytest.raises(ValueError, match="lacks frame 13"):
        read_video(tmp_path)
    with pytest.raises(ValueError, match="no frame is missing"):
        runs(folder / "clip.mp4", set())
    with pytest.raises(ValueError, match="frame 9 is missing, but"):
        runs(folder / "clip.mp4", {9})


def test_ranges_and_keyframes(folder: Path) -> None:
    assert parse_ranges("12-14,33") == (12, 13, 14, 33)
    for text in ("", "3-1", "a", "1;2"):
        with pytest.raises(argparse.ArgumentTypeError, match="legal"):
            parse_ranges(text)
    assert keyframe(str(folder / "a.png")).at == 0
    with pytest.raises(FileNotFoundError):
        keyframe("40:nowhere.png")


@pytest.mark.parametrize(
    ("arguments", "frames", "kept"),
    [
        (["generate", "a ball", "--image", "{}/a.png", "--frames", "5"], 5, {}),
        (["extend", "{}/clip.mp4", "a ball", "--frames", "4"], 13, {0: 0, 8: 8}),
        (["connect", "{}/clip.mp4", "{}/clip.mp4", "a ball", "--frames", "3"], 21, {0: 0, 12: 0}),
        (["loop", "{}/clip.mp4", "a ball"], 16, {8: 8}),
        (["edit", "{}/clip.mp4", "winter"], 9, {}),
        (["fill", "{}/clip.mp4", "a ball", "--missing", "5-7"], 9, {0: 0, 8: 8}),
    ],
)
def test_verbs_write_videos(
    folder: Path, tmp_path: Path, arguments: list[str], frames: int, kept: dict[int, int]
) -> None:
    """Given frames are the clip's own, byte for byte, where the output is lossless."""
    given = read_video(folder / "clip.mp4").frames
    target = tmp_path / "out"
    assert main([*(a.format(folder) for a in arguments), "-o", str(target), *QUICK]) == 0
    out = read_video(target).frames
    assert out.shape == (frames, 64, 64, 3)
    for place, index in kept.items():
        assert np.array_equal(out[place], given[index])


def test_what_is_kept_survives_the_encoder(tmp_path: Path) -> None:
    """At least 45 dB in luma around the seam; colour is written at half the resolution (4:2:0), so less there."""
    first, target = tmp_path / "first.mp4", tmp_path / "out.mp4"
    assert main(["generate", "a red ball over green grass", "--steps", "8", "-o", str(first), "--quiet"]) == 0
    assert main(["extend", str(first), "a ball", "--frames", "4", "-o", str(target), *QUICK]) == 0
    kept, given = read_video(target).frames[9:17].astype(float), read_video(first).frames[9:]
    luma = (kept - given) @ np.array([0.2126, 0.7152, 0.0722])
    assert 10 * np.log10(255**2 / np.mean(luma**2)) >= 45
    assert 10 * np.log10(255**2 / np.mean((kept - given) ** 2)) >= 38


@pytest.mark.slow
def test_a_picture_of_2048_pixels_each_way(tmp_path: Path) -> None:
    """Within 1.25 GiB, of which the weights and Python are a part: decoded tile by tile."""
    target, receipt = tmp_path / "a.png", tmp_path / "a.json"
    command = ["image", "a red ball over green grass", "--size", "2048x2048", "--memory", "1.25GiB", *QUICK]
    assert main([*command, "-o", str(target), "--receipt", str(receipt)]) == 0
    with Image.open(target) as picture:
        assert picture.size == (2048, 2048)
    record = json.loads(receipt.read_text())
    assert record["decoding"][0].startswith("tiles of ")
    assert max(stage["peak_bytes"] or 0 for stage in record["stages"].values()) <= 1.25 * 2**30


def test_draft_and_finish(tmp_path: Path) -> None:
    draft, receipt = str(tmp_path / "draft.mp4"), str(tmp_path / "draft.json")
    assert (
        main(["generate", "a red ball", "--draft", "--frames", "5", "-o", draft, "--receipt", receipt, "--quiet"]) == 0
    )
    assert json.loads(Path(receipt).read_text())["request"]["steps"] == 8
    final = str(tmp_path / "final.mp4")
    assert main(["finish", receipt, "--size", "96x64", "--steps", "3", "-o", final, "--quiet"]) == 0
    assert read_video(final).frames.shape == (5, 64, 96, 3)


def test_finish_refuses_a_draft_of_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = {"request": {"prompt": "a"}, "model": "wan2.1-t2v-1.3b", "model_hash": "sha256:0"}
    (tmp_path / "draft.json").write_text(json.dumps(draft))
    assert main(["finish", str(tmp_path / "draft.json"), "-o", str(tmp_path / "a.mp4")]) == 2
    assert "is of the model wan2.1-t2v-1.3b, and demo as it was loaded has other" in capsys.readouterr().err


def test_finish_refuses_what_is_no_receipt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(("", "[]", "{}", '{"request": {"prompt": "a", "colour": 1}}')):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        assert main(["finish", str(file), "-o", str(tmp_path / "a.mp4")]) == 2
    assert "asks for colour" in capsys.readouterr().err


def test_a_broken_clip_is_known_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    command = ["extend", str(tmp_path / "a.mp4"), "on", "--model", "/nowhere", "-o", str(tmp_path / "b.mp4")]
    assert main(command) == 2
    assert "a.mp4 is no mp4" in capsys.readouterr().err
