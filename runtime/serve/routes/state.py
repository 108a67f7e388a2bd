"""Paths that tell of the server itself: models, health, metrics, its own description."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from runtime.serve.api import Api
from runtime.serve.errors import ApiError
from runtime.serve.openapi import DESCRIPTIONS


def add(app: FastAPI, api: Api) -> None:
    """Add what tells of the server itself."""

    @app.get("/v1/models", openapi_extra=DESCRIPTIONS)
    async def models() -> Response:
        found = api.store.models()
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "dit-runtime"} for name in found]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/health/live", openapi_extra=DESCRIPTIONS)
    async def live() -> Response:
        return JSONResponse({"status": "live"})

    @app.get("/health/ready", openapi_extra=DESCRIPTIONS)
    async def ready() -> Response:
        if api.draining or not api.ready():
            raise ApiError(503, "no worker is ready", code="not_ready", retry_after=1)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", openapi_extra=DESCRIPTIONS)
    async def metrics() -> Response:
        lines = ["# TYPE dit_requests_total counter"]
        lines += [f'dit_requests_total{{status="{name}"}} {count}' for name, count in sorted(api.requests.items())]
        lines.append("# TYPE dit_jobs gauge")
        lines += [f'dit_jobs{{status="{name}"}} {count}' for name, count in sorted(api.store.counts().items())]
        lines.append("# TYPE dit_refusals_total counter")
        for (stage, code), count in sorted(api.store.refusals().items()):
            lines.append(f'dit_refusals_total{{stage="{stage}",code="{code}"}} {count}')
        lines.append("# TYPE dit_stage_seconds summary")
        for name, seconds, calls in api.store.stages():
            lines.append(f'dit_stage_seconds_sum{{stage="{name}"}} {seconds:.6f}')
            lines.append(f'dit_stage_seconds_count{{stage="{name}"}} {calls}')
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())
