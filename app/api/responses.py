"""A reply from a worker, on the wire."""

from __future__ import annotations

from starlette.types import Scope, Send

from app.api.protocol import ClientConnection, response_of
from app.api.rate_limits import rate_limit_headers
from app.errors import GatewayError
from app.gateway import Reply
from app.inference import Route
from app.relay.dialect import dialect_of

Headers = list[tuple[bytes, bytes]]


STREAM_HEADERS: Headers = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]


async def send_reply(reply: Reply, send: Send, client: ClientConnection) -> None:
    """Relay `reply` to the client, each part as soon as it is there.

    An answer that broke is left without its last message: the server then closes the connection uncleanly, which is
    the only way to tell a client, inside HTTP/1.1, that a body is not whole.
    """
    answer = reply.answer
    headers = [
        (b"content-type", answer.content_type),
        (b"x-sluice-model", reply.variant.model.encode()),
        (b"x-sluice-variant", reply.variant.name.encode()),
        (b"x-sluice-queue-ms", b"%.1f" % (reply.lease.waited_s * 1000)),
        *rate_limit_headers(reply.lease.allowances),
    ]
    if answer.resume:
        headers.append((b"x-sluice-resume", answer.resume.encode()))
    part = await answer.next()
    if not answer.is_streamed:
        headers.append((b"content-length", b"%d" % len(part)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": part})
        return
    await send({"type": "http.response.start", "status": 200, "headers": headers + STREAM_HEADERS})
    await send({"type": "http.response.body", "body": part, "more_body": True})
    await answer.pour(client)
    if answer.is_whole:
        await send({"type": "http.response.body", "body": b""})


def end_stream(error: GatewayError, route: Route, scope: Scope, client: ClientConnection) -> None:
    """The last event of a stream that the gateway has to break off; nothing where no answer has begun."""
    if response_of(scope).has_begun:
        client.write(dialect_of(route).error_event(error))
