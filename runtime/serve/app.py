"""The HTTP surface, as the clients of OpenAI's Videos and Images API speak it, and what goes beyond it.

A file of `routes/` holds the paths of one kind. Nothing here imports torch or decodes a picture: workers make videos,
and children look at uploads.
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from runtime.serve.api import Api
from runtime.serve.errors import ApiError
from runtime.serve.gate import Gate, answer, answer_http, answer_invalid
from runtime.serve.routes import characters, events, images, making, page, planning, provenance, reading, state
from runtime.serve.telemetry import Traced


def make_app(api: Api) -> FastAPI:
    """Return the application."""
    app = FastAPI(title="dit-runtime", version="1", docs_url=None, redoc_url=None, openapi_url=None)
    characters.add(app, api)  # before the paths with {video_id}
    making.add(app, api)
    planning.add(app, api)
    reading.add(app, api)
    events.add(app, api)
    images.add(app, api)
    provenance.add(app, api)
    state.add(app, api)
    page.add(app)
    if api.telemetry is not None:
        app.add_middleware(Traced, telemetry=api.telemetry)
    app.add_middleware(Gate, keys=api.settings.keys, metrics=api.metrics, host=api.settings.host)
    app.exception_handler(ApiError)(answer)
    app.exception_handler(HTTPException)(answer_http)
    app.exception_handler(RequestValidationError)(answer_invalid)
    return app
