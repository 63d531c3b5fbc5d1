"""Gateway replicas reduced to their admission, on one real server: what the fault tests break."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import redis
from prometheus_client import CollectorRegistry

from app import settings
from app.admission.controller import RedisAdmission
from app.admission.ledger import LAYOUT, Scripts
from app.admission.roster import QueuedLease
from app.admission.ticket import Ticket
from app.inference import Band
from app.telemetry.logs import open_log
from app.telemetry.metrics import Metrics
from app.tenant import Tenant

T = TypeVar("T")
PATIENCE_S = 30.0
"""How long what must come may take: only failures wait for it."""
LEASE_S = 6.0
"""Longer than a machine stands still, and renewals every third of it are still soon."""
PREFIX = f"{{sluice}}:{LAYOUT}:"


def ticket(*candidates: str, band: Band = Band.DEFAULT, tenant: str = "t", deadline: float = float("inf")) -> Ticket:
    return Ticket("r", band, candidates or ("w",), model="m", tenant=Tenant(tenant), deadline=deadline)


def hasty(url: str) -> settings.Redis:
    """A server that will fall silent, and soon counts as lost then."""
    return settings.Redis(url=url, call_timeout_s=1.5)


@asynccontextmanager
async def replica(
    server: str | settings.Redis,
    slots: int | dict[str, int] = 1,
    scripts: Scripts | None = None,
    /,
    *,
    replicas: int = 1,
    **limits: object,
) -> AsyncIterator[RedisAdmission]:
    """A running admission, named only by its server if that is never silent; its leases live long, unless told."""
    configured = settings.Admission(**{"lease_s": LEASE_S, **limits})
    admission = RedisAdmission(
        configured,
        settings.Redis(url=server, call_timeout_s=PATIENCE_S) if isinstance(server, str) else server,
        replicas,
        Metrics(CollectorRegistry()),
        open_log(settings.Logs(level="error")),
        time.monotonic,
        scripts,
    )
    async with admission.running():
        for worker, count in (slots if isinstance(slots, dict) else {"w": slots}).items():
            admission.set_slots(worker, count)
        yield admission


def gauge(admission: RedisAdmission, name: str, **labels: str) -> float:
    """A series of this replica; 0 while it is not there."""
    return admission._metrics._registry.get_sample_value(name, labels) or 0.0


async def until(what: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
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


async def soon(what: Awaitable[T]) -> T:
    """What must come. Raises TimeoutError."""
    return await asyncio.wait_for(what, PATIENCE_S)


async def granted_in_time(admission: RedisAdmission, asked: Ticket) -> QueuedLease:
    return await soon(admission.admit(asked))


# The whole ledger in one answer, also out of memory: {key: members}, of `slots`, `depth` and `spent` the values too.
READ = """#!lua flags=no-writes,allow-oom
local found = {}
for _, name in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  local kind, short = redis.call('TYPE', name)['ok'], string.sub(name, #ARGV[1] + 1)
  local value = kind == 'zset' and redis.call('ZRANGE', name, 0, -1)
    or kind == 'set' and redis.call('SMEMBERS', name)
    or (short == 'depth' or short == 'slots' or string.match(short, '^spent:')) and redis.call('HGETALL', name)
    or kind == 'hash' and redis.call('HKEYS', name)
    or {}
  found[short] = table.concat(value, ' ')
end
return cjson.encode(found)
"""


class Dump:
    """Everything that the ledger says at one moment."""

    def __init__(self, server: str | redis.Redis) -> None:
        if isinstance(server, str):
            with redis.Redis.from_url(server) as client:
                text = client.eval(READ, 0, PREFIX)
        else:
            text = server.eval(READ, 0, PREFIX)
        words: dict[str, list[str]] = {name: joined.split() for name, joined in json.loads(text).items()}
        parts = {name: name.split(":") for name in words}
        self.held = {name.removeprefix("held:"): set(ids) for name, ids in words.items() if name.startswith("held:")}
        self.tickets = set(words.get("tickets", ()))
        self.deadlines = set(words.get("deadlines", ()))
        self.flows = {
            (f"{part[1]}:{part[2]}", part[3]): words[name] for name, part in parts.items() if part[0] == "flow"
        }
        self.lines = {f"{part[1]}:{part[2]}": words[name] for name, part in parts.items() if part[0] == "line"}
        self.lines_of = {
            name.removeprefix("lines:"): set(lines) for name, lines in words.items() if name.startswith("lines:")
        }
        self.slots = _counts(words.get("slots", []))
        self.depth = _counts(words.get("depth", []))
        self.live = {
            name.removeprefix("reserved:"): set(ids) for name, ids in words.items() if name.startswith("reserved:")
        }
        self.reserving = set(words.get("reserving", ()))
        self.spent = {
            name.removeprefix("spent:"): _counts(fields) for name, fields in words.items() if name.startswith("spent:")
        }

    @property
    def reserved(self) -> set[str]:
        return {reservation for ids in self.live.values() for reservation in ids}

    @property
    def leases(self) -> set[str]:
        return {lease for ids in self.held.values() for lease in ids}


def _counts(fields: list[str]) -> dict[str, int]:
    return {name: int(count) for name, count in zip(fields[::2], fields[1::2], strict=True)}


def snapshot(url: str) -> dict[bytes, bytes]:
    with redis.Redis.from_url(url) as client:
        return {name: client.dump(name) for name in client.keys("*")}


def restore(url: str, saved: dict[bytes, bytes]) -> None:
    """What a failover to a replica that was behind does: all state is that of an earlier moment."""
    with redis.Redis.from_url(url) as client, client.pipeline(transaction=True) as pipe:
        pipe.flushdb()
        for name, value in saved.items():
            pipe.restore(name, 0, value)
        pipe.execute()


def is_told(url: str, *admissions: RedisAdmission) -> bool:
    """Whether the ledger says exactly what these replicas hold and wait for."""
    dump = Dump(url)
    held = {lease for admission in admissions for lease in admission.roster.held}
    waiting = {lease for admission in admissions for lease in admission.roster.waiting}
    return dump.leases == held and dump.tickets == waiting
