"""Commands and replies over one connection to a real server: in order, in time, and nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import hiredis
import pytest
from redis.asyncio import Redis as Client
from redis.exceptions import ResponseError

from app import settings
from app.admission.wire import Wire
from app.redis_server import RedisServer
from tests.fakes.fault_proxy import FaultProxy
from tests.processes import Valkey

SOON_S = 0.2
LONG_S = 10.0


def packed(*words: str) -> bytes:
    command: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # it is annotated for a single word
    return command


async def opened(url: str) -> Wire:
    return Wire(await RedisServer(settings.Redis(url=url)).connected())


@pytest.fixture
async def wire(valkey: Valkey) -> AsyncIterator[Wire]:
    wire = await opened(valkey.url)
    yield wire
    wire.close()


async def asked(wire: Wire, *commands: bytes, within_s: float = LONG_S) -> list[object]:
    return await wire.exchange(commands, asyncio.get_running_loop().time() + within_s)


async def is_over(wire: Wire) -> None:
    """Nothing is sent any more on a connection that is out of step."""
    with pytest.raises(OSError, match="closed"):
        await asked(wire, packed("ECHO", "again"))


async def test_replies_come_in_the_order_of_commands_and_errors_are_replies(wire: Wire) -> None:
    large = "x" * 1_000_000
    got = await asked(wire, packed("ECHO", "a"), packed("NO", "SUCH"), packed("ECHO", large), packed("GET", "none"))
    assert (got[0], got[2], got[3]) == (b"a", large.encode(), None)
    assert isinstance(got[1], ResponseError)
    assert str(got[1]).startswith("ERR ")
    for number in range(50):
        assert await asked(wire, packed("ECHO", str(number))) == [str(number).encode()]


async def test_a_silent_server_is_given_up_in_time(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    assert await asked(wire, packed("ECHO", "a"), within_s=SOON_S) == [b"a"]
    await asyncio.sleep(SOON_S / 2)  # the timer of the first exchange is under way while the second one waits
    began = loop.time()
    async with asyncio.timeout(LONG_S):
        with pytest.raises(TimeoutError, match="no answer"):
            await asked(wire, packed("BLPOP", "none", "0"), within_s=SOON_S)
    assert loop.time() - began >= SOON_S
    await is_over(wire)


async def test_an_exchange_that_is_cut_short_ends_the_connection(wire: Wire) -> None:
    cut = asyncio.create_task(asked(wire, packed("BLPOP", "none", "1"), packed("ECHO", "late")))
    await asyncio.sleep(0)
    cut.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cut
    await is_over(wire)


async def test_what_was_not_asked_for_ends_the_connection(wire: Wire, valkey: Valkey) -> None:
    await asked(wire, packed("SUBSCRIBE", "channel"))
    async with Client.from_url(valkey.url) as client:
        assert await client.publish("channel", "to nobody who waits") == 1
        async with asyncio.timeout(LONG_S):
            while await client.pubsub_numsub("channel") != [(b"channel", 0)]:  # until the server has seen it closed
                await asyncio.sleep(0.01)
    await is_over(wire)


async def test_a_lost_connection_is_told_at_once(valkey: Valkey) -> None:
    async with FaultProxy(valkey.port) as proxy:
        wire = await opened(proxy.url)
        waiting = asyncio.create_task(asked(wire, packed("BLPOP", "none", "0"), within_s=3600.0))
        await asyncio.sleep(0)
        proxy.reset()
        async with asyncio.timeout(LONG_S):
            with pytest.raises(ConnectionError):
                await waiting
        await is_over(wire)
        wire.close()
