"""Who waits takes the youngest slot that may be taken back, at once and once; it costs who gave it nothing."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from app import settings
from app.admission.local import LocalAdmission
from app.admission.roster import QueuedLease
from app.admission.ticket import Ticket
from app.inference import Band
from app.telemetry.metrics import Metrics
from app.tenant import Limits, Tenant

LIMITED = Tenant("batcher", limits=Limits(requests_per_min=10))


class Line:
    """A line of a batch that holds a slot until it is asked to give it back."""

    def __init__(self, admission: LocalAdmission, workers: str, tenant: Tenant = LIMITED) -> None:
        self.asked = 0
        self._admission = admission
        self._ticket = Ticket("line", Band.BATCH, tuple(workers), tenant=tenant, on_preempt=self._preempt)
        self.lease: QueuedLease

    async def run(self) -> Line:
        self.lease = await self._admission.admit(self._ticket)
        return self

    def _preempt(self) -> None:
        self.asked += 1
        asyncio.get_running_loop().call_soon(self.lease.release)


def admission(workers: str, slots: int) -> LocalAdmission:
    built = LocalAdmission(settings.Admission(), Metrics(CollectorRegistry()), time.monotonic)
    for worker in workers:
        built.set_slots(worker, slots)
    return built


async def lines(line: LocalAdmission, *workers: str) -> list[Line]:
    return [await Line(line, names).run() for names in workers]


def asked(those: list[Line]) -> list[int]:
    return [line.asked for line in those]


async def wait(line: LocalAdmission, workers: str, band: Band = Band.FLEX) -> QueuedLease:
    return await asyncio.wait_for(line.admit(Ticket("i", band, tuple(workers))), timeout=8)


async def test_the_youngest_line_makes_room() -> None:
    line = admission("a", 3)
    held = await lines(line, "a", "a", "a")
    assert (await wait(line, "a")).worker_id == "a"
    assert asked(held) == [0, 0, 1]
    await wait(line, "a", Band.PRIORITY)
    assert asked(held) == [0, 1, 1]


async def test_only_on_workers_that_help() -> None:
    line = admission("ab", 1)
    held = await lines(line, "a", "b")
    assert (await wait(line, "a")).worker_id == "a"
    assert asked(held) == [1, 0]


async def test_not_on_a_worker_that_offers_nothing_now() -> None:
    line = admission("ab", 1)
    held = await lines(line, "a", "b")
    line.set_slots("b", 0)
    assert (await wait(line, "ab")).worker_id == "a"
    assert asked(held) == [1, 0]


async def test_a_line_that_waits_takes_nothing() -> None:
    line = admission("a", 1)
    held = await lines(line, "a")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Line(line, "a").run(), timeout=0.05)
    assert asked(held) == [0]


async def test_nobody_is_asked_while_a_slot_is_free() -> None:
    line = admission("a", 2)
    held = await lines(line, "a")
    await wait(line, "a")
    assert asked(held) == [0]


async def test_none_is_asked_twice_nor_after_its_end() -> None:
    line = admission("a", 2)
    held = await lines(line, "a", "a")
    held[1].lease.release()
    assert line.roster.preempt("a", most=5) == 1
    assert line.roster.preempt("a", most=5) == 0
    assert asked(held) == [1, 0]


async def test_who_gave_its_slot_back_has_used_nothing_of_its_limits() -> None:
    line = admission("a", 1)
    (held,) = await lines(line, "a")
    assert held.lease.allowances[0].remaining == 9
    (await wait(line, "a")).release()
    again = await Line(line, "a").run()
    assert again.lease.allowances[0].remaining == 9


async def test_nor_its_turn() -> None:
    """In the queue its tenant stands as if it had never been granted: before another that came later."""
    line = admission("a", 1)
    await lines(line, "a")
    lease = await wait(line, "a")
    first = asyncio.create_task(Line(line, "a").run())
    await asyncio.sleep(0)
    second = asyncio.create_task(Line(line, "a", Tenant("other")).run())
    await asyncio.sleep(0)
    lease.release()
    await asyncio.wait_for(first, timeout=8)
    assert not second.done()
    second.cancel()
