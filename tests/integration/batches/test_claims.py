"""Claims on a real Valkey: whoever holds one is heard before anybody else can have it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from app import settings
from app.batches.claims import RedisClaims
from tests.processes import Valkey

LEASE_S = 3.0


@dataclass
class Two:
    """Two gateways' claims on one server; `one` holds `line`."""

    valkey: Valkey
    one: RedisClaims
    two: RedisClaims


@pytest.fixture
async def claims(tmp_path: Path) -> AsyncIterator[Two]:
    clock = asyncio.get_running_loop().time
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(Valkey(tmp_path))
        redis = settings.Redis(url=valkey.url, call_timeout_s=10)
        both = [RedisClaims(redis, LEASE_S, clock) for _ in range(2)]
        for one in both:
            stack.push_async_callback(one.close)
        await taken(both[0], "line")
        yield Two(valkey, both[0], both[1])


async def taken(claims: RedisClaims, subject: str) -> None:
    """Wait until it can be claimed."""
    async with asyncio.timeout(30):
        while await claims.take([subject]) != [subject]:
            await asyncio.sleep(0.02)


async def test_what_is_held_is_nobody_elses(claims: Two) -> None:
    assert await claims.two.take(["line", "other"], 2) == ["other"]
    await claims.one.release(["line"])
    assert await claims.two.take(["line"]) == ["line"]


async def test_an_empty_server_hears_who_holds_something_first(claims: Two) -> None:
    claims.valkey.kill()
    claims.valkey.start()
    assert await claims.two.take(["line", "other"], 2) == []
    await claims.one.renew()
    await taken(claims.two, "other")
    await claims.one.renew()
    assert await claims.two.take(["line"]) == []


async def test_who_is_silent_knows_that_it_holds_nothing_before_another_does(claims: Two) -> None:
    assert claims.one.holds("line")
    await taken(claims.two, "line")
    assert not claims.one.holds("line")


async def test_what_was_lost_is_told_and_not_taken_back(claims: Two) -> None:
    await taken(claims.two, "line")
    await claims.two.renew()
    await claims.one.renew()
    assert not claims.one.holds("line")


async def test_what_was_lost_is_not_let_go_for_another(claims: Two) -> None:
    await taken(claims.two, "line")
    await claims.one.release(["line"])  # it has not heard
    assert await claims.one.take(["line"]) == []
