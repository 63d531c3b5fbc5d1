"""One response on its connection: written by ASGI's `send`, or, without that detour, by `Response` itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

Header = tuple[bytes, bytes]

RESPONSE = "sluice.response"

_CLOSE = (b"connection", b"close")
_CHUNKED = (b"transfer-encoding", b"chunked")


class Response:
    """The response to one request, whoever writes it.

    `send_whole`, or `begin` and `end`, do what two or more calls of `send` do, in one write and without looking at
    each header again: their names and values must be known to be well-formed. They do nothing once the client is gone.
    """

    __slots__ = ("_cycle", "_is_framed", "_write")

    def __init__(self, cycle: RequestResponseCycle, write: Callable[[bytes], None], *, is_framed: bool) -> None:
        """`write` sends bytes to the client. `is_framed`: it knows chunks, as HTTP/1.1 has them."""
        self._cycle = cycle
        self._write = write
        self._is_framed = is_framed

    @property
    def has_begun(self) -> bool:
        """Whether its head has been sent."""
        return self._cycle.response_started

    def add_header(self, name: bytes, value: bytes) -> None:
        """Send this header with it, also if it is an error's or the framework's own."""
        self._cycle.default_headers = [*self._cycle.default_headers, (name, value)]

    async def send_whole(self, headers: Sequence[Header], body: bytes) -> None:
        """Status 200 and all of the body."""
        if await self._starts():
            head = self._head([*headers, (b"content-length", b"%d" % len(body))])
            self._write(head + body)
            self._complete()

    async def begin(self, headers: Sequence[Header], part: bytes) -> None:
        """Status 200 and the first part of a body whose length nobody knows yet."""
        if await self._starts():
            head = self._head([*headers, _CHUNKED] if self._is_framed else headers)
            self._write(head + (b"%x\r\n%b\r\n" % (len(part), part) if self._is_framed else part))

    def end(self, trailers: Sequence[Header] = ()) -> None:
        """The body that began is whole. A client of HTTP/1.0 learns it by the connection's end, and no trailers."""
        if self._cycle.disconnected:
            return
        if self._is_framed:
            self._write(b"0\r\n%b\r\n" % _lines(trailers))
        self._complete()

    async def _starts(self) -> bool:
        cycle = self._cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if cycle.disconnected:
            return False
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        return True

    def _head(self, headers: Sequence[Header]) -> bytes:
        cycle = self._cycle
        headers = [*cycle.default_headers, *headers]
        if _CLOSE in headers:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            headers.append(_CLOSE)
        return b"HTTP/1.1 200 OK\r\n%b\r\n" % _lines(headers)

    def _complete(self) -> None:
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()


def _lines(headers: Sequence[Header]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def response_of(scope: Scope) -> Response:
    response: Response = scope[RESPONSE]
    return response


class EndedByClose:
    """An answer to a client of HTTP/1.0, which knows no chunks: without a length, the connection's end is its end."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._is_counted = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._is_counted = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not self._is_counted:
                self._cycle.chunked_encoding = False
        elif not self._is_counted:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)


class JoinedWrites:
    """A transport that holds a response head of ASGI's back until the next write, at the latest until the loop turns.

    `lingers` is asked before a close whether the other side may go on sending for a while. Everything but `write`,
    `close` and `is_closing` is the transport's own.
    """

    def __init__(self, transport: asyncio.Transport, lingers: Callable[[], bool]) -> None:
        self._transport = transport
        self._lingers = lingers
        self._is_lingering = False
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

    def write_through(self, data: bytes) -> None:
        """As `write`, of what need not wait for more."""
        self._flush()
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._is_lingering or self._transport.is_closing()

    def close(self) -> None:
        self._flush()
        if self.is_closing():
            return
        if self._transport.can_write_eof() and self._lingers():
            self._is_lingering = True
            self._transport.write_eof()
        else:
            self._transport.close()

    def _flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head)
