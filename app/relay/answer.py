"""The answer of a worker, from its first byte to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from app.errors import GatewayError, WorkerLost
from app.inference import InferenceRequest
from app.relay.dialect import TOKEN, dialect_of
from app.relay.passage import Passage, Way
from app.relay.sse import EventSplitter, data_of
from app.relay.upstream import Connection
from app.telemetry.account import Account

AFTER_LAST_EVENT_S = 1.0
LESSONS = 16
"""How often a stream is looked at for what its chunks have in common: some have nothing."""

JSON_TYPE = b"application/json"
SSE_TYPE = b"text/event-stream"


class Sink(Protocol):
    """Where an answer is poured: a client's connection."""

    def write(self, part: bytes) -> None:
        """Send, or buffer, `part`. Never waits."""

    def chunk_writer(self) -> Callable[[bytes], None] | None:
        """What sends a part that is framed already, as one chunk of HTTP/1.1; None for a client that knows none."""

    def on_pause(self, listener: Callable[[bool], None] | None) -> None:
        """Have `listener` told when the client does not keep up (True), and when it does again (False)."""


class Held(Protocol):
    """What an answer holds until it is left."""

    def close(self) -> None:
        """Give it back. Never waits; once."""


class Begun(Held, Protocol):
    """An attempt whose answer, a stream, has begun."""

    @property
    def open_connection(self) -> Connection: ...


class Answer:
    """A worker's answer, from its first byte on. `next` yields it; closing it gives the connection back.

    `is_whole` tells, at the end, whether the client has got everything that the worker meant to send. `resume` says
    whether it would go on elsewhere if it broke, where that is wanted, and what came of it once it broke; else it is
    empty.
    """

    __slots__ = ("_held", "content_type", "is_streamed", "is_whole", "resume")

    def __init__(self, held: Held | None, content_type: bytes, *, is_streamed: bool) -> None:
        self._held = held
        self.content_type = content_type
        self.is_streamed = is_streamed
        self.is_whole = False
        self.resume = ""

    async def next(self) -> bytes:
        """The next bytes for the client, as soon as there are any; empty at the end."""
        raise NotImplementedError

    async def pour(self, sink: Sink) -> None:
        """Write the rest to `sink`, as `next` would yield it."""
        while part := await self.next():
            sink.write(part)

    def close(self) -> None:
        """Give back what it holds. Closing twice is closing once."""
        held, self._held = self._held, None
        if held is not None:
            held.close()


class WholeAnswer(Answer):
    """An answer that came in one piece; its connection is free already. `body` until it is taken."""

    __slots__ = ("body",)

    def __init__(self, body: bytes) -> None:
        super().__init__(None, JSON_TYPE, is_streamed=False)
        self.body = body

    async def next(self) -> bytes:
        body, self.body = self.body, b""
        self.is_whole = True
        return body


@dataclass(frozen=True, slots=True)
class BegunStream:
    """A worker's stream from its first byte on: whose it is, and what was read of it already."""

    held: Begun
    begun: bytes


class StreamedAnswer(Answer):
    """A stream of events, relayed whole and unchanged.

    The one event that may be left out is the usage that only the gateway asked for. A stream that breaks ends in one
    error event and `is_whole` stays false; no finish reason and no end marker is ever made up. `stream` is what it was
    made of.
    """

    __slots__ = (
        "_account",
        "_begun",
        "_clock",
        "_connection",
        "_dialect",
        "_ended",
        "_has_error",
        "_hides_usage",
        "_lessons",
        "_splitter",
        "_way",
        "stream",
    )

    def __init__(
        self, stream: BegunStream, request: InferenceRequest, account: Account, clock: Callable[[], float]
    ) -> None:
        super().__init__(stream.held, stream.held.open_connection.headers[b"content-type"], is_streamed=True)
        self._dialect = dialect_of(request.route)
        self._hides_usage = request.hides_usage
        self._account = account
        self._clock = clock
        self._follow(stream)

    def _follow(self, stream: BegunStream) -> None:
        """Take the events from `stream` from now on."""
        self.stream = stream
        self._held = stream.held
        self._connection = stream.held.open_connection
        self._begun = stream.begun
        self._splitter = EventSplitter()
        self._way: Way | None = None
        self._lessons = LESSONS
        self._ended = False
        self._has_error = False

    async def next(self) -> bytes:
        while not self._ended:
            part = self._digest()
            if part:
                return part
            if part is None:
                await self._connection.arrival()
        await self._await_end()
        return b""

    async def pour(self, sink: Sink) -> None:
        """See `Answer.pour`. Each part is written in the callback in which it arrives: waking a task for every chunk
        of every stream costs as much again as relaying it.
        """
        done = asyncio.get_running_loop().create_future()
        connection, write = self._connection, sink.write

        def failed(error: Exception) -> None:
            if not done.done():
                done.set_exception(error)

        def arrived() -> None:
            try:
                while not self._ended and (part := self._digest()) is not None:
                    if part:
                        write(part)
                    if not (connection.is_over or connection.buffered_bytes):  # all that has come was taken
                        break
            except Exception as error:  # noqa: BLE001 - a callback: the error belongs to who awaits `done`
                failed(error)
            if self._ended and not done.done():
                done.set_result(None)

        connection.listen(arrived)
        if write_chunk := sink.chunk_writer():
            self._way = Way(write_chunk, self._account.token, failed, self._clock)
        sink.on_pause(connection.hold)
        try:
            arrived()
            await done
        except asyncio.CancelledError:
            if not self.is_whole:  # else the client has all of it, as in `_await_end`
                raise
        finally:
            self._way = None
            sink.on_pause(None)
            connection.listen(None)
        await self._await_end()

    def _learn(self, event: bytes, way: Way) -> None:
        """Have what is like `event`, a token, pass from now on as it comes."""
        self._lessons -= 1
        if passage := Passage.like(event, way):
            self._connection.passer = passage.take

    def _digest(self) -> bytes | None:
        """What the next bytes from the worker mean for the client; None while none have come."""
        try:
            data = self._begun or self._connection.take()
            self._begun = b""
            if data is None:
                return None
            if not data:
                raise WorkerLost("The worker ended its answer before it was complete.")
            return self._pass(data)
        except GatewayError as error:
            return self._break(error)

    def _pass(self, data: bytes) -> bytes:
        """What of `data` goes to the client."""
        only = self._splitter.only_data(data)
        if only is not None and self._dialect.read(only) is TOKEN:  # nearly always, so it has a short way
            self._account.token(self._clock())
            if self._way is not None and self._lessons:
                self._learn(data, self._way)
            return data
        self._connection.passer = None  # the splitter may have something pending
        return self._take(self._splitter.feed(data))

    def _take(self, events: list[bytes]) -> bytes:
        """What of `events` goes to the client; notes tokens, usage and the end."""
        now = self._clock()
        relayed = []
        for event in events:
            meaning = self._dialect.read(data_of(event))
            if meaning.has_token:
                self._account.token(now)
            if meaning.usage is not None:
                self._account.usage = meaning.usage
            if meaning.is_error:
                self._has_error = True
                self._account.fail(WorkerLost("The worker reported an error inside its stream."))
            if not (meaning.only_usage and self._hides_usage):
                relayed.append(event)
            if meaning.is_last:
                self._ended = self.is_whole = True
                break
        return relayed[0] if len(relayed) == 1 else b"".join(relayed)

    def _break(self, error: GatewayError) -> bytes:
        """The stream ends here, in one error event: a worker that sent one itself has told the client already."""
        self._ended = True
        if self._has_error:
            return b""
        self._account.fail(error)
        return self._dialect.error_event(error)

    async def _await_end(self) -> None:
        """After the last event the body still has to end, or the connection could not be used again.

        The client lacks nothing then, so whoever cancels the request gets its good end at once instead.
        """
        if not self.is_whole or self._connection.is_complete:
            return
        try:
            async with asyncio.timeout(AFTER_LAST_EVENT_S):
                await self._connection.read()
        except (TimeoutError, GatewayError, asyncio.CancelledError):
            return
