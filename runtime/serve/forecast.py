"""When each job will be done: the planner's seconds, corrected by what jobs took before, played through the queue."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEARNED = 0.3  # of the newest job in a pace
SURE_STEPS = 3  # after so many steps of an attempt, its own pace counts
PRESSING = 10  # a job of higher priority goes first where it is shorter than what is left by this factor
DENOISED = 90  # percent of progress; the rest is decoding and writing
OVERDUE = 0.02  # of what a running job has taken: so much is left at least, until it is done

Paces = Mapping[tuple[str, int], float]  # (model, size) -> seconds taken by seconds predicted


@dataclass(frozen=True)
class Outlook:
    """What lies before a job: queued jobs that come first, and seconds until it begins and until it is done."""

    position: int
    wait: float | None = None
    done: float | None = None


def size_of(seconds: float) -> int:
    """Return the size of a prediction: small jobs deviate otherwise than large ones."""
    return round(math.log2(max(seconds, 1e-3)))


def learned(old: float | None, seconds: float, predicted: float) -> float:
    """Return the pace after a job that took so many seconds."""
    found = seconds / predicted
    return found if old is None else (1 - LEARNED) * old + LEARNED * found


def pace(paces: Paces, model: str, predicted: float) -> float:
    """Return seconds taken by seconds predicted, of jobs of that model of the nearest size; 1 where there is none."""
    sizes = [size for name, size in paces if name == model]
    nearest = min(sizes, key=lambda size: abs(size - size_of(predicted)), default=None)
    return 1.0 if nearest is None else paces[model, nearest]


def left(job: Mapping[str, Any], paces: Paces, now: float) -> float | None:
    """Return the seconds of work that are left of a job; None where it is not predicted yet."""
    if job["estimate"] is None:
        return None
    rate = pace(paces, job["model"], job["estimate"])
    total, denoising = job["estimate"] * rate, (job["denoising"] or 0.0) * rate
    steps = max(job["total"], 1)
    each = denoising / steps
    done = job["step"] - (job["claimed_step"] or 0)
    if job["status"] == "in_progress" and done >= SURE_STEPS and job["stepped_at"] is not None:
        each = (job["stepped_at"] - job["claimed_at"]) / done
    ahead = each * (steps - job["step"])
    ending = (total - denoising) * (1 - max(job["progress"] - DENOISED, 0) / (100 - DENOISED))
    if job["status"] != "in_progress" or job["claimed_at"] is None:
        return ahead + ending
    since = now - (job["stepped_at"] or job["claimed_at"])
    return max(ahead + ending - since, OVERDUE * (now - job["claimed_at"]))


def forecast(
    jobs: Sequence[Mapping[str, Any]], shares: Mapping[str, float], paces: Paces, workers: int, now: float
) -> dict[str, Outlook]:
    """Return the outlook of each queued and running job, taken as the store hands them out: by priority, then to whom
    has had least, then by age. Seconds are None behind a job that is not predicted yet.
    """
    found: dict[str, Outlook] = {}
    places: list[tuple[float, float]] = []  # of each worker: when it is free, and the priority of what it does
    for job in jobs:
        if job["status"] == "in_progress":
            seconds = left(job, paces, now)
            found[job["id"]] = Outlook(0, 0.0, seconds)
            places.append((math.inf if seconds is None else seconds, job["priority"]))
    places += [(0.0, -math.inf)] * (workers - len(places))
    heapq.heapify(places)
    for position, job in enumerate(in_turn([job for job in jobs if job["status"] == "queued"], shares)):
        seconds = left(job, paces, now)
        if not places or seconds is None:
            found[job["id"]] = Outlook(position)
            continue
        free, priority = places[0]
        begin = 0.0 if job["priority"] > priority and seconds * PRESSING < free else free
        heapq.heapreplace(places, (free + seconds, priority if begin < free else job["priority"]))
        known = math.isfinite(begin)
        found[job["id"]] = Outlook(position, begin if known else None, begin + seconds if known else None)
    return found


def in_turn(jobs: Sequence[Mapping[str, Any]], shares: Mapping[str, float]) -> list[Mapping[str, Any]]:
    """Return queued jobs as they will be taken, each counted to its owner's share."""
    waiting: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for job in sorted(jobs, key=lambda job: -job["seq"]):
        waiting.setdefault((job["priority"], job["owner"]), []).append(job)  # the oldest last
    had = dict(shares)
    heap = [(-priority, had.get(owner, 0.0), own[-1]["seq"], owner) for (priority, owner), own in waiting.items()]
    heapq.heapify(heap)
    found = []
    while heap:
        below, share, _, owner = heapq.heappop(heap)
        own = waiting[-below, owner]
        if share < had.get(owner, 0.0):  # of another priority, and counted since
            heapq.heappush(heap, (below, had[owner], own[-1]["seq"], owner))
            continue
        job = own.pop()
        found.append(job)
        had[owner] = had.get(owner, 0.0) + (job["estimate"] or 1.0)
        if own:
            heapq.heappush(heap, (below, had[owner], own[-1]["seq"], owner))
    return found
