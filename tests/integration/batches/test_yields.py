"""Row L10 in time that is not real: what a saturating batch costs interactive requests in slots, and what it uses.

Gate, slack, meter, admission are the real ones. A worker is a time for which a slot is held; nobody's CPU counts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from app import settings
from app.admission.local import LocalAdmission
from app.admission.ticket import Ticket
from app.batches.batch import Batch, Created, Range, Status
from app.batches.journal import Journal, RangeLog, RecordsBeside
from app.batches.line_runs import LineRuns
from app.batches.lines import Line, Record
from app.batches.meter import Meter
from app.batches.runner import GIVE_WAY_S
from app.catalogue import Catalogue
from app.gateway import Gateway
from app.inference import Band, InferenceRequest, TokenUsage
from app.telemetry.account import Ttfts
from app.telemetry.metrics import Metrics
from app.tenant import Tenant
from app.workers.registry import Registry
from tests.integration.batches.house import CHAT
from tests.integration.batches.mortals import Notes
from tests.stepping import SteppingLoop

WORKER = "w"
ANSWER = b'{"usage": {"prompt_tokens": 5, "completion_tokens": 16}}'
BODY = msgspec.Raw(b'{"model":"m","messages":[{"role":"user","content":"x"}]}')
WARM_UP_S = 10.0


@dataclass(frozen=True)
class Load:
    """Interactive requests come `per_s` a second at random; they and lines hold a slot for so long each."""

    slots: int = 32
    per_s: float = 12.0
    request_s: float = 0.37
    line_s: float = 0.37
    seconds: float = 40.0
    preemptions: int = 3

    @property
    def lines(self) -> list[Line]:
        """More than can be run."""
        most = self.slots * (self.seconds + WARM_UP_S) / self.line_s
        return [Line(str(number), "POST", CHAT, BODY) for number in range(int(most))]


@dataclass
class Found:
    """Seconds of slots, and how long each interactive request waited for one."""

    waits: list[float] = field(default_factory=list)
    interactive: float = 0.0
    useful: float = 0.0
    wasted: float = 0.0

    def quantile(self, share: float) -> float:
        return sorted(self.waits)[int(share * len(self.waits))]

    def used(self, load: Load) -> float:
        """Of what interactive requests left over."""
        return self.useful / (load.slots * load.seconds - self.interactive)


class Forgetful:
    """See `journal.Journal`: records are told and forgotten."""

    async def read_range(self, batch: Batch, index: int, log: RangeLog) -> RangeLog:
        return log

    async def commit(self, batch: Batch, index: int, log: RangeLog, records: RecordsBeside) -> list[Record]:
        added = records(log.done)
        log.done.update(record.index for record in added)
        return added


class Town:
    """One model, one worker, a batch without end, and people."""

    def __init__(self, load: Load) -> None:
        self.loop = SteppingLoop()
        self.found = Found()
        self._load = load
        self._lot = random.Random(1)  # noqa: S311 - the same arrivals each time
        metrics = Metrics(CollectorRegistry())
        self._admission = LocalAdmission(settings.Admission(), metrics, self.loop.time)
        self._admission.set_slots(WORKER, load.slots)
        catalogue = SimpleNamespace(resolve=lambda name: [SimpleNamespace(model=name)])
        registry = SimpleNamespace(pool=lambda variants: [SimpleNamespace(id=WORKER)])
        meter = Meter(
            cast("Catalogue", catalogue), cast("Registry", registry), self._admission, Ttfts(), self.loop.time
        )
        way, limits = cast("Gateway", self), settings.Batches(preemptions_per_line=load.preemptions)
        parts = cast("Journal", Forgetful()), meter, Tenant, limits, settings.Parameters(), metrics, Notes()
        self._runs = LineRuns(way, *parts, self.loop.time)
        self._tick_s = limits.tick_s
        created = Created(
            at=0, id="b", tenant="t", endpoint=CHAT, input_file_id="f", completion_window="24h", expires_at=10**9,
            metadata=None, outputs_kept_s=60,
        )  # fmt: skip
        ranges = (Range(0, 0, 1, len(load.lines)),)
        self._batch = Batch(created, status=Status.IN_PROGRESS, model="m", ranges=ranges)

    def live(self) -> Found:
        """A while of it, after things have settled."""
        works: Sequence[Awaitable[None]] = (self._look(), self._give_way(), self._people())
        tasks = [self.loop.create_task(cast("Any", work)) for work in works]
        self.loop.run_until_complete(tasks[-1])
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        with suppress(asyncio.CancelledError):
            self.loop.run_until_complete(asyncio.gather(*tasks))
        self.loop.run_until_complete(asyncio.sleep(1))
        self.loop.close()
        return self.found

    async def serve(self, request: InferenceRequest) -> Any:
        """See `Gateway.serve`."""
        return self._reply(await self._admission.admit(Ticket.of(request, (WORKER,))))

    @contextmanager
    def _reply(self, lease: Any) -> Iterator[Any]:
        began, parts = self.loop.time(), [ANSWER, b""]

        async def next_part() -> bytes:
            if len(parts) == 2:
                await asyncio.sleep(self._load.line_s)
            return parts.pop(0)

        try:
            yield SimpleNamespace(answer=SimpleNamespace(next=next_part, is_whole=True))
        finally:
            took_s = self.loop.time() - began
            if parts:
                self.found.wasted += took_s
            else:
                self.found.useful += took_s
            lease.release(None if parts else TokenUsage(5, 16))

    async def _look(self) -> None:
        run = None
        while True:
            self._runs.tend(["m"])
            await self._runs.look()
            if run is None:
                run = asyncio.create_task(self._runs.range(self._batch, 0, lambda: True).complete(self._load.lines))
            await asyncio.sleep(self._tick_s)

    async def _give_way(self) -> None:
        while True:
            await self._runs.give_way()
            await asyncio.sleep(GIVE_WAY_S)

    async def _people(self) -> None:
        await asyncio.sleep(WARM_UP_S)
        self.found.useful = self.found.wasted = 0.0
        end, people = self.loop.time() + self._load.seconds, set()
        while self.loop.time() < end:
            people.add(asyncio.create_task(self._ask()))
            await asyncio.sleep(self._lot.expovariate(self._load.per_s))

    async def _ask(self) -> None:
        asked = self.loop.time()
        with await self._admission.admit(Ticket("i", Band.DEFAULT, (WORKER,))):
            self.found.waits.append(self.loop.time() - asked)
            self.found.interactive += self._load.request_s
            await asyncio.sleep(self._load.request_s)


def test_nobody_waits_for_a_line_and_lines_use_what_is_left() -> None:
    load = Load()
    found = Town(load).live()
    assert max(found.waits) == 0
    assert found.used(load) >= 0.9
    assert found.wasted <= 0.03 * found.useful


@pytest.mark.parametrize(
    ("load", "used"),
    [(Load(line_s=2.0), 0.9), (Load(line_s=10.0, per_s=8, request_s=2), 0.6), (Load(slots=6, per_s=4, line_s=1), 0.6)],
    ids=["of two seconds", "among long requests", "of few slots"],
)
def test_nor_for_long_ones(load: Load, used: float) -> None:
    """Nobody waits then either; the price is what lines have done in vain."""
    found = Town(load).live()
    assert found.quantile(0.99) == 0
    assert found.used(load) >= used


def test_they_would_wait_if_lines_kept_their_slots() -> None:
    """What the tests above are worth."""
    assert Town(Load(preemptions=0)).live().quantile(0.95) > 0
    assert Town(Load(line_s=2.0, preemptions=0)).live().quantile(0.95) > 0.1
