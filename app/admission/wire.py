"""Commands and their replies over one connection to a Redis server.

redis-py makes the connection: address, TLS, credentials. From then on its transport is read here, in the callback in
which bytes arrive and by the parser that redis-py itself uses: its own way (a stream, a task step for each read, a
timeout for each call) costs half as much CPU again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import hiredis
from redis.asyncio import Connection
from redis.exceptions import ResponseError

_MORE = object()


class Wire(asyncio.Protocol):
    """One exchange at a time, from one task. One that does not end well ends the connection, so that no reply can
    reach another caller.
    """

    def __init__(self, connection: Connection) -> None:
        """Takes over from `connection`, which is connected, and on which nothing is owed; it is not connected then."""
        self._loop = asyncio.get_running_loop()
        self._parser = hiredis.Reader(replyError=ResponseError, notEnoughData=_MORE)
        self._replies: list[Any] = []
        self._owed = 0
        self._until = 0.0
        self._waiter: asyncio.Future[list[Any]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # There is no public way to it. The writer is kept because it would close the transport if it were collected.
        writer, connection._writer = connection._writer, None  # noqa: SLF001
        assert writer is not None  # noqa: S101 - connected
        self._writer = writer
        self._transport: asyncio.WriteTransport = writer.transport
        self._transport.set_protocol(self)

    async def exchange(self, commands: Sequence[bytes], until: float) -> list[Any]:
        """The replies to `commands`, in their order; what the server says is an error is a ResponseError among them.

        Raises OSError when the connection is lost or its bytes are no replies, of that TimeoutError when they have not
        come by `until`, on the event loop's clock. What is sent is not held back for a slow server: the next exchange
        waits for this one.
        """
        if self._transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self._replies, self._owed, self._until = [], len(commands), until
        self._waiter = self._loop.create_future()
        if self._timer is None:  # one that an earlier exchange left behind is moved when it fires
            self._timer = self._loop.call_at(until, self._check_time)
        self._transport.writelines(commands)
        try:
            return await self._waiter
        except BaseException:
            self.close()
            raise
        finally:
            self._waiter = None

    def close(self) -> None:
        """Drop the connection, without a word. Closing twice is closing once."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._transport.abort()

    def _check_time(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if self._loop.time() < self._until:
            self._timer = self._loop.call_at(self._until, self._check_time)
        else:
            self._break(TimeoutError("no answer in time"))

    def _break(self, error: Exception) -> None:
        self._transport.abort()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    # -- what the event loop calls ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        try:
            while (reply := self._parser.gets()) is not _MORE:
                self._replies.append(reply)
        except hiredis.ProtocolError:
            self._break(ConnectionAbortedError("the server's answer is not Redis's protocol"))
            return
        if len(self._replies) > self._owed or self._waiter is None:
            self._break(ConnectionAbortedError("the server answers what it was not asked"))
        elif len(self._replies) == self._owed and not self._waiter.done():
            self._waiter.set_result(self._replies)

    def connection_lost(self, exc: Exception | None) -> None:
        self._break(exc or ConnectionResetError("the server closed the connection"))
