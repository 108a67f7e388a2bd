"""Random Wans to time, written by diffusers in the published layout: one of 100 M transformer parameters, and one
with an autoencoder as large as Wan 2.1's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from runtime.model import DEMO

# Per kind: pixels each way, frames, layers of the transformer, width of the autoencoder
KINDS = {"random": (128, 9, 12, 32), "tiny": (128, 9, 3, 24), "vae": (256, 5, 1, 96)}


def write(folder: Path, kind: str = "random") -> None:
    """Write a checkpoint of KINDS; its weights are the same every time. Raises ImportError without diffusers."""
    size, frames, layers, width = KINDS[kind]
    settings = {
        "name": kind,
        "defaults": {
            "width": size, "height": size, "num_frames": frames, "fps": 16, "steps": 6, "guidance": 4.0, "shift": 3.0,
        },
    }  # fmt: skip
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=256, d_kv=64, d_ff=512, num_layers=4, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=64, text_dim=256, ffn_dim=2048, num_layers=layers
    )
    pipe: Any = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=randomised(UMT5EncoderModel(text), 1),
        transformer=randomised(transformer, 2),
        vae=randomised(AutoencoderKLWan(base_dim=width), 3),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    )
    pipe.save_pretrained(folder)
    (folder / "runtime.json").write_text(json.dumps(settings))


def randomised(module: Any, seed: int) -> Any:
    """Give every parameter values that keep the numbers' size from layer to layer, so that results can be compared."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        gain = "gamma" in name or ("norm" in name and name.endswith("weight"))
        matrix = parameter.dim() > 1 and not gain and "table" not in name
        parameter.data = noise / parameter[0].numel() ** 0.5 if matrix else 0.2 * noise + float(gain)
    return module.eval()
