"""What surrounds every request, as pure ASGI: its id, its errors, and who may see which route."""

from __future__ import annotations

import re
import secrets

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
    """Outermost: every answer, also an error's, carries an `x-request-id`, made here.

    A client's own is taken only with `keeps_given`, and if it is harmless: workers make the engine's ids of it, so two
    clients must not be able to choose the same.
    """

    def __init__(self, app: ASGIApp, *, keeps_given: bool) -> None:
        self._app = app
        self._keeps_given = keeps_given

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = (self._keeps_given and _client_request_id(scope)) or secrets.token_hex(16).encode()
        scope["request_id"] = request_id.decode()
        response_of(scope).add_header(b"x-request-id", request_id)
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
            log.exception("internal error", request_id=scope["request_id"], path=scope["path"])
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


def _client_request_id(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value if REQUEST_ID.fullmatch(value) else None
    return None
