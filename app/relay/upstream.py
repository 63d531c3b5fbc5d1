"""The HTTP exchange with a worker: HTTP/1.1 on httptools over a raw asyncio protocol.

A general client costs more CPU per chunk than everything else the gateway does, so this one does only what a relay
needs: one request with a known length, one response framed by content-length or chunks, back-pressure by pausing the
read, connections kept alive. Whatever is not exactly that is an error, and its connection is never used again. TLS is
the event loop's: the same protocol on another transport.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import cast

import httptools

from app.catalogue import WorkerAddress
from app.credentials import tls_failure
from app.errors import GatewayError, UpstreamBadResponse, UpstreamStalled, UpstreamTimeout, WorkerLost
from app.settings import Relay as Limits
from app.workers.worker import Progress

BUFFER_MAX_BYTES = 64 * 1024
HEAD_MAX_BYTES = 64 * 1024

Header = tuple[bytes, bytes]


class ConnectFailed(Exception):
    """No connection to the worker: it never saw the request."""


class Connection(asyncio.Protocol):
    """One connection to a worker; carries one exchange at a time. None of its callbacks waits."""

    __slots__ = (
        "_answered",
        "_buffered",
        "_busy",
        "_error",
        "_gap_timeout_s",
        "_head_bytes",
        "_held",
        "_is_between_chunks",
        "_keeps_alive",
        "_limits",
        "_listener",
        "_longest_sleep_s",
        "_loop",
        "_parser",
        "_parts",
        "_paused",
        "_progress",
        "_since",
        "_started",
        "_timer",
        "_transport",
        "_waiter",
        "has_body_begun",
        "headers",
        "idle_since",
        "is_complete",
        "is_over",
        "passer",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits, progress: Progress) -> None:
        self._loop = loop
        self._limits = limits
        self._progress = progress
        self._longest_sleep_s = min(limits.first_byte_timeout_s, limits.gap_timeout_s, limits.total_timeout_s)
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)  # set before any other callback
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._listener: Callable[[], None] | None = None
        self.passer: Callable[[bytes], bool] | None = None
        """A listener's short way: shown first, as it came on the wire, what arrives between two chunks of a chunked
        body. It says whether that was exactly one whole chunk and is dealt with; then nobody else hears of it."""
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self._parts: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._held = False
        self._error: GatewayError | None = None
        self._gap_timeout_s = self._limits.gap_timeout_s
        self._head_bytes = 0
        self._answered = False
        self._is_between_chunks = False
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.is_complete = False
        self.is_over = False  # no more bytes can come: the exchange is complete, or broke
        self.has_body_begun = False
        self._keeps_alive = False

    # -- what the relay calls --------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether it can carry a request: no longer from when the loop closes it, before it says `connection_lost`."""
        return not self._transport.is_closing()

    @property
    def buffered_bytes(self) -> int:
        """Body bytes that wait to be read; the worker is not read from while they are more than BUFFER_MAX_BYTES."""
        return self._buffered

    @property
    def failure(self) -> GatewayError | None:
        """What broke the latest exchange; None for one that ended well, or that the relay itself gave up."""
        return self._error

    def start(self, head: bytes, body: bytes) -> None:
        """Send a request. The connection must be idle."""
        self._reset()
        self._busy = True
        self._started = self._since = self._loop.time()
        self._transport.writelines((head, body))
        if self._timer is None:  # one that the last exchange left behind comes no later than this one is due
            self._timer = self._loop.call_later(self._longest_sleep_s, self._check_time)

    async def read_head(self) -> None:
        """Wait until `status` and `headers` are known. Raises GatewayError."""
        while not self._answered:
            await self.arrival()

    async def read(self) -> bytes:
        """The body bytes that have come since the last call, waiting for some; empty at the end of the body.

        Raises WorkerLost, UpstreamBadResponse, UpstreamTimeout, UpstreamStalled, after all bytes that came before.
        """
        while (data := self.take()) is None:
            await self.arrival()
        return data

    def take(self) -> bytes | None:
        """As `read`, without waiting: None while nothing has come."""
        if not self._parts:
            if self.is_complete:
                return b""
            if self._error is not None:
                raise self._error
            return None
        parts, self._parts, self._buffered = self._parts, [], 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def arrival(self) -> None:
        """Wait until something comes: bytes, the end, or an error, which is raised."""
        if self._error is not None:
            raise self._error
        self._since = self._loop.time()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Have `listener` called whenever `take` has something new to say, in the callback in which it arrives."""
        self._listener = listener
        self.passer = None
        self._since = self._loop.time()

    def hold(self, is_held: bool) -> None:
        """Stop reading from the worker, or go on: a listener's client does not keep up. The gap limit stands still."""
        self._held = is_held
        self._since = self._loop.time()
        if self.is_open and not (is_held and self.is_complete):
            (self._transport.pause_reading if is_held else self._transport.resume_reading)()

    def finish(self) -> bool:
        """End the exchange. True when the connection may carry another one; otherwise it is closed at once."""
        self._busy = False
        self._listener = self.passer = None
        reusable = self.is_open and self.is_complete and self._error is None and self._keeps_alive
        if not reusable:
            self.abort()
        elif self._held or self._paused:  # or the next answer, and its loss, would never be heard of
            self._transport.resume_reading()
        return reusable

    def abort(self) -> None:
        self._disarm()
        self._transport.abort()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def give_up(self, gap_timeout_s: float) -> None:
        """The worker stalls: end an exchange that it has not begun to answer, be less patient with any other."""
        if not self.has_body_begun:
            self._break(WorkerLost("The worker does not answer any more."))
            return
        self._gap_timeout_s = min(self._gap_timeout_s, gap_timeout_s)
        self._since = self._loop.time()
        self._disarm()
        self._timer = self._loop.call_later(min(self._gap_timeout_s, self._longest_sleep_s), self._check_time)

    def _wake(self) -> None:
        if self._listener is not None:
            self._listener()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def _is_awaited(self) -> bool:
        return self._waiter is not None or (self._listener is not None and not self._held)

    def _break(self, error: GatewayError) -> None:
        if self._error is None and not self.is_complete:
            self._error = error
            self.is_over = True
        self.abort()
        self._wake()

    def _check_time(self) -> None:
        """Enforce the limits. One timer a connection, moved when it fires: cheaper than one for each chunk or exchange.

        Time counts only while the relay waits for the worker; a client that reads slowly is not the worker's fault.
        Headers are no byte of the answer: vLLM sends those of a stream before the request has a place in its engine.
        """
        self._timer = None
        if not self._busy:
            return
        now = self._loop.time()
        limit = self._gap_timeout_s if self.has_body_begun else self._limits.first_byte_timeout_s
        since = self._since if self.has_body_begun else self._started
        waited = now - since if self._is_awaited else 0.0
        left_s = self._limits.total_timeout_s - (now - self._started)
        if left_s <= 0:
            self._break(UpstreamStalled("The answer took longer than a whole answer may."))
        elif waited < limit:
            self._timer = self._loop.call_later(min(limit - waited, left_s, self._longest_sleep_s), self._check_time)
        elif self.has_body_begun:
            self._break(UpstreamStalled("The worker stopped in the middle of its answer."))
        else:
            self._break(UpstreamTimeout("The worker did not begin to answer in time."))

    # -- what the event loop calls ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if not self._busy or self.is_complete:  # bytes that nobody asked for: this connection is out of step
            self.abort()
            return
        self._since = self._progress.heard = self._loop.time()
        passer = self.passer
        if passer is not None and self._is_between_chunks and passer(data):
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._break(UpstreamBadResponse("The worker's answer is not valid HTTP."))
            return
        if self._is_between_chunks and not data.endswith(b"\r\n"):  # the next chunk's size has begun
            self._is_between_chunks = False
        if not self._answered:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_MAX_BYTES:
                self._break(UpstreamBadResponse("The worker's answer has no end of headers."))
                return
        if self._buffered > BUFFER_MAX_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        listener = self._listener
        if listener is not None:
            listener()
        elif self._answered:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._busy:
            self._break(WorkerLost("The worker closed the connection before its answer was complete."))

    # -- what the parser calls -------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.is_complete:
            self._error = UpstreamBadResponse("The worker sent more than one answer.")
            self.is_over = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._answered = True

    def on_body(self, body: bytes) -> None:
        if self._error is None and not self.is_complete:
            self._parts.append(body)
            self._buffered += len(body)
            self.has_body_begun = True

    def on_chunk_header(self) -> None:
        self._is_between_chunks = False

    def on_chunk_complete(self) -> None:
        self._is_between_chunks = True

    def on_message_complete(self) -> None:
        if self.status < 200:  # an interim answer (100 Continue); the real one follows
            self.headers.clear()
            self._answered = False
        else:
            self.is_complete = self.is_over = True
            self._keeps_alive = self._parser.should_keep_alive()  # known only inside this callback


class Upstream:
    """The connections to one worker: opened on demand, kept while idle, closed before the worker would close them."""

    def __init__(self, address: WorkerAddress, limits: Limits, progress: Progress | None = None) -> None:
        self.address = address
        self._limits = limits
        self._progress = progress or Progress()
        self._carrying: set[Connection] = set()
        self._idle: deque[Connection] = deque()
        self._sweep: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def address(self) -> WorkerAddress:
        """Where new connections go, and with which credentials."""
        return self._address

    @address.setter
    def address(self, address: WorkerAddress) -> None:
        self._address = address
        self._fixed = b"host: %s\r\ncontent-type: application/json\r\n" % address.id.encode()
        if address.api_key:
            self._fixed += b"authorization: Bearer %s\r\n" % address.api_key.encode()

    async def send(self, path: str, headers: tuple[Header, ...], body: bytes) -> Connection:
        """Send a POST of JSON; the connection is to be given back by `end`. Raises ConnectFailed."""
        connection = self._take_idle() or await self._connect()
        lines = b"".join([b"%s: %s\r\n" % header for header in headers])
        head = b"POST %s HTTP/1.1\r\n%scontent-length: %d\r\n%s\r\n" % (path.encode(), self._fixed, len(body), lines)
        connection.start(head, body)
        self._carrying.add(connection)
        return connection

    def end(self, connection: Connection) -> None:
        """An exchange is over, well or not."""
        self._carrying.discard(connection)
        if connection.finish():
            self.keep(connection)

    def give_up(self, gap_timeout_s: float) -> None:
        """The worker stalls: break what it has not begun to answer; streams may be silent for so long from now on."""
        for connection in tuple(self._carrying):
            connection.give_up(gap_timeout_s)

    async def refuses(self) -> bool:
        """Whether nothing listens there any more. A connection that succeeds is kept for the next exchange."""
        try:
            connection = await self._connect()
        except ConnectFailed as error:
            return isinstance(error.__cause__, ConnectionRefusedError)
        self.keep(connection)
        return False

    def keep(self, connection: Connection) -> None:
        """Take back a connection that may carry another exchange."""
        if self._is_closed or len(self._idle) >= self._limits.idle_connections_per_worker:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = loop.call_later(self._limits.keepalive_s, self._close_stale)

    def close(self) -> None:
        self._is_closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        while self._idle:
            self._idle.pop().abort()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop, address = asyncio.get_running_loop(), self._address
        try:
            async with asyncio.timeout(self._limits.connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(loop, self._limits, self._progress),
                    address.host,
                    address.port,
                    ssl=address.tls,
                    server_hostname=None if address.tls is None else address.server_name or address.host,
                )
        except TimeoutError:
            raise ConnectFailed(f"no connection within {self._limits.connect_timeout_s} s") from None
        except OSError as error:
            raise ConnectFailed(tls_failure(error) or error.strerror or str(error)) from error
        if not connection.is_open:  # as a proxy does that has nobody behind it
            raise ConnectFailed("it hung up as soon as it was connected to")
        return connection

    def _close_stale(self) -> None:
        loop = asyncio.get_running_loop()
        stale = loop.time() - self._limits.keepalive_s
        while self._idle and (self._idle[0].idle_since <= stale or not self._idle[0].is_open):
            self._idle.popleft().abort()
        oldest = self._idle[0].idle_since if self._idle else None
        self._sweep = None if oldest is None else loop.call_later(max(0.01, oldest - stale), self._close_stale)
