"""A client's connection: what it waits for and how long it may be idle, in time that is not real."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from app.api.protocol import ClientConnection
from app.api.response import Response, response_of
from app.settings import Limits
from tests.stepping import Line, SteppingLoop

KEEP_ALIVE_S = 75
REQUEST = b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def loop() -> Iterator[SteppingLoop]:
    loop = SteppingLoop()
    yield loop
    loop.close()


def opened(app: ASGIApp) -> tuple[ClientConnection, Line]:
    """A connection to `app`, and what is written to its client."""
    config = Config(app, timeout_keep_alive=KEEP_ALIVE_S, lifespan="off", log_config=None)
    connection = ClientConnection(limits=Limits(), config=config, server_state=ServerState(), app_state={})
    line = Line()
    connection.connection_made(line)
    return connection, line


def answering(after_s: float) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(after_s)
        await response_of(scope).send_whole([], b"{}")

    return app


async def closed_at(app: ASGIApp, *asked_at: float) -> float:
    """When a connection is closed whose client asks at these times, counted from now."""
    connection, line = opened(app)
    loop = asyncio.get_running_loop()
    for at in asked_at:
        loop.call_at(at, connection.data_received, REQUEST)
    while not line.closed:
        assert loop.time() < 1000.0
        await asyncio.sleep(0.5)
    assert line.written.count(b"200 OK") == len(asked_at)
    connection.connection_lost(None)
    return loop.time()


@pytest.mark.parametrize(
    ("asked_at", "closed"), [((1.0,), 76.0), ((1.0, 61.0), 136.0), ((1.0, 61.0, 121.0, 181.0), 256.0)]
)
def test_an_idle_connection_is_closed(loop: SteppingLoop, asked_at: tuple[float, ...], closed: float) -> None:
    assert closed <= loop.run_until_complete(closed_at(answering(0.0), *asked_at)) <= closed + 0.5


def test_a_connection_is_not_idle_while_an_answer_is_owed(loop: SteppingLoop) -> None:
    """The timer that the first answer set fires while the second one is awaited, and is set anew after it."""
    assert 243.0 <= loop.run_until_complete(closed_at(answering(68.0), 0.0, 100.0)) <= 243.5


async def whole(response: Response) -> None:
    await response.send_whole([], b"{}")


async def begun(response: Response) -> None:
    await response.begin([], b"{}")


@pytest.mark.parametrize("answer", [whole, begun])
def test_an_answer_waits_until_the_client_has_read_what_came_before(
    loop: SteppingLoop, answer: Callable[[Response], Awaitable[None]]
) -> None:
    """Else a client that asks ahead and reads nothing would have all of its answers kept for it."""

    told: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = response_of(scope)
        told.append(response.has_begun)
        await answer(response)
        told.append(response.has_begun)

    async def asked() -> None:
        connection, line = opened(app)
        connection.pause_writing()
        connection.data_received(REQUEST)
        await asyncio.sleep(10.0)
        assert (bytes(line.written), told) == (b"", [False])
        connection.resume_writing()
        await asyncio.sleep(0.0)
        await asyncio.sleep(0.0)
        assert line.written.startswith(b"HTTP/1.1 200 OK\r\n")
        assert told == [False, True]
        connection.connection_lost(None)

    loop.run_until_complete(asked())
