"""I17 to I20 under crashes at every write, a Valkey that forgets, claims that end early, and two gateways at once.

Whole runners, on a real Valkey and a real directory; only the way to the workers is short. A gateway dies before or
after any of its writes, as kill -9 would have it: nothing that it would have done then is done.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from hypothesis import Phase
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from app import settings
from app.batches.batch import Batch, Progress, Status
from app.batches.batches import Asked, Batches
from app.batches.claims import RedisClaims
from app.batches.files import Files
from app.batches.journal import Journal
from app.batches.line_runs import LineRuns
from app.batches.runner import ORPHAN_S, Runner, Shelf
from app.batches.slack import Seen
from app.batches.storage import Directory
from app.errors import GatewayError, InvalidValue
from app.gateway import Gateway
from app.inference import InferenceRequest
from app.telemetry.metrics import Metrics
from app.tenant import Tenant
from tests.integration.batches.house import AFTER, CHAT, jsonl, line
from tests.processes import Valkey

LIMITS = settings.Batches(
    range_lines=3, range_bytes=2000, tick_s=0.005, commit_interval_s=0, lease_s=1, attempts_per_line=1
)
LEASE_S = 0.06
TENANT = "t"
WINDOW_S = 1000
NEVER = 10**9
PHASES = (Phase.explicit, Phase.generate)
"""Shrinking an example of so many processes takes hours; the log of the first one tells enough."""
EXAMPLES = int(os.environ.get("SLUICE_BATCH_EXAMPLES", "6"))


class Died(BaseException):
    """What a process that was killed does from then on: nothing."""


class MortalDirectory(Directory):
    """Dies at its `left`th write, having done it or not."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.left = NEVER
        self.dies_after = False
        self.is_dead = False
        self.died = asyncio.Event()

    async def create(self, key: str, data: bytes) -> bool:
        self._live()
        is_last = self._is_last()
        if is_last and not self.dies_after:
            self._die()
        created = await super().create(key, data)
        if is_last:
            self._die()
        self._live()
        return created

    async def upload(self, key: str, parts: AsyncIterator[bytes]) -> int:
        self._live()
        is_last = self._is_last()
        if is_last and not self.dies_after:
            self._die()
        size = await super().upload(key, parts)
        if is_last:
            self._die()
        self._live()
        return size

    async def remove(self, key: str) -> None:
        self._live()
        if self._is_last() and not self.dies_after:
            self._die()
        await super().remove(key)

    async def clear(self, prefix: str) -> None:
        self._live()
        if self._is_last() and not self.dies_after:
            self._die()
        await super().clear(prefix)

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self._live()
        return await super().read(key, start, end)

    async def names(self, prefix: str) -> list[str]:
        self._live()
        return await super().names(prefix)

    def _is_last(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def _die(self) -> None:
        self.is_dead = True
        self.died.set()
        raise Died

    def _live(self) -> None:
        if self.is_dead:
            raise Died


class MortalClaims(RedisClaims):
    """Of a process that may be dead: then it lets go of nothing. Its leases are shorter than anybody would set them."""

    directory: MortalDirectory

    async def release(self, subjects: Any) -> None:
        if not self.directory.is_dead:
            await super().release(subjects)


class ShortWay:
    """Answers at once; a line that asks for it is refused. Notes what was dispatched."""

    def __init__(self) -> None:
        self.dispatched: list[str] = []

    async def serve(self, request: InferenceRequest) -> Any:
        user = json.loads(bytes(request.fields["user"]))
        self.dispatched.append(user)
        await asyncio.sleep(0)
        if user.endswith("bad"):
            raise InvalidValue("no")
        body = json.dumps({"answer": user, "usage": {"prompt_tokens": 2, "completion_tokens": 3}}).encode()
        return _reply(body)


@contextmanager
def _reply(body: bytes) -> Iterator[Any]:
    parts = iter((body, b""))

    async def next_part() -> bytes:
        return next(parts)

    yield SimpleNamespace(answer=SimpleNamespace(next=next_part, is_whole=True))


class Log:
    def info(self, event: str, **fields: Any) -> None:
        return

    debug = warning = error = info

    def exception(self, event: str, **fields: Any) -> None:
        raise AssertionError(event)


class House:
    """One gateway process, as far as batches go."""

    def __init__(self, root: Path, redis_url: str, way: ShortWay, clock: Clock) -> None:
        self.directory = MortalDirectory(root)
        self.directory.open()
        files, journal = Files(self.directory, clock), Journal(self.directory, clock)
        claims = MortalClaims(settings.Redis(url=redis_url), LEASE_S, time.monotonic)
        claims.directory = self.directory
        metrics = Metrics(CollectorRegistry())

        async def look(model: str) -> Seen:
            return Seen(slots=4, free=4, interactive=0, waiting=0, lines_waiting=0, ttft_s=None)

        runs = LineRuns(
            cast("Gateway", way), journal, look, Tenant, LIMITS, settings.Parameters(), metrics, Log(), time.monotonic
        )
        runner = Runner(
            Shelf(files, journal, claims),
            runs,
            lambda tenant, model: True,
            lambda: False,
            LIMITS,
            metrics,
            Log(),
            time.monotonic,
            clock,
        )
        self.files = files
        self.journal = journal
        self.batches = Batches(files, journal, claims, runner, LIMITS, clock)


class Clock:
    """Wall time, which a test moves."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class BatchesUnderCrashes(RuleBasedStateMachine):
    """Every state is read anew from the directory, by somebody who takes part in nothing."""

    valkey: Valkey

    @initialize()
    def begin(self) -> None:
        self.place = tempfile.TemporaryDirectory()
        self.root = Path(self.place.name)
        self.loop = asyncio.new_event_loop()
        self.redis = redis.Redis.from_url(self.valkey.url)
        self.redis.flushall()
        self.clock = Clock()
        self.way = ShortWay()
        self.witness = Journal(self._open(), self.clock)
        self.made = 0
        self.inputs: dict[str, list[str]] = {}
        self.acknowledged: dict[str, list[str]] = {}
        self.seen: dict[str, tuple[Batch, Progress]] = {}
        self.published: dict[str, bytes] = {}
        self.dispatched_when_cancelled: dict[str, int] = {}

    def _open(self) -> Directory:
        directory = Directory(self.root)
        directory.open()
        return directory

    def _house(self) -> House:
        return House(self.root, self.valkey.url, self.way, self.clock)

    # what clients and fate do

    @rule(count=st.integers(1, 8), bad=st.integers(0, 3), dies=st.sampled_from([NEVER, NEVER, 1, 2, 3, 4, 5]),
          dies_after=st.booleans())  # fmt: skip
    def create(self, count: int, bad: int, dies: int, dies_after: bool) -> None:
        """A client uploads and creates; the gateway may die at any of the writes. Told is told."""
        self.made += 1
        ids = [f"b{self.made}l{i}{'bad' if i < bad else ''}" for i in range(count)]
        data = jsonl(line(custom_id, user=custom_id) for custom_id in ids)
        house = self._house()
        house.directory.left, house.directory.dies_after = dies, dies_after

        async def do() -> str:
            file = await house.files.add(TENANT, _pieces(data), filename="f", purpose="batch", kept_s=None)
            self.inputs[file.id] = ids
            asked = Asked(file.id, CHAT, f"{WINDOW_S}s", None, None, data, None)
            return (await house.batches.create(TENANT, asked)).id

        with suppress(Died):
            batch_id = self.loop.run_until_complete(do())
            self.acknowledged[batch_id] = ids

    @rule(gateways=st.integers(1, 2), writes=st.integers(1, 30), dies_after=st.booleans())
    def live(self, gateways: int, writes: int, dies_after: bool) -> None:
        """Gateways run until the first dies; the claims of the dead are left to end by themselves."""
        self._run(gateways, writes, dies_after=dies_after, patience_s=0.2)

    @rule()
    def forget(self) -> None:
        """Valkey loses all that it knew."""
        self.redis.flushall()

    @rule()
    def claims_end(self) -> None:
        """As if every holder had slept for longer than its lease."""
        for key in self.redis.scan_iter("*claims:batch*"):
            self.redis.delete(key)

    @precondition(lambda self: self.acknowledged)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from(sorted(self.acknowledged)))
        with suppress(GatewayError):
            self.loop.run_until_complete(self._house().batches.cancel(TENANT, batch_id))

    @rule()
    def windows_end(self) -> None:
        self.clock.now += WINDOW_S

    # what must hold

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "witness"):
            return
        found = self.loop.run_until_complete(self._look())
        assert self.acknowledged.keys() <= found.keys(), "I17: an acknowledged batch is gone"
        for batch_id, (batch, progress) in found.items():
            total = batch.total
            assert not total or progress.lines <= total, "I19"
            if batch_id in self.seen:
                before, was = self.seen[batch_id]
                assert progress.completed >= was.completed
                assert progress.failed >= was.failed, "I19: counts only grow"
                assert batch.status is before.status or batch.status in AFTER[before.status], "I19: no step back"
            self.loop.run_until_complete(self._check_files(batch, progress))
            if batch.status is Status.CANCELLED:
                ran = self._dispatched(batch)
                assert self.dispatched_when_cancelled.setdefault(batch_id, ran) == ran, "I20"
        self.seen = found

    def teardown(self) -> None:
        if not hasattr(self, "witness"):
            return
        self.clock.now += 2 * ORPHAN_S  # marks of batches that were never acknowledged are swept after that
        try:
            for _ in range(50):
                self._run(1, NEVER, dies_after=False, patience_s=0.5)
                if all(batch.status.is_final for batch, _ in self.loop.run_until_complete(self._look()).values()):
                    break
            self.holds()
            for batch, progress in self.seen.values():
                assert batch.status.is_final, "V1"
                if batch.status in (Status.COMPLETED, Status.EXPIRED) and batch.total:
                    assert progress.lines == batch.total, "I18"
            assert not list((self.root / "objects").glob("active/*"))
        finally:
            self.redis.close()
            self.loop.close()
            self.place.cleanup()

    # doing it

    def _run(self, gateways: int, writes: int, *, dies_after: bool, patience_s: float) -> None:
        houses = [self._house() for _ in range(gateways)]
        houses[0].directory.left, houses[0].directory.dies_after = writes, dies_after
        self.loop.run_until_complete(self._live(houses, patience_s))

    async def _live(self, houses: list[House], patience_s: float) -> None:
        lives = [asyncio.create_task(_life(house)) for house in houses]
        idle = asyncio.create_task(self._idle(houses[0].journal))
        died = asyncio.create_task(houses[0].directory.died.wait())
        await asyncio.wait([idle, died], timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, died, *lives):
            task.cancel()
        await asyncio.gather(idle, died, *lives, return_exceptions=True)

    async def _idle(self, journal: Journal) -> None:
        with suppress(Died):
            while await journal.active():
                await asyncio.sleep(0.01)

    async def _look(self) -> dict[str, tuple[Batch, Progress]]:
        page, _ = await self.witness.page(TENANT, after=None, limit=1000)
        return {batch.id: await self.witness.view(batch) for batch in page}

    async def _check_files(self, batch: Batch, progress: Progress) -> None:
        """I18: published files are whole and stay as they are; each custom_id has one record."""
        if batch.closed is None or batch.closing is None:
            return
        files = Files(self._open(), self.clock)
        told: Counter[str] = Counter()
        for file_id, exists, count in (
            (batch.closing.output_file_id, batch.closed.has_output, progress.completed),
            (batch.closing.error_file_id, batch.closed.has_errors, progress.failed),
        ):
            if exists:
                record = await files.find(TENANT, file_id)
                content = b"".join([chunk async for chunk in files.content(TENANT, record)])
                assert self.published.setdefault(file_id, content) == content
                ids = [json.loads(text)["custom_id"] for text in content.splitlines()]
                assert len(ids) == count
                told.update(ids)
        expected = Counter(self.inputs[batch.created.input_file_id])
        if batch.status in (Status.COMPLETED, Status.EXPIRED) and batch.total:
            assert told == expected
        else:
            assert told <= expected

    def _dispatched(self, batch: Batch) -> int:
        ids = set(self.inputs[batch.created.input_file_id])
        return sum(user in ids for user in self.way.dispatched)


async def _life(house: House) -> None:
    try:
        async with house.batches.running():
            await house.directory.died.wait()
    finally:
        house.directory.is_dead = True


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_invariants_hold_under_crashes(tmp_path: Path) -> None:
    with Valkey(tmp_path) as valkey:
        BatchesUnderCrashes.valkey = valkey
        machine = BatchesUnderCrashes.TestCase
        machine.settings = profile(
            max_examples=EXAMPLES, stateful_step_count=10, deadline=None, derandomize=True, phases=PHASES
        )
        machine().runTest()
