"""One client connection: uvicorn's httptools protocol, with three things added that ASGI has no words for.

A request finds its connection in its scope. It can ask to be called when the client leaves, instead of keeping a task
that waits in `receive`, and it can close the connection at once, whatever is still unsent. The response head and the
first part of the body leave in one write: uvicorn writes them apart, a system call and a packet more for every answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CONNECTION = "sluice.connection"


class ClientConnection(HttpToolsProtocol):
    """See the module. `on_disconnect` is called at most once, from the event loop, when the connection is lost."""

    on_disconnect: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedWrites(transport))  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        callback, self.on_disconnect = self.on_disconnect, None
        if callback is not None:
            callback()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]

    def abort(self) -> None:
        """Close now. An orderly close would wait, for ever, until the client has read what is buffered."""
        self.transport.abort()


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
