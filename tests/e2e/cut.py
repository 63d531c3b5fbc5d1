"""A wire to a worker that can be cut inside a stream, after an exact number of events."""

from __future__ import annotations

import asyncio
from typing import Self

from tests.ports import free_port

EVENT_END = b"\n\n\r\n"
"""The end of an event that is an HTTP chunk of its own, as vLLM writes them."""


class Wire:
    """Listens for the worker on `target_port` and passes everything on, until its scissors strike."""

    def __init__(self, target_port: int, scissors: Scissors) -> None:
        self.port = free_port()
        self._target_port = target_port
        self._scissors = scissors
        self._near: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._link, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._near:
            writer.transport.abort()
        async with asyncio.timeout(10):
            while self._near:
                await asyncio.sleep(0.01)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._near.add(writer)
        try:
            await self._connect(reader, writer)
        except OSError:  # the worker is gone
            writer.transport.abort()
        finally:
            self._near.discard(writer)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        both = [asyncio.create_task(_pump(reader, far_writer)), asyncio.create_task(self._answers(far_reader, writer))]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        far_writer.transport.abort()
        writer.transport.abort()
        await asyncio.gather(*both, return_exceptions=True)

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = b""
        while data := await reader.read(65536):
            await self._scissors.flows.wait()
            answer = data if data.startswith(b"HTTP/1.1 ") else answer + data
            end = self._scissors.strike(answer)
            writer.write(data if end is None else data[: len(data) - (len(answer) - end)])
            await writer.drain()
            if end is not None:
                writer.close()
                await writer.wait_closed()
                return


class Scissors:
    """Cuts one stream after `after` events, the first that gets so far without being finished; 0 cuts nothing.

    While `flows` is not set, nothing that a worker says arrives, and no connection is cut.
    """

    def __init__(self) -> None:
        self.after = 0
        self.flows = asyncio.Event()
        self.flows.set()

    def strike(self, answer: bytes) -> int | None:
        """How many bytes of `answer` may pass, when it is the one to cut."""
        if not self.after or b"text/event-stream" not in answer or answer.count(EVENT_END) < self.after:
            return None
        end = 0
        for _ in range(self.after):
            end = answer.index(EVENT_END, end) + len(EVENT_END)
        if b'"finish_reason":"' in answer[:end]:
            return None
        self.after = 0
        return end


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
