"""dit-runtime: from a prompt to a video with a Sora-style video diffusion transformer.

import runtime
model = runtime.load("demo")
video = runtime.generate(model, runtime.Request(prompt="a red ball rolls left over green grass", seed=7))
video.save("ball.mp4")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.client import Client
    from runtime.clips import Clip
    from runtime.decoding import decode, encode
    from runtime.denoising import Cancelled
    from runtime.model import Model, load
    from runtime.pipeline import generate
    from runtime.planner import load_within
    from runtime.previews import preview
    from runtime.receipt import Receipt
    from runtime.request import Request
    from runtime.storyboard import Card
    from runtime.video import Video
    from runtime.warming import warmup

# Names are handed out at first use, so that a process which only serves HTTP never imports torch.
_HOMES = {
    "Cancelled": "denoising",
    "Client": "client",
    "Card": "storyboard",
    "Clip": "clips",
    "Model": "model",
    "Receipt": "receipt",
    "Request": "request",
    "Video": "video",
    "decode": "decoding",
    "encode": "decoding",
    "generate": "pipeline",
    "load": "model",
    "load_within": "planner",
    "preview": "previews",
    "warmup": "warming",
}

__all__ = [
    "Cancelled", "Card", "Client", "Clip", "Model", "Receipt", "Request", "Video",
    "decode", "encode", "generate", "load", "load_within", "preview", "warmup",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"runtime.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
