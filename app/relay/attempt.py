"""One attempt on one worker: dispatched, watched until its first byte, given back when its answer is left."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from app.errors import GatewayError, UpstreamBadResponse, WorkerLost
from app.inference import InferenceRequest, TokenUsage
from app.relay.answer import JSON_TYPE, SSE_TYPE
from app.relay.dialect import usage_of_answer
from app.relay.refusal import AttemptFailed, Fault, late_status, refusal
from app.relay.upstream import ConnectFailed, Connection, Header, Upstream
from app.workers.worker import Worker

WHOLE_ANSWER_MAX_BYTES = 8 * 1024 * 1024


class Attempt:
    """From dispatch until `close`, which gives the connection back and tells `left` what became of it.

    `blamed` is the request that the worker dies of, if it does.
    """

    __slots__ = ("_left", "_upstream", "blamed", "connection", "has_begun", "worker")

    def __init__(
        self, worker: Worker, upstream: Upstream, blamed: InferenceRequest, left: Callable[[Attempt], None], now: float
    ) -> None:
        self.worker = worker
        self.blamed = blamed
        self.connection: Connection | None = None
        self.has_begun = False
        self._upstream = upstream
        self._left = left
        if not worker.in_flight:  # a worker without work is silent because of that
            worker.progress.heard = now
        worker.in_flight += 1

    def close(self) -> None:
        """Never waits; to be called once."""
        if self.connection is not None:
            self._upstream.end(self.connection)
        self.worker.in_flight -= 1
        self._left(self)

    async def begin(self, request: InferenceRequest, trace: tuple[Header, ...]) -> bytes:
        """Send `request`, with the headers of its trace; the first bytes of a stream, or the whole of any other answer.

        Raises GatewayError for what is the client's own fault, AttemptFailed for what is the worker's.
        """
        body = request.body_for(self.worker.address.served_model)
        headers = ((b"x-request-id", request.id.encode()), *trace)
        try:
            connection = self.connection = await self._upstream.send(request.route, headers, body)
        except ConnectFailed as error:
            raise AttemptFailed(
                Fault.REFUSED, WorkerLost(f"No worker could be reached: {error}", retry_after_s=1)
            ) from None
        begun = await _first_bytes(request, connection)
        self.has_begun = True
        return begun

    @property
    def is_stream(self) -> bool:
        """Whether the answer, which has begun, is a stream of events."""
        return self.open_connection.headers[b"content-type"].startswith(SSE_TYPE)

    @property
    def open_connection(self) -> Connection:
        """The connection of an answer that has begun."""
        assert self.connection is not None  # noqa: S101 - it has begun
        return self.connection


async def _first_bytes(request: InferenceRequest, connection: Connection) -> bytes:
    """The first bytes of a stream, or the whole of any other answer. Raises GatewayError or AttemptFailed."""
    try:
        await connection.read_head()
        if connection.status == 200 and connection.headers.get(b"content-type", b"").startswith(SSE_TYPE):
            body = await _begun_stream(connection)
            late = late_status(body)
            if late is None:
                return body
            status, body = late
        else:
            body = await _whole_body(connection)
            status = connection.status
    except UpstreamBadResponse as error:
        raise AttemptFailed(Fault.GARBAGE, error) from None
    except WorkerLost as error:
        error.retry_after_s = 1
        raise AttemptFailed(Fault.CUT if connection.has_body_begun else Fault.LOST, error) from None
    except GatewayError as error:
        raise AttemptFailed(Fault.TIMEOUT, error) from None
    if status != 200:
        raise refusal(
            status,
            body,
            route=request.route,
            model=request.resolved_model,
            retry_after=connection.headers.get(b"retry-after"),
        )
    if not connection.headers.get(b"content-type", b"").startswith(JSON_TYPE):
        raise AttemptFailed(Fault.GARBAGE, UpstreamBadResponse("The worker's answer is not JSON."))
    return body


async def _begun_stream(connection: Connection) -> bytes:
    begun = await connection.read()
    if not begun:
        raise WorkerLost("The worker ended its answer before it began.")
    return begun


async def _whole_body(connection: Connection) -> bytes:
    parts = []
    size = 0
    while part := await connection.read():
        size += len(part)
        if size > WHOLE_ANSWER_MAX_BYTES:
            raise UpstreamBadResponse("The worker's answer is too large.")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def usage_of(body: bytes) -> TokenUsage | None:
    try:
        return usage_of_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise AttemptFailed(Fault.GARBAGE, UpstreamBadResponse("The worker's answer is not JSON.")) from None
