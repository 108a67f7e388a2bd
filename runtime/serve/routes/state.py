"""Paths that tell of the server itself: models, health, metrics, its own description."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from runtime.serve.api import Api
from runtime.serve.errors import ApiError, missing
from runtime.serve.openapi import DESCRIPTIONS
from runtime.serve.schema import spec_of


def add(app: FastAPI, api: Api) -> None:
    """Add what tells of the server itself."""

    @app.get("/v1/models", openapi_extra=DESCRIPTIONS)
    async def models() -> Response:
        data = [model_object(name, card) for name, card in api.models().items()]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name}", openapi_extra=DESCRIPTIONS)
    async def model(name: str) -> Response:
        found = api.models().get(name)
        if found is None:
            raise missing(f"model {name[:80]!r}")
        return JSONResponse(model_object(name, found))

    @app.get("/health/live", openapi_extra=DESCRIPTIONS)
    async def live() -> Response:
        return JSONResponse({"status": "live"})

    @app.get("/health/ready", openapi_extra=DESCRIPTIONS)
    async def ready() -> Response:
        if not api.well():
            raise ApiError(503, "no worker is ready", code="not_ready", retry_after=1)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", openapi_extra=DESCRIPTIONS)
    async def metrics() -> Response:
        return Response(generate_latest(api.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())


def model_object(name: str, card: dict[str, Any]) -> dict[str, Any]:
    """Return a model as the API tells of it: what it makes where nothing is asked, and what may be asked."""
    spec = spec_of(card)
    down, across = spec.size_multiple
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "dit-runtime",
        "fingerprint": card["fingerprint"],
        "device": card["device"],
        "conditioning": spec.conditioning,
        "defaults": card["spec"]["defaults"],
        "multiples": {"width": across, "height": down, "num_frames": spec.stride[0] * spec.patch[0]},
        "prompt_tokens": spec.text_length,
        "expands_prompts": spec.expansion is not None,
        "loras": card.get("loras", []),
    }
