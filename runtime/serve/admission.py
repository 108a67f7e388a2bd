"""How long one job may take: what is foreseen to take longer is refused before anything of it is made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from runtime.prediction import duration
from runtime.serve.errors import bad
from runtime.serve.forecast import pace
from runtime.serve.jobs import Store
from runtime.serve.schema import Asked
from runtime.serve.supervisor import Unanswered

Extent = tuple[int, int, int, bool]  # pixels of a frame, frames, steps, whether there is guidance


class TooLong(ValueError):
    """Raised for a job that would take so many seconds, beyond a limit."""

    def __init__(self, seconds: float, limit: float) -> None:
        super().__init__(
            f"this would take {duration(seconds)}; legal: up to {duration(limit)} (the server's --max-seconds), so ask "
            "for a smaller size, fewer frames or fewer steps"
        )


def check_seconds(foreseen: float, model: str, limit: float, store: Store) -> None:
    """TooLong for what takes more than `limit` seconds (0: none) at the pace that a model's jobs have kept to."""
    seconds = foreseen * pace(store.paces(), model, foreseen)
    if 0 < limit < seconds:
        raise TooLong(seconds, limit)


class Admission:
    """Refuses jobs beyond `limit` seconds (0: none), by what a worker foresees of them.

    What is no larger in any way than what was admitted before is admitted unasked, so that most jobs wait for nobody.
    """

    def __init__(self, limit: float, store: Store) -> None:
        self.limit, self.store = limit, store
        self.admitted: dict[str, list[Extent]] = {}  # by model, none of them within another

    async def check(self, ask: Callable[..., Awaitable[dict[str, Any]]], asked: Asked, folder: Path) -> None:
        """ApiError for what would take too long, or does not fit into a model's budget of memory."""
        extent = extent_of(asked)
        known = self.admitted.setdefault(asked.model, [])
        if not self.limit or (extent is not None and any(within(extent, each) for each in known)):
            return
        try:
            found = await ask("plan", asked.model, record=asked.record, folder=str(folder))
        except Unanswered:
            return  # nobody can tell yet; the worker looks again before it makes the job
        if "reason" in found:
            raise bad(found["reason"], code="does_not_fit")
        try:
            check_seconds(found["seconds"]["total"], asked.model, self.limit, self.store)
        except TooLong as error:
            raise bad(str(error), code="too_long") from error
        if extent is not None:
            self.admitted[asked.model] = [each for each in known if not within(each, extent)] + [extent]


def extent_of(asked: Asked) -> Extent | None:
    """Return how much a request asks for; None where it takes more than that to tell: clips, and steps left out."""
    request = asked.request
    if request.clips or request.references or request.storyboard or request.quality != "exact":
        return None
    assert request.width and request.height and request.steps is not None
    guided = max(request.guidance or 0.0, request.guidance_2 or 0.0) > 1
    return request.width * request.height, asked.total_frames, request.steps, guided


def within(one: Extent, other: Extent) -> bool:
    """Tell whether one is no larger than the other in any way."""
    return all(a <= b for a, b in zip(one, other, strict=True))
