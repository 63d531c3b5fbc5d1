"""A small HTTP/1.1 server on httptools whose handler may also break the protocol on purpose.

One `Connection` per socket, one request of it at a time, as uvicorn does. The handler gets an `Exchange`: orderly
answers (`answer`, `open_stream`/`chunk`/`end`) and the means to be disorderly (`raw`, `close`, `reset`).
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import httptools

Handler = Callable[["Exchange"], Awaitable[None]]
Header = tuple[str, str]

PIPELINE_LIMIT = 16
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it was read from the socket; `target` is the raw request target, header names are lower case."""

    method: str
    target: str
    headers: tuple[Header, ...]
    body: bytes
    keep_alive: bool

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        """The body as JSON. Raises json.JSONDecodeError."""
        return json.loads(self.body)


class Exchange:
    """One request and the writing of its answer."""

    def __init__(self, connection: Connection, request: Request) -> None:
        self._connection = connection
        self.request = request
        self.keep_alive = request.keep_alive
        # With this set the handler runs to its end after the client has left; what it writes goes nowhere.
        self.ignores_abort = False

    @property
    def client_left(self) -> bool:
        """Whether the connection is gone, and not by our hand."""
        return self._connection.lost and not self._connection.severed

    def head(self, status: int, headers: Iterable[Header]) -> bytes:
        """Status line and headers in uvicorn's order: date and server first."""
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"date: {formatdate(usegmt=True)}",
            "server: uvicorn",
        ]
        lines += [f"{name}: {value}" for name, value in headers]
        if not self.keep_alive:
            lines.append("connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    async def answer(self, status: int, body: bytes, content_type: str = JSON, headers: Iterable[Header] = ()) -> None:
        """Send a whole answer with an honest content-length; an empty body has no content-type, as in vLLM."""
        typed = [("content-type", content_type)] if body else []
        extra = list(headers)
        before = [header for header in extra if header[0] == "allow"]
        after = [header for header in extra if header[0] != "allow"]
        head = self.head(status, [*before, ("content-length", str(len(body))), *typed, *after])
        await self.raw(head if self.request.method == "HEAD" else head + body)

    async def open_stream(self, content_type: str, headers: Iterable[Header] = ()) -> None:
        """Send status 200 and the headers of a chunked answer."""
        fields = [("content-type", content_type), *headers, ("transfer-encoding", "chunked")]
        await self.raw(self.head(200, fields))

    async def chunk(self, data: bytes) -> None:
        """Send one HTTP chunk."""
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """End a chunked answer in order."""
        await self.raw(b"0\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        """Write bytes as they are and wait until the socket takes more. A lost connection swallows them."""
        await self._connection.write(data)

    def close(self) -> None:
        """Flush what was written, then close the connection (FIN) without ending the answer."""
        self.keep_alive = False
        self._connection.close()

    def reset(self) -> None:
        """Close at once with a TCP reset; unread bytes may be lost on the way."""
        self.keep_alive = False
        self._connection.reset()


class Connection(asyncio.Protocol):
    """Reads requests off one socket and hands them to the handler one by one."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._pending: deque[Request] = deque()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._task: asyncio.Task[None] | None = None
        self._exchange: Exchange | None = None
        self.lost = False
        self.severed = False
        self._begin_message()

    def _begin_message(self) -> None:
        self._target = b""
        self._headers: list[Header] = []
        self._body: list[bytes] = []

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.connections.add(self)
        self._server.changed()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._writable.set()
        self._pending.clear()
        self._server.connections.discard(self)
        self._server.changed()
        if self._task is not None and not (self._exchange is not None and self._exchange.ignores_abort):
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            body = b"Invalid HTTP request received."
            if self._transport is not None:
                self._transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            self.close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # the parser's side

    def on_message_begin(self) -> None:
        self._begin_message()

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        request = Request(
            method=self._parser.get_method().decode("ascii"),
            target=self._target.decode("latin-1"),
            headers=tuple(self._headers),
            body=b"".join(self._body),
            keep_alive=self._parser.should_keep_alive(),
        )
        if len(self._pending) >= PIPELINE_LIMIT:
            self.close()
            return
        self._pending.append(request)
        if self._task is None:
            self._task = self._server.run(self._serve())

    # the handler's side

    async def _serve(self) -> None:
        try:
            while self._pending and not self.lost:
                self._exchange = Exchange(self, self._pending.popleft())
                await self._server.handle(self._exchange)
                if not self._exchange.keep_alive:
                    self.close()
        except BaseException:
            self.close()
            raise
        finally:
            self._task = None

    async def write(self, data: bytes) -> None:
        if self.lost or self._transport is None or self._transport.is_closing():
            return
        self._transport.write(data)
        await self._writable.wait()

    def close(self) -> None:
        self.severed = True
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        self.severed = True
        if self._transport is None or self._transport.is_closing():
            return
        peer = self._transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


class Server:
    """The listener and everything it accepted; `changed` is called when a connection comes or goes.

    `stop` leaves no socket and no task behind.
    """

    def __init__(self, handle: Handler, changed: Callable[[], None]) -> None:
        self.handle = handle
        self.changed = changed
        self.connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []
        self._listener: asyncio.Server | None = None

    def run(self, serving: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a connection's handler as a task that `stop` ends."""
        task = asyncio.get_running_loop().create_task(serving)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failures.append(failure)

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen and return the port; port 0 lets the kernel choose. Raises OSError when it is taken."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: Connection(self), host, port, backlog=2048, ssl=tls)
        bound: int = self._listener.sockets[0].getsockname()[1]
        return bound

    def sever(self) -> None:
        """Stop listening and reset every connection, as the kernel does for a killed process."""
        self.close_listener()
        for connection in list(self.connections):
            connection.reset()

    def close_listener(self) -> None:
        """Refuse new connections; open ones go on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def stop(self) -> None:
        """Sever everything and wait for the handlers to end. Raises the first defect that a handler died of."""
        self.sever()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._failures:
            raise self._failures.pop(0)
