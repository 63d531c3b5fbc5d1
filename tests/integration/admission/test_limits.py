"""Limits of tenants across replicas: exact while the ledger is there, a static share while it is not."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import redis

from app.admission.controller import RedisAdmission
from app.admission.roster import QueuedLease
from app.admission.ticket import Ticket
from app.errors import InsufficientQuota, RateLimitExceeded
from app.inference import Band, Spent, TokenUsage
from app.tenant import Limits, Tenant
from tests.fakes.fault_proxy import FaultProxy
from tests.integration.admission.driving import SCRIPTS, Clock
from tests.integration.admission.fleet import Dump, hasty, is_told, queued, replica, until
from tests.processes import Valkey

SLOTS = 10_000
MINUTE_S = 60


def asked(limits: Limits, prompt_bytes: int = 0, max_tokens: int | None = 0, name: str = "t") -> Ticket:
    tenant = Tenant(name, limits=limits)
    return Ticket("r", Band.DEFAULT, ("w",), "m", tenant, prompt_bytes, max_tokens)


async def granted(admission: RedisAdmission, *tickets: Ticket) -> list[QueuedLease]:
    """The leases of those that their limits let pass; the others were told 429."""
    outcomes = await asyncio.gather(*(admission.admit(ticket) for ticket in tickets), return_exceptions=True)
    leases = [outcome for outcome in outcomes if isinstance(outcome, QueuedLease)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, RateLimitExceeded | InsufficientQuota)]
    assert len(leases) + len(refused) == len(tickets), outcomes
    return leases


def spent(url: str, limit: str, tenant: str = "t") -> int:
    return Dump(url).spent.get(f"{limit}:{tenant}", {}).get("sum", 0)


async def test_three_replicas_never_exceed_a_limit_and_never_refuse_what_has_room(valkey: Valkey) -> None:
    """In any minute no more than the limit; and whoever is refused, the last 61 s (a sixtieth more) had no room.

    The server's clock is the test's, so that many minutes pass.
    """
    limit, chance = 50, random.Random(3)  # noqa: S311 - a test's dice
    with redis.Redis.from_url(valkey.url) as client:
        clock = Clock(client)
        begun_us, taken, refused = clock.now_us, list[float](), 0
        async with (
            replica(valkey.url, SLOTS, SCRIPTS, replicas=3, lease_s=15) as one,
            replica(valkey.url, SLOTS, SCRIPTS, replicas=3, lease_s=15) as two,
            replica(valkey.url, SLOTS, SCRIPTS, replicas=3, lease_s=15) as three,
        ):
            for _ in range(150):
                now_s = (clock.now_us - begun_us) / 1e6
                counts = [chance.randrange(12) for _ in range(3)]
                burst = [
                    granted(admission, *[asked(Limits(requests_per_min=limit))] * count)
                    for admission, count in zip((one, two, three), counts, strict=True)
                ]
                leases = [lease for found in await asyncio.gather(*burst) for lease in found]
                taken += [now_s] * len(leases)
                assert sum(now_s - at < MINUTE_S for at in taken) <= limit
                if len(leases) < sum(counts):
                    refused += sum(counts) - len(leases)
                    assert sum(now_s - at < MINUTE_S * 61 / 60 for at in taken) == limit
                for lease in leases:
                    lease.release(TokenUsage(1, 1))
                clock.move(chance.choice((100_000, 1_000_000, 3_000_000)))
    assert len(taken) > 2 * limit
    assert refused > limit


async def test_tokens_are_reserved_on_arrival_and_settled_at_the_end(valkey: Valkey) -> None:
    limits = Limits(tokens_per_min=1000)
    async with replica(valkey.url, SLOTS) as one, replica(valkey.url, SLOTS) as two:
        first = await one.admit(asked(limits, 400, 500))  # 400 bytes are a hundred tokens, as far as is known
        assert [tuple(allowance)[:3] for allowance in first.allowances] == [("tokens_per_min", 1000, 400)]
        with pytest.raises(RateLimitExceeded, match="Limit 1000, Used 600, Requested 600"):
            await two.admit(asked(limits, 400, 500))
        first.release(TokenUsage(prompt_tokens=100, completion_tokens=50))
        await until(lambda: spent(valkey.url, "tokens_per_min") == 150)
        second = await two.admit(asked(limits, 400, 500))
        assert second.allowances[0].remaining == 250
        assert Dump(valkey.url).live == {"t": Dump(valkey.url).reserved}


@pytest.mark.parametrize(
    ("ended", "tokens", "requests"),
    [
        (TokenUsage(90, 40), 130, 1),
        (Spent(None, 7), 107, 1),  # a stream that broke, or was left: its prompt as estimated, its chunks
        (Spent(None, None), 600, 1),  # given up before anything came: nobody knows
        (Spent(0, 0), 0, 1),  # the client's own fault
        (None, 0, 0),  # never served
    ],
    ids=["completed", "left", "given_up", "bad_request", "failed"],
)
async def test_what_a_request_has_cost_in_the_end(
    valkey: Valkey, ended: TokenUsage | Spent | None, tokens: int, requests: int
) -> None:
    limits = Limits(tokens_per_min=1000, requests_per_min=10, output_tokens_per_min=900)
    async with replica(valkey.url, SLOTS) as one:
        lease = await one.admit(asked(limits, 400, 500))
        assert spent(valkey.url, "tokens_per_min") == 600
        lease.release(ended)
        await until(lambda: not Dump(valkey.url).reserved)
        assert (spent(valkey.url, "tokens_per_min"), spent(valkey.url, "requests_per_min")) == (tokens, requests)


async def test_who_waits_holds_its_reservation_and_who_expires_gets_it_back(valkey: Valkey) -> None:
    limits = Limits(requests_per_min=2)
    async with replica(valkey.url, 1) as one:
        held = await one.admit(asked(limits))
        (waiting,) = await queued(one, asked(limits))
        assert await granted(one, asked(limits)) == []
        assert len(Dump(valkey.url).tickets) == 1
        waiting.cancel()
        await until(lambda: spent(valkey.url, "requests_per_min") == 1)
        (again,) = await queued(one, asked(limits))
        held.release(TokenUsage(1, 1))
        (await again).release(TokenUsage(1, 1))
        await until(lambda: not Dump(valkey.url).reserved)
        assert spent(valkey.url, "requests_per_min") == 2


async def test_a_move_reserves_nothing_and_the_end_settles_once(valkey: Valkey) -> None:
    async with replica(valkey.url, {"w": 1, "v": 1}) as one:
        lease = await one.admit(asked(Limits(requests_per_min=1, tokens_per_min=100), max_tokens=60))
        await lease.move(("v",))
        assert spent(valkey.url, "tokens_per_min") == 60
        lease.release(TokenUsage(5, 5))
        lease.release(TokenUsage(5, 5))
        await until(lambda: not Dump(valkey.url).reserved)
        assert (spent(valkey.url, "tokens_per_min"), spent(valkey.url, "requests_per_min")) == (10, 1)


async def test_so_many_at_once_over_all_replicas(valkey: Valkey) -> None:
    async with replica(valkey.url, 1) as one, replica(valkey.url, 1) as two:
        held = await one.admit(asked(Limits(concurrent=2)))
        (waiting,) = await queued(two, asked(Limits(concurrent=2)))
        with pytest.raises(RateLimitExceeded, match="concurrent") as refused:
            await one.admit(asked(Limits(concurrent=2)))
        assert refused.value.retry_after_s == 1
        held.release(None)
        (await waiting).release(None)
        await until(lambda: not Dump(valkey.url).live)
        await one.admit(asked(Limits(concurrent=2)))


async def test_what_can_never_be_met_is_said_so_and_takes_nothing(valkey: Valkey) -> None:
    async with replica(valkey.url, SLOTS) as one:
        with pytest.raises(RateLimitExceeded, match=r"too large.*Limit 100, Requested 500") as refused:
            await one.admit(asked(Limits(tokens_per_min=100), max_tokens=500))
        assert refused.value.should_retry is False
        assert not one.roster.reserved
        assert not Dump(valkey.url).spent
        await one.admit(asked(Limits(tokens_per_min=100), prompt_bytes=1_000_000, max_tokens=None))  # only a guess


async def test_the_day_is_a_quota_that_clients_do_not_retry(valkey: Valkey) -> None:
    async with replica(valkey.url, SLOTS) as one:
        await one.admit(asked(Limits(tokens_per_day=100, requests_per_min=5), max_tokens=80))
        with pytest.raises(InsufficientQuota, match=r"tokens per day.*in 24h\d+m") as refused:
            await one.admit(asked(Limits(tokens_per_day=100, requests_per_min=5), max_tokens=80))
        assert refused.value.should_retry is False
        assert spent(valkey.url, "requests_per_min") == 1


async def test_a_limit_of_another_configuration_counts_at_once(valkey: Valkey) -> None:
    async with replica(valkey.url, SLOTS) as one:
        assert len(await granted(one, *[asked(Limits(requests_per_min=3))] * 5)) == 3
        assert len(await granted(one, *[asked(Limits(requests_per_min=5))] * 5)) == 2
        assert await granted(one, asked(Limits(requests_per_min=4))) == []


async def test_tenants_do_not_share_limits(valkey: Valkey) -> None:
    async with replica(valkey.url, SLOTS) as one:
        await granted(one, *[asked(Limits(requests_per_min=3), name="a")] * 5)
        assert len(await granted(one, *[asked(Limits(requests_per_min=3), name="b")] * 5)) == 3


# What breaks


@pytest.fixture
async def proxy(valkey: Valkey) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(valkey.port) as running:
        yield running


async def test_a_lost_reply_neither_doubles_nor_loses_a_reservation(valkey: Valkey, proxy: FaultProxy) -> None:
    limits = Limits(requests_per_min=100, tokens_per_min=10_000)
    async with replica(proxy.url, SLOTS, lease_s=15) as one, replica(valkey.url, SLOTS, lease_s=15):
        held = await one.admit(asked(limits, max_tokens=50))
        proxy.drop_replies(1)
        held.release(TokenUsage(5, 5))  # the settlement's reply is lost: it is told again
        await until(lambda: proxy.replies_dropped == 1)
        await until(lambda: one.is_degraded)
        await until(lambda: not one.is_degraded)
        await until(lambda: is_told(valkey.url, one) and not Dump(valkey.url).reserved)
        assert (spent(valkey.url, "requests_per_min"), spent(valkey.url, "tokens_per_min")) == (1, 10)
        (await one.admit(asked(limits, max_tokens=50))).release(TokenUsage(5, 5))
        await until(lambda: spent(valkey.url, "tokens_per_min") == 20)


async def test_a_reservation_whose_reply_is_lost_is_made_once(valkey: Valkey, proxy: FaultProxy) -> None:
    limits = Limits(requests_per_min=100, tokens_per_min=10_000)
    async with replica(proxy.url, 0, lease_s=15, no_worker_timeout_s=20) as one, replica(valkey.url, 0):
        await until(lambda: is_told(valkey.url, one))
        proxy.drop_replies(1)
        waiting = asyncio.create_task(one.admit(asked(limits, max_tokens=50)))
        await until(lambda: one.is_degraded)
        await until(lambda: not one.is_degraded)
        await until(lambda: is_told(valkey.url, one) and len(Dump(valkey.url).tickets) == 1)
        assert (spent(valkey.url, "requests_per_min"), spent(valkey.url, "tokens_per_min")) == (1, 50)
        one.set_slots("w", 1)
        (await waiting).release(TokenUsage(5, 5))
        await until(lambda: not Dump(valkey.url).reserved)
        assert (spent(valkey.url, "requests_per_min"), spent(valkey.url, "tokens_per_min")) == (1, 10)


async def test_a_dead_replicas_requests_no_longer_count_as_running(valkey: Valkey, proxy: FaultProxy) -> None:
    async with replica(valkey.url, SLOTS) as other:
        async with replica(hasty(proxy.url), SLOTS, lease_s=1.5) as dying:
            await dying.admit(asked(Limits(concurrent=1, requests_per_min=10)))
            assert await granted(other, asked(Limits(concurrent=1, requests_per_min=10))) == []
            proxy.fall_silent()
            await until(lambda: not Dump(valkey.url).reserved)
            assert len(await granted(other, asked(Limits(concurrent=1, requests_per_min=10)))) == 1
            assert spent(valkey.url, "requests_per_min") == 2  # what was taken comes back with the window


async def test_a_flushed_ledger_begins_its_windows_anew_but_knows_who_runs(valkey: Valkey) -> None:
    limits = Limits(requests_per_min=3, concurrent=3)
    async with replica(valkey.url, SLOTS) as one:
        held = await granted(one, *[asked(limits)] * 3)
        with redis.Redis.from_url(valkey.url) as client:
            client.flushall()
        await until(lambda: len(Dump(valkey.url).reserved) == 3)
        assert spent(valkey.url, "requests_per_min") == 0
        with pytest.raises(RateLimitExceeded, match="concurrent"):
            await one.admit(asked(limits))
        held[0].release(TokenUsage(1, 1))
        assert len(await granted(one, asked(limits))) == 1


async def test_without_the_ledger_each_replica_gives_its_share(own_valkey: Valkey) -> None:
    limits = Limits(requests_per_min=7, concurrent=100)
    async with (
        replica(hasty(own_valkey.url), SLOTS, replicas=3) as one,
        replica(hasty(own_valkey.url), SLOTS, replicas=3) as two,
    ):
        await asyncio.to_thread(own_valkey.kill)
        await until(lambda: one.is_degraded and two.is_degraded)
        assert len(await granted(one, *[asked(limits)] * 9)) == 2
        assert len(await granted(two, *[asked(limits)] * 9)) == 2


async def test_who_ran_before_the_ledger_went_counts_against_the_share(own_valkey: Valkey) -> None:
    async with replica(hasty(own_valkey.url), SLOTS, replicas=2) as one:
        held = await granted(one, *[asked(Limits(concurrent=4))] * 2)
        await asyncio.to_thread(own_valkey.kill)
        await until(lambda: one.is_degraded)
        assert await granted(one, asked(Limits(concurrent=4))) == []
        held[0].release(TokenUsage(1, 1))
        assert len(await granted(one, asked(Limits(concurrent=4)))) == 1


async def test_what_was_given_without_the_ledger_is_told_to_it(valkey: Valkey, proxy: FaultProxy) -> None:
    limits = Limits(requests_per_min=10)
    async with replica(hasty(proxy.url), SLOTS, replicas=2, lease_s=15) as one:
        await granted(one, *[asked(limits)] * 2)
        proxy.fall_silent()
        await until(lambda: one.is_degraded)
        given = await granted(one, *[asked(limits)] * 9)
        assert len(given) == 5
        for lease in given[:2]:  # those that have ended are told as a sum, those that still run by their ids
            lease.release(TokenUsage(1, 1))
        proxy.heal()
        await until(lambda: not one.is_degraded and is_told(valkey.url, one))
        assert spent(valkey.url, "requests_per_min") == 7
        assert len(await granted(one, *[asked(limits)] * 9)) == 3


async def test_who_ends_while_the_ledger_is_gone_is_settled_when_it_is_back(valkey: Valkey, proxy: FaultProxy) -> None:
    limits = Limits(requests_per_min=10, tokens_per_min=1000, concurrent=4)
    async with replica(hasty(proxy.url), SLOTS, lease_s=15) as one:
        lease = await one.admit(asked(limits, max_tokens=500))
        proxy.fall_silent()
        await until(lambda: one.is_degraded)
        lease.release(TokenUsage(5, 5))
        assert one.roster.held == {}
        proxy.heal()
        await until(lambda: not one.is_degraded and is_told(valkey.url, one))
        await until(lambda: not Dump(valkey.url).reserved)
        assert (spent(valkey.url, "requests_per_min"), spent(valkey.url, "tokens_per_min")) == (1, 10)


async def test_an_unheard_settlement_is_told_when_the_ledger_is_back(valkey: Valkey, proxy: FaultProxy) -> None:
    async with replica(proxy.url, SLOTS, lease_s=15) as one:
        lease = await one.admit(asked(Limits(tokens_per_min=1000), max_tokens=500))
        lease.release(TokenUsage(5, 5))
        proxy.reset()  # before it can be sent
        await until(lambda: one.is_degraded)
        await until(lambda: not one.is_degraded and is_told(valkey.url, one))
        assert (spent(valkey.url, "tokens_per_min"), Dump(valkey.url).reserved) == (10, set())
