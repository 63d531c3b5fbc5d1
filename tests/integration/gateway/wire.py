"""A client that is nothing but a socket: it can stop reading, hang up in every way, and see how an answer ends."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

READ_TIMEOUT_S = 30.0
JSON = {"content-type": "application/json"}


class Wire:
    """One connection. Every read has a deadline and raises TimeoutError after it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def send_slowly(self, data: bytes, pause_s: float) -> None:
        """Send byte by byte, with a pause after each."""
        for byte in data:
            await self.send(bytes([byte]))
            await asyncio.sleep(pause_s)

    async def rest_while(self, sending: Coroutine[Any, Any, None]) -> bytes:
        """Everything up to the peer's close, which ends the `sending` that goes on meanwhile."""
        task = asyncio.ensure_future(sending)
        try:
            return await self.rest()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def post(self, path: str, body: Mapping[str, Any] | bytes, headers: Mapping[str, str] = JSON) -> None:
        """Send a whole request; nothing is read."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n{lines}\r\n"
        await self.send(head.encode() + content)

    async def until(self, mark: bytes) -> bytes:
        """Everything up to and with `mark`."""
        return await asyncio.wait_for(self._reader.readuntil(mark), READ_TIMEOUT_S)

    async def exactly(self, count: int) -> bytes:
        """So many bytes. Raises asyncio.IncompleteReadError."""
        return await asyncio.wait_for(self._reader.readexactly(count), READ_TIMEOUT_S)

    async def rest(self, timeout_s: float = READ_TIMEOUT_S) -> bytes:
        """Everything up to the peer's close. Raises ConnectionResetError when that was a reset."""
        return await asyncio.wait_for(self._reader.read(-1), timeout_s)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one answer that declares its length."""
        head = (await self.until(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers["content-length"])
        return int(status.split()[1]), headers, await asyncio.wait_for(self._reader.readexactly(length), READ_TIMEOUT_S)

    @property
    def port(self) -> int:
        """Our end of the connection."""
        port: int = self._writer.get_extra_info("sockname")[1]
        return port

    def half_close(self) -> None:
        """Say that nothing more will be sent (FIN), and go on listening."""
        self._writer.write_eof()

    def reset(self) -> None:
        """Close with a TCP reset."""
        peer = self._writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def connected(url: str, receive_buffer: int | None = None) -> AsyncIterator[Wire]:
    """A connection to the server at `url`; with `receive_buffer` the kernel holds about that many bytes for it.

    Raises ConnectionRefusedError.
    """
    place = urlsplit(url)
    peer = socket.socket()
    peer.setblocking(False)
    if receive_buffer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await asyncio.get_running_loop().sock_connect(peer, (place.hostname, place.port))
    except OSError:
        peer.close()
        raise
    reader, writer = await asyncio.open_connection(sock=peer, limit=4 * 1024 * 1024)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


def dechunked(body: bytes) -> tuple[bytes, bool]:
    """The content of a chunked body as far as it came, and whether it ended as HTTP says it must."""
    content = bytearray()
    while match := re.match(rb"([0-9a-f]+)\r\n", body):
        size, start = int(match[1], 16), match.end()
        if size == 0:
            return bytes(content), body[start:] == b"\r\n"
        content += body[start : start + size]
        body = body[start + size + 2 :]
    return bytes(content), False
