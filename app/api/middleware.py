"""What surrounds every request, as pure ASGI: its id, its errors, and who may see which route."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.access import AUDITED, Audit, Guard
from app.api.client import ClientGone
from app.api.inference import InferenceRoutes
from app.api.protocol import forget, response_of
from app.api.refusal import send_error
from app.errors import GatewayError, InternalError, MethodNotAllowed
from app.telemetry.logs import Log

REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")


class RequestIds:
    """Outermost: every request gets an id here, and every answer, also an error's, carries an `x-request-id`.

    Workers make the engine's ids of the one made here, so it is never a client's. A harmless `x-request-id` of the
    client's own is given back as it came, and the one made here stands beside it as `x-sluice-request-id`. Logs have
    both; there a client may also be known by OpenAI's `x-client-request-id`, which is not given back.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        echoed, named = _client_request_ids(scope["headers"])
        scope["request_id"] = request_id
        scope["client_request_id"] = (echoed or named).decode()
        response = response_of(scope)
        response.add_header(b"x-request-id", echoed or request_id.encode())
        if echoed:
            response.add_header(b"x-sluice-request-id", request_id.encode())
        try:
            await self._app(scope, receive, send)
        finally:
            forget(scope)


class Errors:
    """Below the ids, above everything that may raise: what is raised becomes an OpenAI error object, once.

    After the response has begun an error cannot be told any more; the connection is closed uncleanly instead.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ClientGone:
            return
        except GatewayError as error:
            if not response_of(scope).has_begun:
                await send_error(error, send)
        except Exception:
            if scope["type"] != "http":
                raise
            log: Log = scope["state"]["runtime"].log
            ids = {"request_id": scope["request_id"], "client_request_id": scope["client_request_id"]}
            log.exception("internal error", **ids, path=scope["path"])
            if not response_of(scope).has_begun:
                await send_error(InternalError("The server had an error while processing your request."), send)


class Dispatch:
    """Innermost: past the guard, the inference routes go straight to their endpoint, all else to the application.

    FastAPI's own stack costs more CPU than the whole relay of a short answer, and none of it is used on this path.
    """

    def __init__(self, guard: Guard, inference: InferenceRoutes, app: ASGIApp) -> None:
        self._guard = guard
        self._inference = inference
        self._app = app
        self._audited = Audit(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        self._guard.check(scope, scope["state"]["runtime"].identification)
        if path in self._inference.paths:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{scope['method']} is not allowed for {path}.", allow="POST")
            await self._inference(scope, receive, send)
        elif path.startswith(AUDITED):
            await self._audited(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _client_request_ids(headers: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """The client's `x-request-id` and `x-client-request-id`, empty where not given once and harmless."""
    given: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in (b"x-request-id", b"x-client-request-id"):
            given[name] = b"" if name in given or not REQUEST_ID.fullmatch(value) else value
    return given.get(b"x-request-id", b""), given.get(b"x-client-request-id", b"")
