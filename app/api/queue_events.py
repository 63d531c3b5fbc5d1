"""`x-sluice-queue-events: 1` on a streaming request: comments tell where it stands while it waits.

    : sluice-queue position=3 of=17 wait_ms=1200
    : sluice-queue granted queue_ms=1874.2 model=smollm2 variant=dense

Server-sent comments, which every client of event streams skips. `position` is among the client's own tenant's requests
of its band for these workers, `of` how many those are, `wait_ms` the expected wait at the present rate (0: not known);
of other tenants nothing is told. The first comes when a request has waited for a quarter of a second, the next when
something changed, at most one a second, and one every HEARTBEAT_S.

With the first comment the head is sent, 200. What would have been a status afterwards (no slot in time, no worker left,
a refusal by the worker) is an error event then, and the connection is closed uncleanly, as for a stream that breaks. A
request that gets its slot before has an ordinary answer.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from app.api.protocol import ClientConnection
from app.api.response import Response
from app.api.responses import STREAM_HEADERS, send_reply
from app.errors import UpstreamBadResponse
from app.gateway import Gateway, Reply
from app.inference import InferenceRequest

HEARTBEAT_S = 15.0


class QueueEvents:
    """The comments on one stream, from the first to when it is left; then nothing is said any more."""

    def __init__(self, request: InferenceRequest, response: Response, client: ClientConnection) -> None:
        self._request = request
        self._response = response
        self._client = client
        self._clock = asyncio.get_running_loop().time
        self._opening: asyncio.Task[None] | None = None
        self._told = (0, 0)
        self._told_at = 0.0
        self.has_begun = False

    def __enter__(self) -> Self:
        self._request.on_wait = self.tell
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opening is not None:
            self._opening.cancel()
        self._told = (-1, -1)

    def tell(self, position: int, of: int, wait_s: float) -> None:
        """See `inference.QueueListener`."""
        if self._told == (-1, -1) or self._client.paused_since is not None:
            return
        if self._told == (position, of) and self._clock() - self._told_at < HEARTBEAT_S:
            return
        comment = b": sluice-queue position=%d of=%d wait_ms=%d\n\n" % (position, of, wait_s * 1000)
        if self.has_begun:
            self._client.write(comment)
        elif self._opening is None:
            self._opening = asyncio.create_task(self._open(comment))
        self._told, self._told_at = (position, of), self._clock()

    async def _open(self, comment: bytes) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"x-sluice-model", self._request.resolved_model.encode()),
            *STREAM_HEADERS,
        ]
        await self._response.begin(headers, comment)
        self.has_begun = True


async def serve_announced(
    gateway: Gateway, request: InferenceRequest, response: Response, client: ClientConnection
) -> None:
    """Serve a streaming request whose client wants to hear of its wait. Raises GatewayError, also after the head."""
    events = QueueEvents(request, response, client)
    with events:
        reply = await gateway.serve(request)
    with reply:
        if events.has_begun:
            await _go_on(reply, response, client)
        else:
            await send_reply(reply, response, client)


async def _go_on(reply: Reply, response: Response, client: ClientConnection) -> None:
    """The answer, after its head and some comments."""
    answer, variant = reply.answer, reply.variant
    if not answer.is_streamed:
        raise UpstreamBadResponse("The worker did not stream its answer.")
    queue_ms = reply.lease.waited_s * 1000
    told = b": sluice-queue granted queue_ms=%.1f model=%b variant=%b\n\n"
    client.write(told % (queue_ms, variant.model.encode(), variant.name.encode()))
    if part := await answer.next():
        client.write(part)
    await answer.pour(client)
    if answer.is_whole:
        response.end()
