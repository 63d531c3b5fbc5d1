"""Errors on the wire, in OpenAI's shape."""

from __future__ import annotations

import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import GatewayError


async def send_error(error: GatewayError, send: Send) -> None:
    """Answer with `error`; the caller has not sent anything yet."""
    body = error.body()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *error.headers(),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def refusing(error: GatewayError) -> ASGIApp:
    """An application that answers whatever it is asked with `error`, under an id of its own, and counts it."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-request-id", secrets.token_hex(16).encode()))
            await send(message)

        scope["state"]["runtime"].metrics.refused.labels(error.code).inc()
        await send_error(error, send_with_id)

    return refuse
