"""Errors on the wire, in OpenAI's shape."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.rate_limits import rate_limit_headers
from app.errors import GatewayError


async def send_error(error: GatewayError, send: Send) -> None:
    """Answer with `error`; the caller has not sent anything yet."""
    body = error.body()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *error.headers(),
        *rate_limit_headers(error.allowances),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def refusing(error: GatewayError) -> ASGIApp:
    """An application that answers whatever it is asked with `error`, and counts it."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["runtime"].metrics.refused.labels(error.code).inc()
        await send_error(error, send)

    return refuse
