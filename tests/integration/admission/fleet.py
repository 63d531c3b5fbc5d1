"""Gateway replicas reduced to their admission, on one real server: what the fault tests break."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import redis
from prometheus_client import CollectorRegistry

from app import settings
from app.admission.controller import RedisAdmission
from app.admission.roster import QueuedLease
from app.admission.ticket import Ticket
from app.inference import Band
from app.telemetry.logs import open_log
from app.telemetry.metrics import Metrics

PREFIX = "{sluice}:1:"


def ticket(*candidates: str, band: Band = Band.DEFAULT, tenant: str = "t", deadline: float = float("inf")) -> Ticket:
    return Ticket("r", band, candidates or ("w",), model="m", tenant=tenant, deadline=deadline)


@asynccontextmanager
async def replica(
    url: str, slots: int | dict[str, int] = 1, *, replicas: int = 1, **limits: object
) -> AsyncIterator[RedisAdmission]:
    """A running admission whose leases live for a second and a half, unless told otherwise."""
    configured = settings.Admission(**{"lease_s": 1.5, **limits})
    admission = RedisAdmission(
        configured,
        settings.Redis(url=url),
        replicas,
        Metrics(CollectorRegistry()),
        open_log(settings.Logs(level="error")),
        time.monotonic,
    )
    async with admission.running():
        for worker, count in (slots if isinstance(slots, dict) else {"w": slots}).items():
            admission.set_slots(worker, count)
        yield admission


async def until(what: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition that other tasks bring about. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not what():
            await asyncio.sleep(0.005)


async def queued(admission: RedisAdmission, *tickets: Ticket) -> list[asyncio.Task[QueuedLease]]:
    """Tasks that wait for these tickets, in this order; all of them wait when this returns."""
    tasks = []
    for asked in tickets:
        before = len(admission.roster.waiting)
        tasks.append(asyncio.create_task(admission.admit(asked)))
        await until(lambda before=before: parked(admission) > before)  # type: ignore[misc]
    return tasks


def parked(admission: RedisAdmission) -> int:
    """How many wait and know it."""
    return sum(lease.timer is not None for lease in admission.roster.waiting.values())


async def granted_in_time(admission: RedisAdmission, asked: Ticket, limit_s: float = 1.5) -> tuple[QueuedLease, float]:
    started = time.monotonic()
    async with asyncio.timeout(limit_s):
        lease = await admission.admit(asked)
    return lease, time.monotonic() - started


class Dump:
    """Everything that the ledger says at one moment."""

    def __init__(self, url: str) -> None:
        with redis.Redis.from_url(url, decode_responses=True) as client, client.pipeline(transaction=True) as pipe:
            names = sorted(client.keys(PREFIX + "held:*"))
            for name in names:
                pipe.zrange(name, 0, -1)
            pipe.hkeys(PREFIX + "tickets")
            pipe.hgetall(PREFIX + "slots")
            pipe.hgetall(PREFIX + "depth")
            *held, tickets, slots, depth = pipe.execute()
        self.held: dict[str, set[str]] = {
            name.removeprefix(PREFIX + "held:"): set(ids) for name, ids in zip(names, held, strict=True)
        }
        self.tickets: set[str] = set(tickets)
        self.slots: dict[str, int] = {worker: int(count) for worker, count in slots.items()}
        self.depth: dict[str, int] = {field: int(count) for field, count in depth.items()}

    @property
    def leases(self) -> set[str]:
        return {lease for ids in self.held.values() for lease in ids}


def is_told(url: str, *admissions: RedisAdmission) -> bool:
    """Whether the ledger says exactly what these replicas hold and wait for."""
    dump = Dump(url)
    held = {lease for admission in admissions for lease in admission.roster.held}
    waiting = {lease for admission in admissions for lease in admission.roster.waiting}
    return dump.leases == held and dump.tickets == waiting


def loads(leases: Sequence[QueuedLease]) -> Counter[str]:
    return Counter(lease.worker_id for lease in leases if lease.worker_id)
