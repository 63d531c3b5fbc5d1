"""Rows F36, F39 and F41 of the fault matrix: real gateway processes on one Valkey, and one of them dies or sleeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.fakes.worker import FakeWorker
from tests.integration.admission.fleet import Dump
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model
from tests.integration.gateway.running import until as until_told
from tests.processes import Valkey

LEASE_S = 3.0
FREED_S = LEASE_S * 20 / 15  # the promise of 20 s for leases of 15 s


class Replicas:
    """Two gateways in front of one worker with two slots."""

    def __init__(self, url: str, worker: FakeWorker, one: GatewayProcess, two: GatewayProcess) -> None:
        self.url = url
        self.worker = worker
        self.one = one
        self.two = two

    def ask(self, gateway: GatewayProcess, nonce: str, **headers: str) -> asyncio.Task[httpx.Response]:
        body = chat(model="m", nonce=nonce, max_tokens=1)
        return asyncio.create_task(gateway.http.post(CHAT, json=body, headers=headers))

    async def fill(self, gateway: GatewayProcess) -> list[asyncio.Task[httpx.Response]]:
        """Hold both slots, through this gateway."""
        self.worker.hold()
        asked = [self.ask(gateway, f"holder{index}") for index in range(2)]
        await self.worker.wait_for(open=2)
        return asked

    async def waits(self, count: int) -> None:
        async def wait() -> bool:
            return len(Dump(self.url).tickets) == count

        await until_told(wait, f"{count} tickets")

    async def holds(self, count: int) -> None:
        async def hold() -> bool:
            return len(Dump(self.url).leases) == count

        await until_told(hold, f"{count} leases")

    def seen(self) -> list[str]:
        return [received.body["nonce"] for received in self.worker.requests if "nonce" in received.body]


@asynccontextmanager
async def running(url: str, directory: Path, lease_s: float, slots: int = 2) -> AsyncIterator[Replicas]:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(FakeWorker("m"))
        gateways = []
        for name in ("one", "two"):
            (directory / name).mkdir()
            gateway = GatewayProcess(
                directory / name,
                [model("m", worker, max_concurrency=slots)],
                redis={"url": url},
                admission={"replicas": 2, "lease_s": lease_s, "trust_tenant_header": True},
            )
            gateways.append(await stack.enter_async_context(gateway))
        for gateway in gateways:
            await gateway.ready(worker)
        yield Replicas(url, worker, *gateways)
        worker.heal()
        worker.resume()


@pytest.fixture
async def replicas(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Replicas]:
    async with running(valkey.url, tmp_path, LEASE_S) as both:
        yield both


@pytest.fixture
async def patient(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Replicas]:
    """With leases so long that no sync and no reaper helps while the test runs."""
    async with running(valkey.url, tmp_path, 120) as both:
        yield both


async def test_a_killed_replicas_tickets_take_no_slot(patient: Replicas) -> None:
    """F36. A slot that comes free meanwhile goes past them, at once, to who can use it."""
    patient.worker.hold()
    lost, leaving = patient.ask(patient.one, "lost"), patient.ask(patient.two, "leaving")
    await patient.worker.wait_for(open=2)
    doomed = patient.ask(patient.one, "doomed")
    await patient.waits(1)
    survivor = patient.ask(patient.two, "survivor")
    await patient.waits(2)
    await asyncio.to_thread(patient.one.process.kill)
    await asyncio.gather(lost, doomed, return_exceptions=True)
    await patient.worker.wait_for(open=1)
    leaving.cancel()

    async def is_dispatched() -> bool:
        return "survivor" in patient.seen()

    await until_told(is_dispatched, "the survivor at the worker")
    patient.worker.resume()
    assert (await survivor).status_code == 200
    assert "doomed" not in patient.seen()


async def test_a_killed_replica_frees_its_slots_and_its_tickets_vanish(replicas: Replicas) -> None:
    """F36. Its worker loses the connections at once; its slots come back when its leases have run out."""
    doomed = [*await replicas.fill(replicas.one), replicas.ask(replicas.one, "doomed")]
    await replicas.waits(1)
    waiting = replicas.ask(replicas.two, "survivor")
    await replicas.waits(2)
    killed = time.monotonic()
    await asyncio.to_thread(replicas.one.process.kill)
    await replicas.worker.wait_for(open=0)
    assert all(isinstance(lost, httpx.TransportError) for lost in await asyncio.gather(*doomed, return_exceptions=True))
    replicas.worker.resume()
    assert (await waiting).status_code == 200
    assert time.monotonic() - killed <= 3 * FREED_S  # the queue's own limit is far behind
    await replicas.holds(0)
    await replicas.waits(0)
    assert "doomed" not in replicas.seen()


@pytest.mark.slow
async def test_other_replicas_are_as_quick_when_one_is_killed(valkey: Valkey, tmp_path: Path) -> None:
    """F36. Loosely, by counts: how many take longer than half as much again as 99 of 100 took before."""
    async with running(valkey.url, tmp_path, LEASE_S, slots=8) as both:
        body = chat(model="m", nonce="stuck", x_fault="hang_before")
        stuck = [asyncio.create_task(both.one.http.post(CHAT, json=body)) for _ in range(4)]
        await both.worker.wait_for(open=4)
        before = sorted([await took_s(both) for _ in range(100)])
        await asyncio.to_thread(both.one.process.kill)
        after = [await took_s(both) for _ in range(100)]
        await asyncio.gather(*stuck, return_exceptions=True)
        limit_s = 1.5 * before[98] + 0.5
        assert sum(one > limit_s for one in after) <= 10, (before[98], sorted(after)[-12:])
        await both.holds(0)


async def took_s(both: Replicas) -> float:
    """How long the replica that stays takes for a request. A slot that is not free would cost seconds."""
    began = time.monotonic()
    answer = await both.ask(both.two, "quick")
    assert answer.status_code == 200
    return time.monotonic() - began


async def test_a_replica_that_slept_past_its_leases_frees_nothing_twice(replicas: Replicas) -> None:
    """F39. Its streams may end, since it owns the sockets; the slots are another's by then."""
    asked = await replicas.fill(replicas.one)
    waiting = [replicas.ask(replicas.two, f"waiting{index}") for index in range(3)]
    await replicas.waits(3)
    replicas.one.process.pause()
    await replicas.worker.wait_for(open=4)
    replicas.one.process.resume()
    await replicas.one.metric("sluice_leases_fenced_total", 2)
    assert len(Dump(replicas.url).held[f"127.0.0.1:{replicas.worker.port}"]) == 2
    asked[0].cancel()
    await replicas.worker.wait_for(open=3)
    await replicas.one.operators.get("/admin/queue")  # asked of the ledger after the release
    assert len(Dump(replicas.url).held[f"127.0.0.1:{replicas.worker.port}"]) == 2
    assert len(Dump(replicas.url).tickets) == 1
    replicas.worker.resume()
    answers = await asyncio.gather(asked[1], *waiting)
    assert [answer.status_code for answer in answers] == [200] * 4
    await replicas.holds(0)
    assert Dump(replicas.url).depth == {}


async def test_a_client_that_leaves_while_queued_is_never_dispatched(patient: Replicas) -> None:
    """F41."""
    asked = await patient.fill(patient.one)
    leaving = patient.ask(patient.two, "leaver")
    await patient.waits(1)
    staying = patient.ask(patient.two, "stayer")
    await patient.waits(2)
    leaving.cancel()
    await patient.waits(1)
    await patient.two.metric("sluice_requests_total", 1, outcome="cancelled")
    patient.worker.resume()
    assert [answer.status_code for answer in await asyncio.gather(*asked, staying)] == [200] * 3
    assert "leaver" not in patient.seen()
    await patient.holds(0)


async def test_both_replicas_show_the_one_queue_and_obey_its_headers(replicas: Replicas) -> None:
    asked = await replicas.fill(replicas.one)
    late = await replicas.ask(replicas.two, "late", **{"x-sluice-timeout-ms": "100"})
    assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
    wrong = await replicas.ask(replicas.two, "wrong", **{"x-sluice-timeout-ms": "soon"})
    assert wrong.status_code == 400
    waiting = replicas.ask(replicas.two, "waiting", **{"x-sluice-tenant": "acme"})
    await replicas.waits(1)
    worker = f"127.0.0.1:{replicas.worker.port}"
    for gateway in (replicas.one, replicas.two):
        view = (await gateway.operators.get("/admin/queue")).json()
        assert [(flow["band"], flow["tenant"], flow["depth"]) for flow in view["flows"]] == [("default", "acme", 1)]
        assert view["workers"] == [{"worker": worker, "slots_held": 2, "slots": 2}]
        assert view["routes"][0]["workers"] == [worker]
    replicas.worker.resume()
    assert {answer.status_code for answer in await asyncio.gather(*asked, waiting)} == {200}
