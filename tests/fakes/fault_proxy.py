"""A small TCP proxy that breaks connections on purpose: latency, silence, lost replies, resets."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from contextlib import suppress
from types import TracebackType
from typing import Self

CHUNK = 64 * 1024


async def _turns() -> None:
    """Let the event loop do what is due already."""
    for _ in range(10):
        await asyncio.sleep(0)


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and carries bytes to `port` there, as its faults allow.

    `latency_s` delays each direction. While `is_silent`, connections open and nothing passes. While `hangs_up`, a new
    connection is closed at once. Its other faults hold for connections that are open and for those to come. With `tls`
    its clients speak TLS to it, as to a server that does.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._target = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._replies_to_drop = 0
        self._passes = asyncio.Event()
        self._passes.set()
        self.latency_s = 0.0
        self.hangs_up = False
        self.port = 0
        self.replies_dropped = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        await _turns()  # who was accepted last has a task by then
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await _turns()  # transports take one to close

    @property
    def url(self) -> str:
        """As the address of a Redis server."""
        return f"{'redis' if self._tls is None else 'rediss'}://127.0.0.1:{self.port}/0"

    def fall_silent(self) -> None:
        """A partition: bytes are taken and go nowhere."""
        self._passes.clear()

    def heal(self) -> None:
        self._passes.set()

    def drop_replies(self, count: int) -> None:
        """What the server says next, so many times, is lost, and the connection with it."""
        self._replies_to_drop = count

    def reset(self) -> None:
        """RST on every connection."""
        for writer in [*self._writers]:
            sock: socket.socket = writer.get_extra_info("socket")
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._carry(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.hangs_up:
            return
        await self._passes.wait()
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, upstream}
        there = asyncio.create_task(self._pump(reader, upstream, is_reply=False))
        back = asyncio.create_task(self._pump(upstream_reader, writer, is_reply=True))
        try:
            await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writers -= {writer, upstream}
            upstream.transport.abort()
            there.cancel()
            back.cancel()
            await asyncio.gather(there, back, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_reply: bool) -> None:
        while data := await reader.read(CHUNK):
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            await self._passes.wait()
            if is_reply and self._replies_to_drop:
                self._replies_to_drop -= 1
                self.replies_dropped += 1
                return
            writer.write(data)
            await writer.drain()
