"""What a worker answers at once, also while it makes a video: what a request takes, how a prompt is written out.

Questions and answers are lines of JSON over the worker's standard input and output.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.expansion import Expansion, expand
from runtime.model import Model
from runtime.planner import foresee
from runtime.request import Request
from runtime.serve.records import request_of
from runtime.tasks import Plan, plan_task

log = logging.getLogger("runtime.serve.answers")


class NotYet(Exception):
    """Raised where a question can be answered later."""


def answer(models: Mapping[str, Model], line: str) -> str:
    """Return the line that answers a line: {"id", "found"} or {"id", "error": {"code", "message"}}."""
    asked = json.loads(line)
    try:
        if asked["model"] not in models:
            raise NotYet("the model is being loaded")
        found: dict[str, Any] = {"found": KINDS[asked["kind"]](models[asked["model"]], asked)}
    except NotYet as error:
        found = {"error": {"code": "not_ready", "message": str(error)}}
    except (ValueError, OSError) as error:
        found = {"error": {"code": "refused", "message": str(error)}}
    except Exception as error:
        log.exception("a question about %s cannot be answered", asked["kind"])
        found = {"error": {"code": "internal_error", "message": f"{type(error).__name__}; the log says more"}}
    return json.dumps({"id": asked["id"], **found})


def planned(model: Model, request: Request) -> tuple[Request, Plan]:
    """Return a request with everything filled in, and its plan."""
    request = request.resolved(model.spec)
    return request, plan_task(request, model.spec)


def tell_plan(model: Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record of the store takes: seconds and peak bytes per stage, and where it does not fit, why."""
    request, plan = planned(model, request_of(asked["record"], Path(asked["folder"])))
    try:
        found = foresee(model, request, plan)
    except ValueError as error:
        return {"fits": False, "reason": str(error)}
    if found is None:
        raise NotYet("this machine is being measured")
    return {
        "fits": found.most <= found.memory,
        "seconds": found.seconds,
        "peak_bytes": found.most,
        "memory_bytes": found.memory,
        "tokens": found.tokens,
        "machine": found.machine,
        "windows": len(plan.windows),
    }


def tell_expansion(model: Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a prompt is written out to, with notes."""
    expansion = Expansion(**asked["expansion"])
    expanded, notes = expand(asked["prompt"], expansion, model.spec.captions, model.spec.expansion)
    return {"expanded": expanded, "notes": notes}


KINDS: dict[str, Callable[[Model, Mapping[str, Any]], dict[str, Any]]] = {"plan": tell_plan, "expand": tell_expansion}
