"""Previews: near to the decoded frames, made from each step's estimate, kept in the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import runtime
from runtime import previews
from runtime.__main__ import main
from runtime.engines.store import cache_root
from runtime.reading import read_video


@pytest.fixture(scope="module")
def model() -> runtime.Model:
    return runtime.load("demo")


def psnr(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (given - expected).square().mean()))


def small(frames: np.ndarray, cells: tuple[int, int, int]) -> torch.Tensor:
    """The mean colour of each cell, [3, *cells] in [-1, 1], of frames uint8 [F, H, W, 3]."""
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1)
    first = F.adaptive_avg_pool3d(clip[:, :1], (1, *cells[1:]))
    return torch.cat([first, F.adaptive_avg_pool3d(clip[:, 1:], (cells[0] - 1, *cells[1:]))], dim=1)


def test_a_preview_is_near_to_the_decoded_frames(model: runtime.Model) -> None:
    request = runtime.Request(prompt="a red ball rolls left over green grass", seed=7, width=64, height=64)
    estimates: list[torch.Tensor] = []
    video = runtime.generate(model, request, on_step=lambda step, total, x, estimate: estimates.append(estimate))
    looked = runtime.preview(model, video.latents, fps=video.fps)
    assert (looked.num_frames, looked.height, looked.width, looked.fps) == (5, 32, 32, video.fps / 4)
    expected, given = small(video.frames, (5, 8, 8)), small(looked.frames, (5, 8, 8))
    flat = expected.mean(dim=(1, 2, 3), keepdim=True).expand_as(expected)
    assert psnr(given, expected) > 20 > psnr(flat, expected)
    # A step's estimate shows more of the video than its noise does, and the last one shows nearly the video.
    assert len(estimates) == 25
    middle = small(runtime.preview(model, estimates[12]).frames, (5, 8, 8))
    assert psnr(middle, given) > psnr(small(runtime.preview(model, estimates[0]).frames, (5, 8, 8)), given)
    assert (estimates[-1][0].cpu() - video.latents).abs().max() < 0.2


def test_a_preview_shows_the_frame_and_not_its_canvas(model: runtime.Model) -> None:
    """72 x 52 pixels are made at 80 x 64: 8 of an edge are 4 in the preview."""
    request = runtime.Request(prompt="a red ball", width=72, height=52, num_frames=5, steps=2, seed=7)
    video = runtime.generate(model, request)
    assert video.latents is not None
    whole = runtime.preview(model, video.latents)
    shown = runtime.preview(model, video.latents, height=52, width=72)
    assert (whole.height, whole.width, shown.height, shown.width) == (32, 40, 26, 36)
    assert np.array_equal(shown.frames, whole.frames[:, 3:29, 2:38])
    with pytest.raises(ValueError, match="up to the canvas"):
        runtime.preview(model, video.latents, height=68)


def test_the_built_in_model_has_its_fit_beside_its_weights(model: runtime.Model) -> None:
    assert (previews.projection(model) - previews.fit_projection(model)).abs().max() < 1e-3
    assert not (cache_root() / "previews").exists()


def test_a_fit_is_stored_beside_the_weights(model: runtime.Model, tmp_path: Path) -> None:
    written = replace(model, checkpoint=replace(model.checkpoint, folder=tmp_path))
    assert previews.store_projection(written) == tmp_path / "preview.safetensors"
    (tmp_path / "other").touch()
    assert (tmp_path / "preview.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert torch.equal(previews.projection(written), previews.fit_projection(model))
    assert not (cache_root() / "previews").exists()


def test_the_fit_is_kept(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "BESIDE", "missing.safetensors")
    fitted = previews.projection(model)
    assert fitted.shape == (33, 3)
    (file,) = (cache_root() / "previews").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(previews, "fit_projection", lambda model: pytest.fail("fitted again"))
        assert torch.equal(previews.projection(model), fitted)
    file.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="is damaged .* fitted again"):
        assert torch.equal(previews.projection(model), fitted)
    assert torch.equal(previews.projection(model), fitted)


def test_a_cache_that_cannot_be_written_costs_only_time(
    model: runtime.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "BESIDE", "missing.safetensors")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="going on without"):
        assert previews.projection(model).shape == (33, 3)


def test_latents_that_cannot_be_shown(model: runtime.Model) -> None:
    with pytest.raises(ValueError, match=r"latents has shape \[4, 2, 8, 8\]; legal: \[32, any, any, any\]"):
        runtime.preview(model, torch.zeros(4, 2, 8, 8))
    latents = torch.zeros(32, 3, 8, 8)
    latents[0, 2, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in latent frame 2"):
        runtime.preview(model, latents)


def test_the_command_line_shows_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, written = tmp_path / "look.gif", []
    save = runtime.Video.save

    def watch(video: runtime.Video, path: Path, **options: object) -> Path:
        written.append(str(path))
        return save(video, path, **options)

    monkeypatch.setattr(runtime.Video, "save", watch)
    command = ["generate", "a red ball", "--size", "64x64", "--frames", "5", "--steps", "3", "--seed", "7", "--quiet"]
    assert main([*command, "-o", str(tmp_path / "ball.mp4"), "--preview", str(file)]) == 0
    assert written == [str(file)] * 3 + [str(tmp_path / "ball.mp4")]
    shown = read_video(file)
    assert (len(shown.frames), shown.height, shown.width) == (2, 32, 32)
    odd = ["--size", "70x50", "-o", str(tmp_path / "odd.mp4"), "--preview", str(tmp_path / "odd-look.mp4")]
    assert main([*command, *odd]) == 0
    assert main([*command, "-o", str(tmp_path / "x.mp4"), "--preview", str(tmp_path / "look.png")]) == 2
    assert "holds one picture, 2 frames given" in capsys.readouterr().err
    assert not (tmp_path / "x.mp4").exists()
