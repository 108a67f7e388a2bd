"""Trains the video autoencoder of the demo model: diffusers' AutoencoderKLWan in the Wan 2.2 arrangement, small.

The published module decodes one latent frame after the other through a cache. Training runs whole clips at once through
the same weights (`encode`, `decode`): causal convolutions with zeros in front are what the cache computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn

from tools.demo_model.captions import training_scene
from tools.demo_model.training import Run
from tools.demo_model.world import render

CONFIG = {
    "base_dim": 32,
    "z_dim": 32,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}


def build() -> AutoencoderKLWan:
    """Return a new autoencoder whose temporal taps start at the current frame and whose branches start small."""
    vae = AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * CONFIG["z_dim"], latents_std=[1.0] * CONFIG["z_dim"])
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            weight = module.weight
            nn.init.zeros_(module.bias)
            if isinstance(module, nn.Conv3d) and weight.shape[2] == 3:
                nn.init.zeros_(weight)
                nn.init.kaiming_normal_(weight[:, :, -1], nonlinearity="relu")
            else:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
            if name.endswith(("conv2", "proj", "resample.1")):
                weight.data *= 0.2
            if name.endswith("time_conv"):
                nn.init.zeros_(weight)
                eye = torch.eye(weight.shape[1])
                weight.data[:, :, -1, 0, 0] = eye.repeat(weight.shape[0] // weight.shape[1], 1)
    z = CONFIG["z_dim"]
    vae.quant_conv.weight.data.zero_()
    vae.quant_conv.weight.data[:z, :z, 0, 0, 0] = torch.eye(z)
    vae.quant_conv.bias.data[z:] = -3.0
    vae.post_quant_conv.weight.data[:, :, 0, 0, 0] = torch.eye(z)
    return vae


def _norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what WanRMS_norm computes, sums in float32."""
    scale = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
    gamma = module.gamma.reshape(1, -1, *[1] * (x.ndim - 2))
    return x * (module.scale / scale).to(x.dtype) * gamma.to(x.dtype)


def _residual(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = block.conv1(F.silu(_norm(block.norm1, x)))
    h = block.conv2(F.silu(_norm(block.norm2, h)))
    return h + block.conv_shortcut(x)


def _frames(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer for pictures to each frame of [B, C, T, H, W]."""
    batch, _, count = x.shape[:3]
    out = layer(x.permute(0, 2, 1, 3, 4).flatten(0, 1))
    return out.unflatten(0, (batch, count)).permute(0, 2, 1, 3, 4)


def _resample(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if block.mode == "upsample3d":
        pairs = block.time_conv(x[:, :, 1:]) if x.shape[2] > 1 else None
        if pairs is not None:
            first, second = pairs.chunk(2, 1)
            x = torch.cat([x[:, :, :1], torch.stack([first, second], 3).flatten(2, 3)], 2)
    if block.mode.startswith("upsample"):
        x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        return _frames(block.resample[1], x)
    x = _frames(block.resample, x)
    if block.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], block.time_conv(x)], 2)
    return x


def _middle(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = _residual(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(resnet, attention(x))
    return x


def encode(vae: AutoencoderKLWan, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log-variance [B, C, T, H, W] of whole clips [B, 3, 1 + 4 * n, H, W] in [-1, 1]."""
    x = vae.encoder.conv_in(F.pixel_unshuffle(pixels.transpose(1, 2), 2).transpose(1, 2)[:, _patch_order()])
    for block in vae.encoder.down_blocks:
        h = x
        for resnet in block.resnets:
            h = _residual(resnet, h)
        if block.downsampler is not None:
            h = _resample(block.downsampler, h)
        x = h + block.avg_shortcut(x)
    x = _middle(vae.encoder.mid_block, x)
    x = vae.encoder.conv_out(F.silu(_norm(vae.encoder.norm_out, x)))
    return tuple(vae.quant_conv(x).float().chunk(2, 1))


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Return pixels [B, 3, 1 + 4 * n, H, W], not clamped, of latents [B, C, 1 + n, H, W] as `encode` gives them."""
    x = vae.decoder.conv_in(vae.post_quant_conv(latents))
    x = _middle(vae.decoder.mid_block, x)
    for block in vae.decoder.up_blocks:
        h = x
        for resnet in block.resnets:
            h = _residual(resnet, h)
        if block.upsampler is not None:
            h = _resample(block.upsampler, h) + block.avg_shortcut(x, first_chunk=True)
        x = h
    x = vae.decoder.conv_out(F.silu(_norm(vae.decoder.norm_out, x)))
    back = [_patch_order().index(i) for i in range(12)]
    return F.pixel_shuffle(x[:, back].transpose(1, 2), 2).transpose(1, 2)


def _patch_order() -> list[int]:
    """Return where each channel of the published 2x2 patches lies in pixel_unshuffle's: it counts (c, x, y)."""
    return [c * 4 + y * 2 + x for c in range(3) for x in range(2) for y in range(2)]


def batch(
    rng: np.random.Generator, size: int, count: int, height: int, width: int, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels [B, 3, F, H, W] in [-1, 1] of random scenes, and what share of each pixel a thing covers."""
    clips = [render(training_scene(rng), count, height, width, device) for _ in range(size)]
    pixels = torch.stack([c.frames for c in clips]).transpose(1, 2) * 2 - 1
    return pixels, torch.stack([c.masks.sum(0).clamp(0, 1) for c in clips])[:, None]


# Frame counts and sizes of a stage, with how many clips a step holds: (weight, clips, frames, height, width).
PICTURES = ((0.5, 8, 1, 64, 96), (0.5, 8, 1, 96, 64))
CLIPS = (
    (0.30, 3, 17, 64, 64),
    (0.25, 2, 17, 64, 96),
    (0.25, 2, 17, 96, 64),
    (0.08, 1, 17, 96, 160),
    (0.07, 12, 1, 96, 96),
    (0.05, 1, 33, 64, 96),
)
# No pictures: torch 2.13's bfloat16 convolution backward on CPUs writes where it must not for one frame of this size.
FINISH = ((0.6, 1, 17, 96, 160), (0.25, 2, 17, 64, 96), (0.15, 2, 17, 96, 64))


def loss_of(vae: AutoencoderKLWan, pixels: torch.Tensor, things: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of clips [B, 3, F, H, W]: distances of pixels and of their steps, things counted more, and KL."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        mean, logvar = encode(vae, pixels)
        logvar = logvar.clamp(-12, 4)
        out = decode(vae, mean + torch.randn_like(mean) * (0.5 * logvar).exp()).float()
    loss, psnr = distance(out - pixels, things)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return loss + 1e-3 * divergence, {"psnr": psnr, "kl": divergence.item()}


def distance(
    error: torch.Tensor, things: torch.Tensor, more: float = 2.0, more_edges: float = 0.0
) -> tuple[torch.Tensor, float]:
    """Return the loss of an error of pixels and of their steps [B, 3, F, H, W], and its PSNR in dB.

    Pixels count `more` times more where things [B, 1, F, H, W] are, steps `more_edges` times more there and beside.
    """
    weight = 1 + more * things
    pixel = (error.abs() * weight).mean() + 4 * (error.square() * weight).mean()
    near = 1 + more_edges * F.max_pool3d(things, (1, 5, 5), stride=1, padding=(0, 2, 2))
    across, down = error.diff(dim=-1).abs() * near[..., 1:], error.diff(dim=-2).abs() * near[..., 1:, :]
    psnr = 10 * math.log10(4 / error.detach().clamp(-2, 2).square().mean().item())
    return pixel + (across.mean() + down.mean()) * 0.5, psnr


def channels_last(module: nn.Module) -> None:
    """Lay convolution weights out as the fastest CPU and GPU kernels read them."""
    for p in module.parameters():
        if p.ndim == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        elif p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def _fit(
    run: Run, vae: AutoencoderKLWan, mix: tuple, seed: tuple[int, int], loss_of: Callable, scale: int, say: Callable
) -> None:
    """Take the steps that are left of a run over a mix of batches, `scale` times as large; then average the weights."""
    weights = np.array([row[0] for row in mix]) / sum(row[0] for row in mix)
    since, seen = time.monotonic(), []
    while run.step < run.steps:
        rng = np.random.default_rng((*seed, run.step))
        _, size, count, height, width = mix[rng.choice(len(mix), p=weights)]
        loss, facts = loss_of(vae, *batch(rng, size * scale, count, height, width, vae.device))
        run.update(loss)
        seen.append((loss.item(), facts["psnr"], facts["kl"]))
        if run.step % 50 == 0 or run.step == run.steps:
            mean, psnr, kl = (float(v) for v in np.mean(seen, 0))
            seconds = time.monotonic() - since
            run.log(loss=mean, psnr=psnr, kl=kl, seconds=seconds)
            where = f"{run.folder.name} {run.step}/{run.steps}"
            say(f"{where}: loss {mean:.4f}, {psnr:.1f} dB, kl {kl:.2f}, {seconds:.0f} s")
            seen = []
    run.save()
    vae.load_state_dict(run.averaged())


def train(
    folder: Path,
    pictures: int,
    clips: int,
    *,
    seed: int = 0,
    rate: float = 1e-3,
    batch_scale: int = 1,
    say: Callable = print,
) -> AutoencoderKLWan:
    """Train for so many steps on single pictures, then on clips; return the averaged autoencoder, float32."""
    torch.manual_seed(seed)
    vae = build().to("cuda" if torch.cuda.is_available() else "cpu")
    channels_last(vae)
    for stage, steps, mix, start in (("pictures", pictures, PICTURES, rate), ("clips", clips, CLIPS, 0.7 * rate)):
        optimizer = torch.optim.AdamW(vae.parameters(), lr=start, betas=(0.9, 0.99), weight_decay=1e-4)
        run = Run(folder / f"vae-{stage}", vae, [optimizer], steps, warm=min(100, steps // 10 + 1))
        _fit(run, vae, mix, (seed, len(stage)), loss_of, batch_scale, say)
    return vae


def finish(
    folder: Path,
    vae: AutoencoderKLWan,
    steps: int,
    *,
    seed: int = 0,
    rate: float = 7e-4,
    batch_scale: int = 1,
    say: Callable = print,
) -> AutoencoderKLWan:
    """Train the decoder alone for so many steps, the latents staying as the DiT knows them."""
    for module in (vae.encoder, vae.quant_conv):
        module.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    run = Run(folder / "vae-finish", vae, [optimizer], steps, warm=min(60, steps // 4 + 1), flat=0.3)
    _fit(run, vae, FINISH, (seed, 1), _decoder_loss, batch_scale, say)
    return vae


def _decoder_loss(
    vae: AutoencoderKLWan, pixels: torch.Tensor, things: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of decoding the latents' means, a little noise on them as a sampler leaves it."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        with torch.no_grad():
            mean = encode(vae, pixels)[0]
            mean = mean + 0.05 * mean.std() * torch.randn_like(mean)
        error = decode(vae, mean).float() - pixels
    loss, psnr = distance(error, things, more=3.0, more_edges=3.0)
    return loss, {"psnr": psnr, "kl": 0.0}
