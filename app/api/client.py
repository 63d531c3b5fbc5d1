"""The client at the other end of a request: what it sends, and whether it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from starlette.types import Receive, Scope

from app.errors import GatewayError, RequestTooLarge, UnsupportedMediaType
from app.served import Served
from app.settings import Limits
from app.telemetry.account import CLIENT_GONE, CLIENT_STALLED


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The whole JSON body. Raises UnsupportedMediaType, RequestTooLarge, ClientGone.

    A body that is declared too large is refused before a byte of it is read. How long it may take is the connection's
    to judge: it refuses the request and this one is told that its client has gone.
    """
    _check_headers(scope, limits)
    limit = limits.body_bytes
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message["body"]
        _check_size(len(body), limit)
        return body
    parts = bytearray()
    while message["type"] == "http.request":
        parts += message.get("body", b"")
        _check_size(len(parts), limit)
        if not message.get("more_body", False):
            return bytes(parts)
        message = await receive()
    raise ClientGone


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise RequestTooLarge(f"The request body is larger than {limit} bytes.")


def _check_headers(scope: Scope, limits: Limits) -> None:
    content_type = b""
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value
        elif name == b"content-length" and value.isdigit():
            _check_size(int(value), limits.body_bytes)
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise UnsupportedMediaType("A compressed request body is not accepted.")
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType("The request body must be sent as content-type: application/json.")


class Connection(Protocol):
    """What a watch needs of the server's connection to the client."""

    on_disconnect: Callable[[], None] | None
    on_stall: Callable[[], None] | None
    paused_since: float | None

    def abort(self) -> None: ...


class ClientWatch:
    """Cancels the block when the client leaves, or reads nothing for too long, and then raises ClientGone.

    At every stage: while the request waits in the queue, while the worker thinks, for answers that stream and for
    answers that don't. A client that does not read is disconnected. When the gateway stops before the block has ended,
    or the key `key_id` that the request came with is revoked, it is cancelled too, and raises Draining or KeyRevoked.
    The cancellation's message is the code of what is raised.
    """

    __slots__ = ("_connection", "_reason", "_served", "_stall_s", "_task", "_timer", "key_id")

    def __init__(self, connection: Connection, stall_s: float, served: Served, key_id: str | None) -> None:
        self._connection = connection
        self._stall_s = stall_s
        self._served = served
        self.key_id = key_id
        self._reason: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - inside a coroutine there is one
        self._task = task
        self._connection.on_disconnect = self._leave
        self._connection.on_stall = self._watch_stall
        if self._connection.paused_since is not None:
            self._watch_stall()
        self._served.opened(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._served.closed(self)
        self._connection.on_disconnect = self._connection.on_stall = None
        if self._timer is not None:
            self._timer.cancel()
        if self._reason is not None:
            self._task.uncancel()
            if isinstance(error, asyncio.CancelledError):
                raise self._reason from None

    def _watch_stall(self) -> None:
        """The client does not keep up: no timer runs as long as it does."""
        if self._timer is None:
            self._timer = self._task.get_loop().call_later(self._stall_s, self._check_stall)

    def _check_stall(self) -> None:
        self._timer = None
        since = self._connection.paused_since
        if since is None:
            return
        loop = self._task.get_loop()
        left_s = since + self._stall_s - loop.time()
        if left_s <= 0:
            self._end(ClientGone(), CLIENT_STALLED)
            self._connection.abort()
        else:
            self._timer = loop.call_later(left_s, self._check_stall)

    def cut(self, error: GatewayError) -> None:
        """See `served.Cuttable`."""
        self._end(error, error.code)

    def _leave(self) -> None:
        self._end(ClientGone(), CLIENT_GONE)

    def _end(self, reason: Exception, code: str) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel(code)
