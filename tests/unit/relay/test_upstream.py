"""The exchange with a worker, against a server that sends exactly the bytes a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop

from app.catalogue import WorkerAddress
from app.errors import UpstreamBadResponse, UpstreamStalled, UpstreamTimeout, WorkerLost
from app.relay.upstream import BUFFER_MAX_BYTES, ConnectFailed, Connection, Upstream
from app.settings import Relay as Limits
from app.workers.worker import Progress
from tests.ports import free_port
from tests.stepping import Line, SteppingLoop

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


class Script:
    """A server that answers each request with the next of the given byte strings; counts its connections."""

    def __init__(self, *answers: bytes, then_close: bool = False) -> None:
        self.answers = list(answers)
        self.then_close = then_close
        self.connections = 0
        self.port = 0

    @asynccontextmanager
    async def running(self, **limits: float) -> AsyncIterator[Upstream]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        upstream = Upstream(WorkerAddress(f"127.0.0.1:{self.port}", "127.0.0.1", self.port, "m", 1), Limits(**limits))
        try:
            yield upstream
        finally:
            upstream.close()
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                writer.write(self.answers.pop(0))
                await writer.drain()
            if not self.then_close:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def exchange_with(upstream: Upstream, path: str, body: bytes) -> AsyncIterator[Connection]:
    connection = await upstream.send(path, (), body)
    try:
        yield connection
    finally:
        upstream.end(connection)


async def read_all(upstream: Upstream) -> bytes:
    async with exchange_with(upstream, "/v1/chat/completions", b"{}") as connection:
        await connection.read_head()
        parts = []
        while part := await connection.read():
            parts.append(part)
        return b"".join(parts)


async def test_a_framed_answer_and_its_connection_used_again() -> None:
    script = Script(OK + b"content-length: 2\r\n\r\n{}", OK + b"transfer-encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n\r\n")
    async with script.running() as upstream:
        assert await read_all(upstream) == b"{}"
        assert await read_all(upstream) == b"[]"
    assert script.connections == 1


async def test_an_interim_answer_is_passed_over() -> None:
    script = Script(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 2\r\n\r\n{}")
    async with script.running() as upstream:
        assert await read_all(upstream) == b"{}"


async def test_a_connection_that_says_close_is_not_used_again() -> None:
    script = Script(OK + b"connection: close\r\ncontent-length: 2\r\n\r\n{}", OK + b"content-length: 2\r\n\r\n{}")
    async with script.running() as upstream:
        await read_all(upstream)
        await read_all(upstream)
    assert script.connections == 2


async def test_bytes_after_the_answer_are_never_another_requests_answer() -> None:
    script = Script(
        OK + b"content-length: 2\r\n\r\n{}" + OK + b"content-length: 4\r\n\r\nevil", OK + b"content-length: 2\r\n\r\n[]"
    )
    async with script.running() as upstream:
        assert await read_all(upstream) == b"{}"
        assert await read_all(upstream) == b"[]"
    assert script.connections == 2


async def test_an_exchange_that_is_left_in_the_middle_takes_its_connection_with_it() -> None:
    script = Script(OK + b"content-length: 10\r\n\r\nhalf", OK + b"content-length: 2\r\n\r\n[]")
    async with script.running() as upstream, asyncio.timeout(10):
        async with exchange_with(upstream, "/", b"{}") as connection:
            assert await connection.read() == b"half"
        assert await read_all(upstream) == b"[]"
    assert script.connections == 2


@pytest.mark.parametrize(
    "late", [b"x", b"\r\n", OK + b"content-length: 4\r\n\r\nevil", OK + b"content-length: 99\r\n\r\n"]
)
def test_bytes_that_come_while_nothing_is_asked_end_the_connection(late: bytes) -> None:
    loop, line = SteppingLoop(), Line()
    connection = Connection(loop, Limits(), Progress())
    connection.connection_made(line)
    connection.start(b"", b"")
    connection.data_received(OK + b"content-length: 2\r\n\r\n{}")
    assert connection.finish()
    assert connection.is_open
    connection.data_received(late)
    assert (connection.is_open, line.closed) == (False, True)
    loop.close()


@pytest.mark.parametrize(
    "answer",
    [OK + b"content-length: 10\r\n\r\n{}", OK + b"transfer-encoding: chunked\r\n\r\n5\r\nab", b"", OK, OK + b"\r\n{}"],
)
async def test_an_answer_cut_short_is_never_whole(answer: bytes) -> None:
    async with Script(answer, then_close=True).running() as upstream:
        with pytest.raises(WorkerLost):
            await read_all(upstream)


async def test_what_came_before_a_break_is_delivered_first() -> None:
    async with Script(OK + b"content-length: 10\r\n\r\nhalf", then_close=True).running() as upstream:
        async with exchange_with(upstream, "/", b"{}") as connection:
            assert await connection.read() == b"half"
            with pytest.raises(WorkerLost):
                await connection.read()


@pytest.mark.parametrize(
    "answer", [b"\x00\x01garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"]
)
async def test_what_is_not_http_is_a_bad_response(answer: bytes) -> None:
    async with Script(answer).running() as upstream:
        with pytest.raises(UpstreamBadResponse):
            await read_all(upstream)


async def test_headers_without_end_are_a_bad_response() -> None:
    async with Script(OK + b"x: " + b"y" * 200_000).running() as upstream:
        with pytest.raises(UpstreamBadResponse):
            await read_all(upstream)


async def test_silence_before_the_first_byte() -> None:
    async with Script(OK[:10]).running(first_byte_timeout_s=0.05) as upstream:
        with pytest.raises(UpstreamTimeout):
            await read_all(upstream)


async def test_the_timer_that_an_exchange_leaves_is_moved_for_the_next_one() -> None:
    script = Script(OK + b"content-length: 2\r\n\r\n{}", b"")
    async with script.running(first_byte_timeout_s=1) as upstream, asyncio.timeout(30):
        assert await read_all(upstream) == b"{}"
        await asyncio.sleep(0.3)  # the timer is under way while nothing is
        began = asyncio.get_running_loop().time()
        with pytest.raises(UpstreamTimeout):
            await read_all(upstream)
        assert asyncio.get_running_loop().time() - began >= 0.99
    assert script.connections == 1


async def test_headers_that_dribble_are_no_first_byte() -> None:
    ended = asyncio.Event()

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        with suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b"x: y\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()
        ended.set()

    server = await asyncio.start_server(dribble, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    upstream = Upstream(WorkerAddress("w", "127.0.0.1", port, "m", 1), Limits(first_byte_timeout_s=0.1))
    async with server, asyncio.timeout(30):
        with pytest.raises(UpstreamTimeout):
            await read_all(upstream)
        await ended.wait()
    upstream.close()


async def test_silence_inside_an_answer() -> None:
    async with Script(OK + b"content-length: 10\r\n\r\nhalf").running(gap_timeout_s=0.05) as upstream:
        with pytest.raises(UpstreamStalled):
            await read_all(upstream)


async def test_an_answer_that_never_ends_ends() -> None:
    async with Script(OK + b"content-length: 10\r\n\r\nhalf").running(
        total_timeout_s=0.05, gap_timeout_s=0.04
    ) as upstream:
        with pytest.raises(UpstreamStalled):
            await read_all(upstream)


def test_an_answer_that_keeps_coming_ends_at_the_limit_of_a_whole_one() -> None:
    """In time that is not real: some of it every 50 s for an hour, and never a gap of the 60 s that are too long."""
    loop = SteppingLoop()
    connection = Connection(loop, Limits(), Progress())
    connection.connection_made(Line())

    def come(data: bytes) -> None:
        connection.data_received(data)
        connection.take()
        if connection.is_open and loop.time() < 2 * Limits().total_timeout_s:
            loop.call_later(50.0, come, b"1\r\nx\r\n")

    async def listened() -> float:
        ended = loop.create_future()
        connection.start(b"", b"")
        connection.listen(lambda: ended.set_result(loop.time()) if connection.is_over else None)
        loop.call_later(1.0, come, OK + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        return float(await ended)

    assert loop.run_until_complete(listened()) == pytest.approx(Limits().total_timeout_s)
    assert isinstance(connection.failure, UpstreamStalled)
    loop.close()


class ReadLine(Line):
    """Knows whether it is read from."""

    is_read = True

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True


@pytest.mark.parametrize(("size", "leaves_hold"), [(2, True), (2, False), (2 * BUFFER_MAX_BYTES, False)])
def test_a_connection_that_was_not_read_from_at_the_end_is_read_from_again(size: int, leaves_hold: bool) -> None:
    """A client that did not keep up, or an answer of which not all was taken: what comes next has to be heard."""
    loop, line = SteppingLoop(), ReadLine()
    connection = Connection(loop, Limits(), Progress())
    connection.connection_made(line)
    connection.start(b"", b"")
    connection.hold(size == 2)
    connection.data_received(OK + b"content-length: %d\r\n\r\n" % size + b"x" * size)
    assert not line.is_read
    if leaves_hold:
        connection.hold(False)
    assert connection.finish()
    assert line.is_read
    connection.abort()
    loop.close()


async def test_nobody_listens() -> None:
    port = free_port()
    upstream = Upstream(WorkerAddress(f"127.0.0.1:{port}", "127.0.0.1", port, "m", 1), Limits())
    with pytest.raises(ConnectFailed):
        await upstream.send("/", (), b"{}")


class LateLoop(asyncio.SelectorEventLoop):
    """One that tells of a new connection only when it has been lost again."""

    async def create_connection(self, *arguments: Any, **options: Any) -> Any:
        transport, protocol = await super().create_connection(*arguments, **options)
        while not transport.is_closing():
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        return transport, protocol


@pytest.mark.parametrize("new_loop", [LateLoop, uvloop.new_event_loop])
def test_a_worker_that_hangs_up_as_soon_as_it_is_connected_to(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """However far the hang-up has come when the request is sent: never a request that waits for its time to run out."""

    async def asked() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.transport.abort(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(WorkerAddress(f"127.0.0.1:{port}", "127.0.0.1", port, "m", 1), Limits())
        async with server, asyncio.timeout(20):
            for _ in range(50):
                with pytest.raises((ConnectFailed, WorkerLost)):
                    await read_all(upstream)
        upstream.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(asked())


async def test_a_connection_that_is_being_closed_is_not_used_again() -> None:
    """The loop closes it some turns before it says that it is lost."""
    script = Script(OK + b"content-length: 2\r\n\r\n{}", OK + b"content-length: 2\r\n\r\n[]")
    async with script.running() as upstream:
        assert await read_all(upstream) == b"{}"
        upstream._idle[0]._transport.close()
        assert await read_all(upstream) == b"[]"
    assert script.connections == 2


async def test_a_reader_that_does_not_read_pauses_the_worker() -> None:
    total = 4 * 1024 * 1024
    async with Script(OK + b"content-length: %d\r\n\r\n" % total + b"x" * total).running() as upstream:
        async with exchange_with(upstream, "/", b"{}") as connection:
            connection = connection
            first = await connection.read()
            held = 0
            for _ in range(200):  # everything that would come without a pause comes within these turns of the loop
                await asyncio.sleep(0)
                held = max(held, connection.buffered_bytes)
            assert held <= 5 * BUFFER_MAX_BYTES
            received = len(first)
            while part := await connection.read():
                received += len(part)
            assert received == total


async def test_a_cancelled_read_closes_the_connection() -> None:
    async with Script(OK + b"content-length: 10\r\n\r\n", OK + b"content-length: 2\r\n\r\n{}").running() as upstream:
        task = asyncio.create_task(read_all(upstream))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await task
        assert await read_all(upstream) == b"{}"
