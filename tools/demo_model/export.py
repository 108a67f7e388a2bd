"""Writes a trained demo model as a checkpoint in the published layout (Wan 2.2 TI2V: timesteps per token), bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from transformers import AutoTokenizer

import runtime
from runtime.previews import store_projection
from tools.demo_model import text
from tools.demo_model.captions import expansion_rules
from tools.demo_model.diffusion import Student

DEFAULTS = {"width": 160, "height": 96, "num_frames": 17, "fps": 8, "steps": 25, "guidance": 4.0, "shift": 3.0}


def write(folder: Path, vae: AutoencoderKLWan, student: Student, *, defaults: dict[str, Any] | None = None) -> None:
    """Write the pipeline that diffusers loads, with `runtime.json` (our defaults) beside model_index.json."""
    text.write_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text.copy_capitals(student.encoder)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=(defaults or DEFAULTS)["shift"],
        num_train_timesteps=1000, solver_order=2, final_sigmas_type="zero",
    )  # fmt: skip
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=student.encoder.to(torch.bfloat16), vae=vae.to(torch.bfloat16),
        transformer=student.dit.to(torch.bfloat16), scheduler=scheduler, expand_timesteps=True,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    text.write_tokenizer(folder / "tokenizer")
    settings = {"name": "demo", "defaults": defaults or DEFAULTS, "expansion": expansion_rules()}
    (folder / "runtime.json").write_text(json.dumps(settings, indent=2) + "\n")
    store_projection(runtime.load(folder))
