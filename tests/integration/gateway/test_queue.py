"""Slots and the queue: no worker gets more than it has slots for, and whoever cannot wait is told when to return."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.conftest import ROOMY, SHORT, House, ShortTempered
from tests.integration.gateway.running import GatewayProcess

pytestmark = pytest.mark.asyncio(loop_scope="session")


def asking(gateway: GatewayProcess, name: str, **fields: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(gateway.http.post(CHAT, json=chat(model=name, **fields)))


async def test_a_worker_never_holds_more_than_its_slots(house: House) -> None:
    """This worker refuses a third request itself, as vLLM does with `--max-num-queued-reqs`; it never has to."""
    before = (await house.gateway.scrape()).sum("sluice_retries_total", reason="saturated")
    asked = [asking(house.gateway, "strict", nonce=f"n{n}", max_tokens=2, stream=n % 2 == 0) for n in range(30)]
    answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200] * 30
    assert all(f" n{n}-0" in answer.text for n, answer in enumerate(answers))
    assert (await house.gateway.scrape()).sum("sluice_retries_total", reason="saturated") == before
    async with httpx.AsyncClient(base_url=house.strict.url, timeout=30) as direct:
        house.strict.hold()
        held = [asyncio.create_task(direct.post(CHAT, json=chat(model="strict"))) for _ in range(2)]
        await house.strict.wait_for(open=2)
        assert (await direct.post(CHAT, json=chat(model="strict"))).status_code == 503
        house.strict.resume()
        await asyncio.gather(*held)


async def test_slots_and_tickets_are_shown(house: House) -> None:
    house.narrow.hold()
    asked = [asking(house.gateway, "narrow") for _ in range(4)]
    await house.gateway.metric("sluice_queue_depth", 3, band="default")
    assert house.narrow.counts.open == 1
    worker = f"127.0.0.1:{house.narrow.port}"
    scrape = await house.gateway.scrape()
    assert scrape.sum("sluice_slots_held", worker=worker) == 1
    assert scrape.sum("sluice_slots_capacity", worker=worker) == 1
    assert scrape.sum("sluice_requests_in_flight") == 4
    house.narrow.resume()
    answers = await asyncio.gather(*asked)
    waits = sorted(float(answer.headers["x-sluice-queue-ms"]) for answer in answers)
    assert waits[1] > 2 * waits[0]


async def order_of(worker: FakeWorker, count: int) -> list[str]:
    return [received.body["nonce"] for received in worker.requests[-count:]]


async def test_the_highest_band_goes_first_and_within_it_who_came_first(house: House) -> None:
    house.narrow.hold()
    asked = [asking(house.gateway, "narrow", nonce="holder")]
    await house.narrow.wait_for(open=1)
    for depth, (nonce, tier) in enumerate(
        [("flex", "flex"), ("first", "default"), ("second", "auto"), ("urgent", "priority")], start=1
    ):
        asked.append(asking(house.gateway, "narrow", nonce=nonce, service_tier=tier))
        await house.gateway.metric("sluice_queue_depth", depth)
    house.narrow.resume()
    assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 5
    assert await order_of(house.narrow, 5) == ["holder", "urgent", "first", "second", "flex"]


async def test_a_full_queue_says_so_at_once(house: House) -> None:
    limit = ROOMY["admission"]["queue_limit"]
    house.narrow.hold()
    asked = [asking(house.gateway, "narrow", nonce=f"n{n}", max_tokens=1) for n in range(limit + 1)]
    await house.gateway.metric("sluice_queue_depth", limit)
    answer = await asking(house.gateway, "narrow")
    assert answer.status_code == 503
    assert (answer.json()["error"]["code"], answer.json()["error"]["type"]) == ("overloaded", "server_error")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    house.narrow.resume()
    assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * (limit + 1)


async def test_who_waited_too_long_is_told(short: ShortTempered) -> None:
    short.narrow.hold()
    holder = asking(short.gateway, "narrow")
    await short.narrow.wait_for(open=1)
    seen = short.narrow.counts.seen
    expired = (await short.gateway.scrape()).sum("sluice_requests_total", outcome="expired")
    begun = time.monotonic()
    answer = await asking(short.gateway, "narrow")
    assert time.monotonic() - begun >= SHORT["admission"]["queue_timeout_s"]
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    short.narrow.resume()
    await holder
    assert short.narrow.counts.seen == seen
    await short.gateway.metric("sluice_requests_total", expired + 1, outcome="expired", code="queue_timeout")
