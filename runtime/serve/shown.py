"""What the API says of a job: the video object that clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.serve.database import ACTIVE, Job
from runtime.serve.forecast import Outlook
from runtime.serve.schema import Asked

LONG = ("receipt", "stages")  # of the video object: some kilobytes


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
        **({} if request.quality == "exact" else {"quality": request.quality}),
        **({"lora": asked.record["lora"]} if asked.record["lora"] else {}),
        **({"final_size": "{}x{}".format(*asked.final_size)} if asked.final_size else {}),
    }


def video_object(job: Job, outlook: Outlook | None = None, keep: float = 0.0) -> dict[str, Any]:
    """Return a job as the video object of the API, and more beside; results are kept for `keep` seconds, 0 is ever."""
    found = {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": int(job.completed_at + keep) if keep and job.completed_at is not None else None,
        "status": job.status,
        "progress": job.progress,
        "model": job.model,
        "prompt": job.prompt,
        "remixed_from_video_id": job.parent,
        "parent_id": job.parent,
        "error": job.error,
        "started_at": None if job.started_at is None else int(job.started_at),
        "queue_seconds": None if job.started_at is None else round(job.started_at - job.created_at, 3),
        "step": job.step,
        "total_steps": job.total,
        "priority": job.priority,
        "attempt": job.attempt,
        "quality": "draft" if "final_size" in job.shown else "standard",
        "warnings": [],
        **job.shown,
    }
    if job.status in ACTIVE and outlook is not None:
        found["queue_position"] = outlook.position
        found["eta_seconds"] = None if outlook.done is None else round(outlook.done, 2)
    if job.receipt is not None:
        found["stages"], found["receipt"] = job.receipt["stages"], job.receipt
        found["warnings"] = job.receipt["notes"]
    if job.output is not None:
        found["spritesheet"] = job.output.get("sheet")
    return found


def brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a video object without what is long: where there are many of them, or one many times."""
    return {name: value for name, value in found.items() if name not in LONG}
