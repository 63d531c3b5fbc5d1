"""Of several replicas' limits for an adaptive worker one counts, and all know which."""

from __future__ import annotations

import redis

from app.admission import ledger
from tests.integration.admission.driving import LEASE_US, Clock, Replica
from tests.integration.admission.fleet import PREFIX, Dump, until
from tests.integration.admission.fleet import replica as running_replica
from tests.processes import Valkey


def slots(url: str) -> int:
    return Dump(url).slots["w"]


async def test_the_first_by_name_steers_and_the_others_are_told(valkey: Valkey) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        Clock(client)
        async with Replica(valkey.url, "a") as first, Replica(valkey.url, "b") as second:
            body, _ = await second.sync({"w": 30}, limits={"w": 30})
            assert (body.steered, slots(valkey.url)) == ([], 30)
            body, _ = await first.sync({"w": 10}, limits={"w": 10})
            assert (body.steered, slots(valkey.url)) == ([], 10)
            body, _ = await second.sync({"w": 30}, limits={"w": 30})
            assert (body.steered, slots(valkey.url)) == ([("w", 10)], 10)


async def test_who_cannot_use_the_worker_does_not_steer(valkey: Valkey) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        Clock(client)
        async with Replica(valkey.url, "a") as first, Replica(valkey.url, "b") as second:
            await first.sync({"w": 10}, limits={"w": 10})
            await second.sync({"w": 30}, limits={"w": 30})
            await first.sync({"w": 0}, limits={"w": 10})
            assert slots(valkey.url) == 30
            body, _ = await second.sync({"w": 30}, limits={"w": 30})
            assert body.steered == []


async def test_a_dead_steersman_is_followed_by_the_next(valkey: Valkey) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        clock = Clock(client)
        async with Replica(valkey.url, "a") as first, Replica(valkey.url, "b") as second:
            await first.sync({"w": 10}, limits={"w": 10})
            for _ in range(4):
                clock.move(LEASE_US // 3)
                await second.sync({"w": 30}, limits={"w": 30})
            assert slots(valkey.url) == 10
            await second.call(ledger.reap())
            assert slots(valkey.url) == 30
            assert client.hkeys(f"{PREFIX}limit:w") == [b"b"]


async def test_a_worker_without_limits_has_the_most_that_anyone_sees(valkey: Valkey) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        Clock(client)
        async with Replica(valkey.url, "a") as first, Replica(valkey.url, "b") as second:
            await first.sync({"w": 10})
            await second.sync({"w": 30})
            assert slots(valkey.url) == 30


async def test_running_replicas_agree_within_a_renewal(valkey: Valkey) -> None:
    async with running_replica(valkey.url, {}) as one, running_replica(valkey.url, {}) as two:
        first, second = sorted((one, two), key=lambda admission: admission.roster.name)
        second.set_slots("w", 30, limit=30)
        first.set_slots("w", 12, limit=12)
        await until(lambda: second.steered == {"w": 12})
        assert first.steered == {}
        assert slots(valkey.url) == 12
