"""How long one job may take: what is foreseen beyond it is refused, by the server or at last by the worker."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")

import runtime
from runtime.request import Request
from runtime.serve import worker
from runtime.serve.admission import Admission, TooLong
from runtime.serve.errors import ApiError
from runtime.serve.schema import Asked
from runtime.serve.settings import read_settings
from runtime.serve.supervisor import Unanswered

DAY = 86400.0
CLIP = runtime.Clip(np.zeros((9, 32, 32, 3), np.uint8))
REQUEST = Request(prompt="a", width=832, height=480, num_frames=81, steps=50, guidance=5.0)


def asked(request: Request = REQUEST, model: str = "m") -> Asked:
    assert request.num_frames is not None
    return Asked(model, request, {}, request.num_frames, 1, 0)


class Answers:
    """What a worker foresees, and how often it was asked."""

    def __init__(self, **found: Any) -> None:
        self.found, self.count = found, 0

    async def __call__(self, kind: str, model: str, **_: Any) -> dict[str, Any]:
        self.count += 1
        if not self.found:
            raise Unanswered("not_ready", "nobody")
        return self.found


def check(admission: Admission, answers: Answers, *requests: Asked) -> int:
    """Ask for each; return how often a worker was asked."""
    for each in requests:
        asyncio.run(admission.check(answers, each, Path()))
    return answers.count


def admission(limit: float = DAY, pace: float = 1.0) -> Admission:
    paces = {("m", size): pace for size in range(30)}
    return Admission(limit, SimpleNamespace(paces=lambda: paces))  # type: ignore[arg-type]


def test_a_day_is_the_default_and_the_command_line_says_otherwise() -> None:
    assert read_settings([]).max_seconds == DAY
    assert read_settings(["--max-seconds", "0"]).max_seconds == 0


@pytest.mark.parametrize(("limit", "pace", "refused"), [(DAY, 1.0, True), (2 * DAY, 1.0, False), (2 * DAY, 3.0, True)])
def test_what_takes_longer_is_refused_with_what_to_do(limit: float, pace: float, refused: bool) -> None:
    answers = Answers(seconds={"total": 1.2 * DAY})
    if not refused:
        assert check(admission(limit, pace), answers, asked()) == 1
        return
    with pytest.raises(
        ApiError, match=r"this would take .*; legal: up to .* \(the server's --max-seconds\), so ask"
    ) as told:
        check(admission(limit, pace), answers, asked())
    assert (told.value.status, told.value.code) == (400, "too_long")


def test_a_budget_of_memory_refuses_with_the_planners_words() -> None:
    with pytest.raises(ApiError, match="legal is what fits") as told:
        check(admission(), Answers(fits=False, reason="legal is what fits: less"), asked())
    assert told.value.code == "does_not_fit"


def test_what_is_no_larger_than_what_was_admitted_waits_for_nobody() -> None:
    answers, gate = Answers(seconds={"total": 60.0}), admission()
    assert check(gate, answers, asked(), asked(), asked(replace(REQUEST, steps=20, width=480, height=480))) == 1
    larger = [
        replace(REQUEST, **more)
        for more in ({"steps": 51}, {"num_frames": 85}, {"width": 848}, {"quality": "fast"}, {"clips": (CLIP,)})
    ]
    for number, each in enumerate(larger, 2):
        assert check(gate, answers, asked(each)) == number
    assert check(gate, answers, asked(model="other")) == 7
    assert check(gate, answers, asked(replace(REQUEST, steps=51))) == 7


def test_without_a_limit_or_an_answer_everything_is_taken() -> None:
    assert check(admission(0), Answers(), asked()) == 0
    assert check(admission(), Answers(), asked(), asked()) == 2, "and asked for again"


def test_what_was_taken_while_nobody_could_tell_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker looks again before it begins, says when to expect its first step, and goes on with what it began."""
    said: list[str] = []
    monkeypatch.setattr(worker, "say", said.append)
    model = runtime.load("demo")
    maker = SimpleNamespace(models={"demo": model}, stopping=None)
    store = SimpleNamespace(paces=dict, folder=lambda _: Path())
    made = worker.Worker(store, "one", maker, 60.0)  # type: ignore[arg-type]
    seconds = {"text": 1.0, "encode": 2.0, "step": 3.0, "total": 61.0}
    monkeypatch.setattr(made, "predicted", lambda _: SimpleNamespace(seconds=seconds))
    job = SimpleNamespace(id="j", model="demo", step=0, attempt=1, request={})
    with pytest.raises(TooLong) as told:
        made.look_ahead(job)  # type: ignore[arg-type]
    assert said == ["first 6.000"] and worker.explain(told.value)["code"] == "too_long"
    made.look_ahead(SimpleNamespace(**vars(job) | {"step": 5}))  # type: ignore[arg-type]
    model.engine = "inductor"
    assert worker.until_first_step(SimpleNamespace(seconds=seconds), model) == 66.0  # type: ignore[arg-type]
