"""Gateways as far as batches go, which die, sleep and run out of disk at any step. No processes, no real time.

Runner, journal, files and the directory are the real ones. Claims are leases in a table that may be out of reach or
forget, and lines are answered by nobody after a while: both as little to be trusted as what they stand for.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import CollectorRegistry

from app import settings
from app.batches.batches import Batches
from app.batches.claims import Claims, renewal_s
from app.batches.files import Files
from app.batches.journal import Journal
from app.batches.line_runs import LineRuns
from app.batches.runner import Runner, Shelf
from app.batches.slack import Seen
from app.batches.storage import Directory
from app.errors import DependencyUnavailable, InvalidValue, StorageUnavailable, WorkerLost
from app.gateway import Gateway
from app.inference import InferenceRequest
from app.telemetry.metrics import Metrics
from app.tenant import Tenant
from tests.stepping import SteppingLoop

LIMITS = settings.Batches(range_lines=3, range_bytes=2000, lease_s=3, attempts_per_line=2)
NEVER = 10**9
LATE_MAX = 32
PRESSED_S = 0.005


class Died(BaseException):
    """What a killed process does from then on: nothing. No `except Exception` may hold it up."""


class Fate:
    """When one gateway dies, and whether it sleeps."""

    def __init__(self) -> None:
        self.writes_left = NEVER
        self.dies_after = False
        self.is_dead = False
        self.ended = asyncio.Event()
        self.awake = asyncio.Event()
        self.awake.set()

    async def step(self) -> None:
        """Every effect on the outside passes here first."""
        await self.awake.wait()
        if self.is_dead:
            raise Died

    def die(self) -> None:
        self.is_dead = True
        self.awake.set()
        self.ended.set()


@dataclass
class Table:
    """Who has claimed what, until when. In shared memory for all gateways, as Valkey is."""

    loop: SteppingLoop
    held: dict[str, tuple[int, float]] = field(default_factory=dict)
    opens: float = 0.0
    is_down: bool = False
    is_wrong: bool = False

    def holder(self, subject: str) -> int | None:
        if self.is_wrong:
            return None
        holder, until = self.held.get(subject, (0, 0.0))
        return holder if self.loop.time() < until else None

    def forget(self) -> None:
        """Those that hold something have the time of two renewals to tell."""
        self.held.clear()
        self.opens = self.loop.time() + 2 * renewal_s(LIMITS.lease_s)


class TableClaims:
    """See `claims.Claims`."""

    _names = count(1)

    def __init__(self, table: Table, fate: Fate) -> None:
        self._table = table
        self._fate = fate
        self._name = next(self._names)
        self._until: dict[str, float] = {}

    async def check(self) -> None:
        await self._fate.step()
        if self._table.is_down:
            raise DependencyUnavailable("down")

    async def take(self, subjects: Sequence[str], count: int = 1) -> list[str]:
        until = self._now + LIMITS.lease_s
        await self._fate.step()
        if self._table.is_down or self._now < self._table.opens:
            return []
        free = [one for one in subjects if one not in self._until and self._table.holder(one) is None][:count]
        for subject in free:
            self._table.held[subject] = (self._name, self._now + LIMITS.lease_s)
            self._until[subject] = until
        return free

    def holds(self, subject: str) -> bool:
        return self._now < self._until.get(subject, 0.0)

    async def renew(self) -> None:
        until = self._now + LIMITS.lease_s
        await self._fate.step()
        if self._table.is_down:
            return
        for subject in list(self._until):
            if self._table.holder(subject) in (None, self._name):
                self._table.held[subject] = (self._name, self._now + LIMITS.lease_s)
                self._until[subject] = until
            else:
                del self._until[subject]

    async def release(self, subjects: Sequence[str]) -> None:
        await self._fate.step()
        for subject in subjects:
            if self._until.pop(subject, None) is not None and self._table.holder(subject) == self._name:
                del self._table.held[subject]

    async def close(self) -> None:
        await self.release(list(self._until))

    @property
    def _now(self) -> float:
        return self._table.loop.time()


@dataclass
class Disk:
    """What all gateways share: one directory. `late` are writes whose writers died just before them."""

    root: Path
    is_full: bool = False
    late: list[tuple[str, bytes]] = field(default_factory=list)

    def open(self) -> Directory:
        directory = Directory(self.root)
        directory.open()
        return directory


class MortalDirectory(Directory):
    """Dies at one of its writes, having done it or not."""

    def __init__(self, disk: Disk, fate: Fate) -> None:
        super().__init__(disk.root)
        self._disk = disk
        self._fate = fate

    async def create(self, key: str, data: bytes) -> bool:
        async with _writing(self._fate, lambda: self._missed(key, data)):
            self._has_room()
            return await super().create(key, data)

    async def upload(self, key: str, parts: AsyncIterator[bytes]) -> int:
        async with _writing(self._fate):
            self._has_room()
            return await super().upload(key, parts)

    async def remove(self, key: str) -> None:
        async with _writing(self._fate):
            await super().remove(key)

    async def clear(self, prefix: str) -> None:
        async with _writing(self._fate):
            await super().clear(prefix)

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        await self._fate.step()
        return await super().read(key, start, end)

    async def names(self, prefix: str) -> list[str]:
        await self._fate.step()
        return await super().names(prefix)

    def _has_room(self) -> None:
        if self._disk.is_full:
            raise StorageUnavailable(reason="ENOSPC")

    def _missed(self, key: str, data: bytes) -> None:
        if len(self._disk.late) < LATE_MAX:
            self._disk.late.append((key, data))


class _Writing:
    def __init__(self, fate: Fate, missed: Callable[[], None]) -> None:
        self._fate = fate
        self._missed = missed

    async def __aenter__(self) -> None:
        await self._fate.step()
        self._fate.writes_left -= 1
        if self._fate.writes_left == 0 and not self._fate.dies_after:
            self._missed()
            self._fate.die()
            raise Died

    async def __aexit__(self, *_: object) -> None:
        if self._fate.writes_left == 0:
            self._fate.die()
        await self._fate.step()


def _writing(fate: Fate, missed: Callable[[], None] = lambda: None) -> _Writing:
    return _Writing(fate, missed)


@dataclass
class Workers:
    """Answer after a while, by what a line's `user` ends in; `dispatched` are all that were ever asked.

    `preemptible` are the lines at work that may be taken off. Whoever `is_pressed` takes every one of them, soon.
    """

    dispatched: list[str] = field(default_factory=list)
    preemptible: list[Callable[[], None]] = field(default_factory=list)
    is_pressed: bool = False

    async def serve(self, request: InferenceRequest, fate: Fate) -> Any:
        if fate.is_dead:
            raise Died
        user = str(json.loads(bytes(request.fields["user"])))
        self.dispatched.append(user)
        if user.endswith("bad"):
            raise InvalidValue("no")
        if user.endswith("shaky") and zlib.crc32(b"%d" % len(self.dispatched)) % 2:
            raise WorkerLost("broken")
        return self._reply(user, fate, request.on_preempt)

    @contextmanager
    def _reply(self, user: str, fate: Fate, on_preempt: Callable[[], None] | None) -> Iterator[Any]:
        parts = [json.dumps({"answer": user, "usage": {"prompt_tokens": 2, "completion_tokens": 3}}).encode(), b""]
        working = [on_preempt] if on_preempt is not None else []

        async def next_part() -> bytes:
            await asyncio.sleep(zlib.crc32(user.encode()) % 100 / 100)
            await fate.step()
            return parts.pop(0)

        self.preemptible += working
        if self.is_pressed:
            for preempt in working:
                asyncio.get_running_loop().call_later(PRESSED_S, preempt)
        try:
            yield SimpleNamespace(answer=SimpleNamespace(next=next_part, is_whole=True))
        finally:
            for preempt in working:
                self.preemptible.remove(preempt)


@dataclass
class Notes:
    """See `logs.Log`: keeps what must never be said."""

    failures: list[str] = field(default_factory=list)

    def info(self, event: str, **fields: Any) -> None:
        """Nobody listens."""

    debug = warning = error = info

    def exception(self, event: str, **fields: Any) -> None:
        self.failures.append(event)


class MortalGateway:
    """One of several. It lives in the loop until it dies or is told to stop."""

    def __init__(self, disk: Disk, table: Table, workers: Workers, notes: Notes, wall: Callable[[], float]) -> None:
        loop = table.loop
        self.fate = Fate()
        directory = MortalDirectory(disk, self.fate)
        self.files, self.journal = Files(directory, wall), Journal(directory, wall)
        claims: Claims = TableClaims(table, self.fate)
        metrics = Metrics(CollectorRegistry())
        way = SimpleNamespace(serve=lambda request: workers.serve(request, self.fate))
        runs = LineRuns(
            cast("Gateway", way), self.journal, Idle(), Tenant, LIMITS, settings.Parameters(), metrics, notes, loop.time
        )
        shelf = Shelf(self.files, self.journal, claims)
        runner = Runner(shelf, runs, lambda tenant, model: True, lambda: False, LIMITS, metrics, notes, loop.time, wall)
        self.batches = Batches(self.files, self.journal, claims, runner, LIMITS, wall)
        self.life = loop.create_task(self._live())

    @property
    def can_answer(self) -> bool:
        return self.fate.awake.is_set() and not self.fate.ended.is_set()

    async def _live(self) -> None:
        async with self.batches.running():
            await self.fate.ended.wait()


class Idle:
    """See `line_runs.Sight`: four slots, and nobody else."""

    async def look(self, name: str) -> Seen:
        return Seen(slots=4, free=4, interactive=0, waiting=0, lines_waiting=0, ttft_s=None)

    def interactive(self, name: str) -> int:
        return 0

    async def give_way(self, name: str) -> int:
        return 0
