"""Makes the snapshots and hands them to whoever watches. While nobody does, all that happens is counting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import msgspec

from app.admission.roster import QueuedAdmission
from app.batches.batch import Batch, Progress
from app.batches.batches import Batches
from app.catalogue import Catalogue
from app.console.board import Board, Record
from app.console.history import History, step_at
from app.console.queue import QueueView, queue_view
from app.console.snapshot import ROWS_SHOWN, Parts, snapshot
from app.drain import Drain
from app.errors import GatewayError, Overloaded
from app.telemetry.metrics import Metrics
from app.telemetry.refusals import Count, Refusals
from app.workers.registry import Registry

INTERVAL_S = 1.0
BATCHES_EVERY_S = 5.0
"""Storage is not asked more often than this."""
PART_TIMEOUT_S = 2.0
"""A part that takes longer is left out of a snapshot: the console must show what is well while something is not."""
VIEWERS_MOST = 16
LATE_S = 10.0

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Sources:
    """What the console looks at. `clock` is monotonic, `wall` is not."""

    catalogue: Catalogue
    registry: Registry
    admission: QueuedAdmission
    metrics: Metrics
    refusals: Refusals
    batches: Batches | None
    drain: Drain
    is_guarded: bool
    started: float
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time


class Viewer:
    """Somebody who watches."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen = 0

    async def next(self) -> bytes:
        """The latest snapshot that it has not seen, as JSON; those before it are gone. Raises TimeoutError."""
        async with asyncio.timeout(LATE_S):
            self._seen, latest = await self._console.later_than(self._seen)
        return latest


class Console:
    """Counts, in steps, what this process does; makes a snapshot a second as long as there are viewers."""

    def __init__(self, sources: Sources, board: Board) -> None:
        self._of = sources
        self._board = board
        self._history = History()
        self._step = step_at(sources.wall())
        self._viewers: set[Viewer] = set()
        self._batches: Sequence[tuple[Batch, Progress]] | None = None
        self._batches_at = float("-inf")
        self._number = 0
        self._latest = b""
        self._made = asyncio.Event()
        self._wanted = asyncio.Event()

    @contextmanager
    def viewer(self) -> Iterator[Viewer]:
        """A place to watch from. Raises Overloaded when there is none left."""
        if len(self._viewers) >= VIEWERS_MOST:
            raise Overloaded(f"{VIEWERS_MOST} consoles are open already.", retry_after_s=10)
        viewer = Viewer(self)
        self._viewers.add(viewer)
        self._wanted.set()
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)

    async def later_than(self, number: int) -> tuple[int, bytes]:
        """The latest snapshot and its number, as soon as that is not `number`."""
        if self._number == number or not number:
            await self._made.wait()
        return self._number, self._latest

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._board.close()

    async def _run(self) -> None:
        while True:
            record = self._record()
            self._board.write(record)
            if self._viewers:
                self._publish(await self._snapshot(record))
            self._wanted.clear()
            try:
                async with asyncio.timeout(INTERVAL_S):
                    await self._wanted.wait()
            except TimeoutError:
                continue

    def _publish(self, made: bytes) -> None:
        self._number, self._latest = self._number + 1, made
        told, self._made = self._made, asyncio.Event()
        told.set()

    def _record(self) -> Record:
        """What only this process knows."""
        now, wall = self._of.clock(), self._of.wall()
        step, self._step = self._step, step_at(wall)
        if step != self._step:
            self._history.take(self._step - 1, self._of.metrics.tallies())
        then = wall - now
        recent = [
            (kind, Count(count.count, then + count.first, then + count.last))
            for kind, count in self._of.refusals.recent(now)
        ]
        return Record(self._of.metrics.requests_in_flight(), self._history.steps, recent)

    async def _snapshot(self, record: Record) -> bytes:
        of = self._of
        queue, batches = await self._queue(), await self._unfinished()
        parts = Parts(
            at=of.wall(),
            started=of.started,
            status="draining" if of.drain.is_quiet else "ready" if of.registry.any_ready else "not ready",
            degraded=of.admission.is_degraded,
            guarded=of.is_guarded,
            models=of.catalogue.models,
            workers=list(of.registry),
            queue=queue,
            batches=batches,
            records=[record, *self._board.others()],
        )
        return _encode(snapshot(parts))

    async def _queue(self) -> QueueView | None:
        try:
            async with asyncio.timeout(PART_TIMEOUT_S):
                return queue_view(await self._of.admission.overview())
        except (TimeoutError, GatewayError):
            return None

    async def _unfinished(self) -> Sequence[tuple[Batch, Progress]] | None:
        if self._of.batches is not None and self._of.clock() - self._batches_at >= BATCHES_EVERY_S:
            try:
                async with asyncio.timeout(PART_TIMEOUT_S):
                    self._batches = await self._of.batches.unfinished(ROWS_SHOWN)
            except (TimeoutError, GatewayError):
                self._batches = None
            self._batches_at = self._of.clock()
        return self._batches
