"""A reply from a worker, on the wire."""

from __future__ import annotations

from app.api.protocol import ClientConnection
from app.api.rate_limits import rate_limit_headers
from app.api.response import Header, Response
from app.errors import GatewayError
from app.gateway import Reply
from app.inference import Route
from app.relay.dialect import dialect_of
from app.relay.resumption import ARMED

RESUME = b"x-sluice-resume"
"""What is known about going on elsewhere: before a stream, and as a trailer what came of it."""

STREAM_HEADERS: list[Header] = [(b"x-accel-buffering", b"no")]


async def send_reply(reply: Reply, response: Response, client: ClientConnection) -> None:
    """Relay `reply` to the client, each part as soon as it is there.

    An answer that broke is left without its last message: the server then closes the connection uncleanly, which is
    the only way to tell a client, inside HTTP/1.1, that a body is not whole.
    """
    answer = reply.answer
    headers = [
        (b"content-type", answer.content_type),
        (b"x-sluice-model", reply.variant.model.encode()),
        (b"x-sluice-variant", reply.variant.name.encode()),
        (b"x-sluice-variant-reason", reply.reason.encode()),
        (b"x-sluice-queue-ms", b"%.1f" % (reply.lease.waited_s * 1000)),
        *rate_limit_headers(reply.lease.allowances),
        *reply.choice.headers,
    ]
    if answer.resume:
        headers.append((RESUME, answer.resume.encode()))
    part = await answer.next()
    if not answer.is_streamed:
        await response.send_whole(headers, part)
        return
    headers += STREAM_HEADERS
    is_armed = answer.resume == ARMED
    if is_armed:
        headers.append((b"trailer", RESUME))
    await response.begin(headers, part)
    await answer.pour(client)
    if answer.is_whole:
        response.end([(RESUME, answer.resume.encode())] if is_armed else ())


def end_stream(error: GatewayError, route: Route, response: Response, client: ClientConnection) -> None:
    """The last event of a stream that the gateway has to break off; nothing where no answer has begun."""
    if response.has_begun:
        client.write(dialect_of(route).error_event(error))
