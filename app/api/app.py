"""The application: one stack, read top to bottom."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from app.api import admin, batches, console, files, health, keys, models
from app.api.access import Access, Guard, Rules
from app.api.inference import CONSOLE_CHAT, InferenceRoutes
from app.api.middleware import Dispatch, Errors, RequestIds
from app.api.openapi import document
from app.errors import GatewayError, InternalError, InvalidValue, MethodNotAllowed, RouteNotFound
from app.reload import Source
from app.runtime import open_runtime
from app.settings import Settings

GC_THRESHOLD = 20_000

DECLARED: tuple[tuple[Access, APIRouter], ...] = (
    (Access.TENANT, models.routes),
    (Access.TENANT, files.routes),
    (Access.TENANT, batches.routes),
    (Access.PROBE, health.probes),
    (Access.ADMIN, health.routes),
    (Access.ADMIN, admin.routes),
    (Access.ADMIN, keys.routes),
    (Access.ADMIN, console.routes),
    (Access.PAGE, console.pages),
)
"""All routes but the inference routes, and who may ask for them."""
OPERATOR_PAGES = ("/docs", "/openapi.json", CONSOLE_CHAT)
"""What no APIRouter holds: FastAPI's own pages, and where the console asks."""


def well() -> bool:
    """Never ailing: of a process without siblings, nobody would live to say so."""
    return False


def create_app(settings: Settings, source: Source | None = None, is_ailing: Callable[[], bool] = well) -> ASGIApp:
    """The ASGI application of one gateway process; its lifespan opens and closes the runtime.

    `is_ailing` says whether this replica's processes keep dying: then it asks for no more work.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
        async with open_runtime(settings, source, is_ailing) as runtime:
            _spare_the_collector()
            yield {"runtime": runtime}

    # A redirect would be an answer that is no OpenAI object, to an address made of the client's own Host header.
    api = FastAPI(
        title="Sluice",
        lifespan=lifespan,
        docs_url="/docs",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    for _, routes in DECLARED:
        api.include_router(routes)
    api.add_exception_handler(HTTPException, _http_exception)
    api.add_exception_handler(RequestValidationError, _validation_error)
    api.add_exception_handler(GatewayError, _gateway_error)
    api.add_exception_handler(Exception, _internal_error)
    rules = Rules(DECLARED, OPERATOR_PAGES)
    api.openapi = lambda: document(api, rules)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    admin_port = settings.admin.port if settings.admin is not None else None
    inner = Errors(Dispatch(Guard(rules, admin_port), InferenceRoutes(), api))
    return RequestIds(inner)


def _spare_the_collector() -> None:
    """Let the garbage collector pass over what lives as long as the process, and run less often.

    A request leaves hardly any cycles; with the default thresholds the collector took 9 % of the gateway's CPU.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)  # noqa: S101 - registered for this type only
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers, media_type="application/json")


async def _internal_error(request: Request, error: Exception) -> Response:
    return await _gateway_error(request, InternalError("The server had an error while processing your request."))


async def _http_exception(request: Request, error: Exception) -> Response:
    """The framework's own 404 and 405, in our shape."""
    assert isinstance(error, HTTPException)  # noqa: S101
    what = f"{request.method} {request.scope['path'][:200]}"
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "GET")
        return await _gateway_error(request, MethodNotAllowed(f"{what} is not allowed.", allow=allow))
    if error.status_code == 404:
        return await _gateway_error(request, RouteNotFound(f"Unknown request URL: {what}."))
    return await _gateway_error(request, InvalidValue(str(error.detail)))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return await _gateway_error(request, InvalidValue(first["msg"], param=param))
