"""What the API says of a job: the video object that clients read."""

from __future__ import annotations

from typing import Any

from runtime.serve.jobs import Job
from runtime.serve.schema import Asked


def shown(asked: Asked) -> dict[str, Any]:
    """Return what the API says of a request that never changes."""
    request = asked.request
    assert request.fps
    seconds = asked.total_frames / request.fps
    return {
        "seconds": f"{seconds:.3f}".rstrip("0").rstrip("."),
        "size": f"{request.width}x{request.height}",
        "seed": request.seed,
        "fps": request.fps,
        "num_frames": asked.total_frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "negative_prompt": request.negative_prompt,
        "task": request.task,
        **({"final_size": "{}x{}".format(*asked.final_size)} if asked.final_size else {}),
    }


def video_object(job: Job, ahead: tuple[int, float | None] | None = None) -> dict[str, Any]:
    """Return a job as the video object of the API, and more beside; `ahead` as from Store.ahead."""
    found = {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None,
        "status": job.status,
        "progress": job.progress,
        "model": job.model,
        "prompt": job.prompt,
        "remixed_from_video_id": job.parent,
        "error": job.error,
        "step": job.step,
        "total_steps": job.total,
        "priority": job.priority,
        "attempt": job.attempt,
        "quality": "draft" if "final_size" in job.shown else "standard",
        "warnings": [],
        **job.shown,
    }
    if job.status in ("queued", "in_progress"):
        left = None if job.estimate is None else job.estimate * (1 - job.step / max(job.total, 1))
        if ahead is not None:
            left = None if left is None or ahead[1] is None else left + ahead[1]
            found["queue_position"] = ahead[0]
        found["eta_seconds"] = None if left is None else round(left, 2)
    if job.receipt is not None:
        found["stages"], found["receipt"] = job.receipt["stages"], job.receipt
        found["warnings"] = job.receipt["notes"]
    if job.output is not None:
        found["spritesheet"] = job.output.get("sheet")
    return found
