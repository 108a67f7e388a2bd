"""A request whose peak memory is measured in a process of its own, which nothing but the runtime is imported into."""

from __future__ import annotations

from typing import Any

import runtime


def peak_within(folder: str, memory: str | None) -> tuple[int, int, dict[str, Any] | None]:
    """Make a video; return the highest resident memory of its stages and of loading, and what was predicted."""
    request = runtime.Request(prompt="a red ball", seed=3, steps=2, width=64, height=64, num_frames=5)
    model = runtime.load(folder) if memory is None else runtime.load_within(folder, request, memory=memory)
    video = runtime.generate(model, request)
    for _ in video:
        pass
    stages = video.receipt.stages
    loading = stages["load"].peak_bytes or 0
    return max(stages[name].peak_bytes or 0 for name in ("text", "denoise", "decode")), loading, video.receipt.predicted
