"""One client connection: uvicorn's httptools protocol, with what ASGI has no words for.

A request finds its connection in its scope. It can ask to be called when the client leaves, instead of keeping a task
that waits in `receive`; it can write parts of a streamed body without waiting, and be told when the client does not
keep up; and it can close the connection at once, whatever is still unsent. The response head and the first part
leave in one write: uvicorn writes them apart, a system call and a packet more for every answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

CONNECTION = "sluice.connection"
RESPONSE = "sluice.response"


class ClientConnection(HttpToolsProtocol):
    """See the module. `on_disconnect` is called at most once, from the event loop, when the connection is lost."""

    on_disconnect: Callable[[], None] | None = None
    paused_since: float | None = None
    """Since when, on the event loop's clock, the client has not kept up with what is written to it."""
    _on_pause: Callable[[bool], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedWrites(transport))  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        callback, self.on_disconnect = self.on_disconnect, None
        if callback is not None:
            callback()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle is not None:
            # The application is a task that has not begun yet.
            self.scope[CONNECTION] = self  # type: ignore[literal-required]
            self.scope[RESPONSE] = ResponseState(self.cycle)  # type: ignore[literal-required]

    def pause_writing(self) -> None:
        super().pause_writing()
        self.paused_since = self.loop.time()
        if self._on_pause is not None:
            self._on_pause(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.paused_since = None
        if self._on_pause is not None:
            self._on_pause(False)

    def on_pause(self, listener: Callable[[bool], None] | None) -> None:
        """See `relay.answer.Sink`."""
        self._on_pause = listener
        if listener is not None and self.paused_since is not None:
            listener(True)

    def write(self, part: bytes) -> None:
        """A part of the body of a response that is streamed, hence chunked: uvicorn has sent its head."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))

    def abort(self) -> None:
        """Close now. An orderly close would wait, for ever, until the client has read what is buffered."""
        self.transport.abort()


class ResponseState:
    """The response to one request, whoever writes it."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def has_begun(self) -> bool:
        """Whether its head has been sent."""
        return self._cycle.response_started

    def add_header(self, name: bytes, value: bytes) -> None:
        """Send this header with it, also if it is an error's or the framework's own."""
        self._cycle.default_headers = [*self._cycle.default_headers, (name, value)]


def connection_of(scope: Scope) -> ClientConnection:
    connection: ClientConnection = scope[CONNECTION]
    return connection


def response_of(scope: Scope) -> ResponseState:
    response: ResponseState = scope[RESPONSE]
    return response


def forget(scope: Scope) -> None:
    """Let go of connection and response at the end of a request: they hold the scope, and only a collector would."""
    del scope[CONNECTION], scope[RESPONSE]


class JoinedWrites:
    """A transport that holds a response head back until the next write, at the latest until the next turn of the loop.

    Everything but `write` and `close` is the transport's own.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._call_soon = asyncio.get_running_loop().call_soon
        self._head: bytes | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head is not None:
            data, self._head = self._head + data, None
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head)
