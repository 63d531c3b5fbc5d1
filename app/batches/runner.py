"""Carries batches through their life: one task that looks at what is to do, and a task for each thing that it began.

look ──▶ inspect the input ──▶ run ranges of lines ──▶ close: seal, publish, retire
 └── every tick, on every gateway: whoever claims a piece of work does it, and anybody may go on with it
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from app.batches.batch import Batch, Closed, Closing, Fault, IllegalEvent, Progress, Rejected, Status, Validated
from app.batches.claims import Claims, renewal_s
from app.batches.files import FileRecord, Files, made_at, new_id
from app.batches.journal import Journal, Overtaken, RangeLog, Sealed
from app.batches.line_runs import LineRuns, RangeRun
from app.batches.lines import Head, Inspection, Line, Record, Sound, not_run, read_lines
from app.batches.storage import Missing
from app.errors import ObjectNotFound, StorageUnavailable
from app.settings import Batches as Limits
from app.telemetry.logs import Log
from app.telemetry.metrics import Metrics

ORPHAN_S = 60.0
SWEEP_S = 600.0
WIND_DOWN_S = 3.0  # at a stop, for lines that are being answered: given up, they would be computed twice
STOP_S = 3.0  # and then for what is finished to be stored
LOOK_PAUSE_S = 0.05
GIVE_WAY_S = 0.2
INSPECTED_BYTES = 32 * 1024  # in one go, about a millisecond
EXPIRED = "This request could not be executed before the completion window expired."


@dataclass(frozen=True, slots=True)
class Shelf:
    """What the work is done on."""

    files: Files
    journal: Journal
    claims: Claims


class Runner:
    """Runs the batches of all tenants on one gateway. `now` is wall time, `clock` monotonic, both in seconds."""

    def __init__(
        self,
        shelf: Shelf,
        runs: LineRuns,
        knows_model: Callable[[str, str], bool],
        is_quiet: Callable[[], bool],
        limits: Limits,
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self._files = shelf.files
        self._journal = shelf.journal
        self._claims = shelf.claims
        self._runs = runs
        self._knows_model = knows_model
        self._is_quiet = is_quiet
        self._limits = limits
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._now = now
        self._due = asyncio.Event()
        self._known: dict[str, Batch] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ranges: dict[str, RangeRun] = {}
        self._sweep_at = 0.0
        self._is_out = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do the work. In the end what is being answered is finished, for seconds, and stored; the rest is let go."""
        looking = asyncio.create_task(self._run())
        beside = [asyncio.create_task(work) for work in (self._renew(), self._give_way())]
        try:
            yield
        finally:
            looking.cancel()
            tasks = list(self._tasks.values())
            for run in self._ranges.values():
                run.wind_down()
            await _ended(tasks, WIND_DOWN_S)
            for run in self._ranges.values():
                run.stop()
            for task in await _ended(tasks, STOP_S):
                task.cancel()
            for task in beside:
                task.cancel()
            await asyncio.gather(looking, *beside, *tasks, return_exceptions=True)
            await self._claims.close()

    def wake(self) -> None:
        """There is something new: look at once."""
        self._due.set()

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
                self._is_out = False
            except StorageUnavailable as error:
                if not self._is_out:
                    self._log.warning("batches wait for their storage", reason=error.reason)
                self._is_out = True
            except Exception:  # noqa: BLE001 - one bad look must not be the last
                self._log.exception("batches were not looked at")
            await asyncio.sleep(min(LOOK_PAUSE_S, self._limits.tick_s))
            timer = asyncio.get_running_loop().call_later(self._limits.tick_s, self._due.set)
            await self._due.wait()
            timer.cancel()
            self._due.clear()

    async def _renew(self) -> None:
        while True:
            await self._claims.renew()
            await asyncio.sleep(renewal_s(self._limits.lease_s))

    async def _give_way(self) -> None:
        while True:
            try:
                await self._runs.give_way()
            except Exception:  # noqa: BLE001 - requests wait a little longer; the next time may be better
                self._log.exception("lines did not give way")
            await asyncio.sleep(GIVE_WAY_S)

    # looking

    async def _look(self) -> None:
        if self._is_quiet():
            for run in self._ranges.values():
                run.wind_down()
            return
        active = await self._journal.active()
        known = {batch_id: batch for batch_id in active if (batch := await self._latest(batch_id)) is not None}
        self._known = known
        for run in self._ranges.values():
            if not known.get(run.batch.id, run.batch).may_run or run.batch.id not in known:
                run.stop()
        self._runs.tend(batch.model for batch in known.values() if batch.may_run)
        await self._runs.look()
        seen: Counter[str] = Counter()
        for batch in sorted(known.values(), key=lambda batch: (self._held_of(batch), batch.id)):
            await self._attend(batch, seen)
        self._show(seen)
        if self._clock() >= self._sweep_at:
            self._sweep_at = self._clock() + SWEEP_S * random.uniform(0.5, 1.5)  # noqa: S311 - spreads gateways out
            self._begin("sweep", self._sweep)

    async def _latest(self, batch_id: str) -> Batch | None:
        batch = self._known.get(batch_id)
        if batch is not None:
            return await self._journal.refresh(batch)
        batch = await self._journal.find_active(batch_id)
        if batch is None and self._now() - made_at(batch_id) > ORPHAN_S:
            await self._journal.forget(batch_id)
        return batch

    async def _attend(self, batch: Batch, seen: Counter[str]) -> None:
        """Begin what this batch needs next, if nobody else does it."""
        if batch.status.is_final:
            await self._journal.retire(batch)
        elif batch.closing is not None or batch.status is Status.CANCELLING or batch.is_overdue(self._now()):
            await self._claim(f"{batch.id}.close", lambda: self._close(batch))
        elif batch.status is Status.VALIDATING:
            await self._claim(f"{batch.id}.inspect", lambda: self._inspect(batch))
        else:
            await self._run_ranges(batch, seen)

    def _held_of(self, batch: Batch) -> int:
        return sum(run.batch.id == batch.id for run in self._ranges.values())

    def _show(self, seen: Counter[str]) -> None:
        for state in ("pending", "completed", "failed"):
            self._metrics.batch_lines.labels(state).set(seen[state])
        self._metrics.batch_lines_in_flight.set(self._runs.in_flight)

    # beginning

    async def _claim(self, subject: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        if subject not in self._tasks and await self._claims.take([subject]):
            self._begin(subject, work)

    def _begin(self, subject: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        if subject not in self._tasks:
            self._tasks[subject] = asyncio.create_task(self._do(subject, work))

    async def _do(self, subject: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except StorageUnavailable as error:
            self._log.warning("a part of a batch waits for the storage", reason=error.reason)
            await asyncio.sleep(self._limits.tick_s)
        except (Overtaken, IllegalEvent, Missing, ObjectNotFound):
            pass  # somebody else did it, or it is not to be done any more: the next look tells
        except Exception:  # noqa: BLE001 - a task: nobody else would hear of it, and the next look tries again
            self._log.exception("a part of a batch was not done", batch=subject.partition(".")[0])
            await asyncio.sleep(self._limits.tick_s)
        finally:
            del self._tasks[subject]
            await self._claims.release([subject])
            self._due.set()

    # each thing

    async def _inspect(self, batch: Batch) -> None:
        """Look through the input, line by line; what follows is one event."""
        inspection = Inspection(
            batch.created.endpoint, self._limits, lambda model: self._knows_model(batch.tenant, model)
        )
        try:
            record = await self._input(batch)
            async for chunk in self._files.content(batch.tenant, record):
                for start in range(0, len(chunk), INSPECTED_BYTES):
                    inspection.feed(chunk[start : start + INSPECTED_BYTES])
                    await asyncio.sleep(0)  # others have their turn: this is nobody's hurry
                if inspection.is_over:
                    break
            result = inspection.result()
        except (ObjectNotFound, Missing):
            result = (Fault("input_file_not_found", "The input file does not exist any more."),)
        at = int(self._now())
        if isinstance(result, Sound):
            after = await self._journal.append(batch, Validated(at=at, model=result.model, ranges=result.ranges))
        else:
            after = await self._journal.append(batch, Rejected(at=at, faults=result))
            self._ended(after)
        self._log.info("batch validated", batch=batch.id, status=after.status.value, lines=after.total)

    async def _run_ranges(self, batch: Batch, seen: Counter[str]) -> None:
        heads = await self._journal.heads(batch)
        open_ranges = [index for index, run in enumerate(batch.ranges) if not _is_full(heads.get(index), run.lines)]
        progress = sum((head.progress for head in heads.values()), Progress())
        seen.update(pending=batch.total - progress.lines, completed=progress.completed, failed=progress.failed)
        if not open_ranges:
            await self._claim(f"{batch.id}.close", lambda: self._close(batch))
            return
        wanted = self._runs.room(batch.model)
        if wanted <= 0:
            return
        subjects = {f"{batch.id}.{index}": index for index in open_ranges}
        free = [subject for subject in subjects if subject not in self._tasks]
        count = -(-wanted // self._limits.range_lines)
        for subject in await self._claims.take(free, count):
            self._begin_range(subject, batch, subjects[subject])

    def _begin_range(self, subject: str, batch: Batch, index: int) -> None:
        run = self._runs.range(batch, index, lambda: self._claims.holds(subject))
        self._ranges[subject] = run
        self._begin(subject, lambda: self._run_range(subject, run))

    async def _run_range(self, subject: str, run: RangeRun) -> None:
        try:
            record = await self._input(run.batch)
            place = run.batch.ranges[run.index]
            text = await self._files.part(run.batch.tenant, record, place.start, place.end)
            await run.complete(read_lines(text))
        finally:
            del self._ranges[subject]

    async def _close(self, batch: Batch) -> None:
        """Bring a batch to its end. Every step may have been done before, by a gateway that did not get further."""
        if batch.closing is None:
            batch = await self._journal.append(batch, self._closing(batch))
        closing = batch.closing
        assert closing is not None  # noqa: S101 - follows from the event
        if closing.outcome is not Status.COMPLETED and not await self._seal_all(batch, closing.outcome):
            return
        progress = sum((head.progress for head in (await self._journal.heads(batch)).values()), Progress())
        if progress.completed:
            await self._publish(batch, closing.output_file_id, are_good=True)
        if progress.failed:
            await self._publish(batch, closing.error_file_id, are_good=False)
        closed = Closed(
            at=int(self._now()),
            progress=progress,
            has_output=bool(progress.completed),
            has_errors=bool(progress.failed),
        )
        batch = await self._journal.append(batch, closed)
        self._ended(batch)
        await self._journal.retire(batch)

    def _closing(self, batch: Batch) -> Closing:
        outcome = Status.COMPLETED
        if batch.status is Status.CANCELLING:
            outcome = Status.CANCELLED
        elif batch.is_overdue(self._now()):
            outcome = Status.EXPIRED
        now = self._now()
        output, errors = new_id("file-", now), new_id("file-", now)
        return Closing(at=int(now), outcome=outcome, output_file_id=output, error_file_id=errors)

    async def _seal_all(self, batch: Batch, outcome: Status) -> bool:
        """Close every range to more records; False while some of them are still another gateway's."""
        heads = await self._journal.heads(batch)
        unsealed = [index for index, run in enumerate(batch.ranges) if not _is_over(heads.get(index), run.lines)]
        for index in unsealed:
            subject = f"{batch.id}.{index}"
            if not await self._claims.take([subject]):
                return False
            try:
                await self._seal(batch, index, outcome)
            finally:
                await self._claims.release([subject])
        return True

    async def _seal(self, batch: Batch, index: int, outcome: Status) -> None:
        place = batch.ranges[index]
        lines: list[Line] = []
        if outcome is Status.EXPIRED:
            text = await self._files.part(batch.tenant, await self._input(batch), place.start, place.end)
            lines = read_lines(text)

        def of_the_rest(done: set[int]) -> list[Record]:
            return [not_run(at, line, "batch_expired", EXPIRED) for at, line in enumerate(lines) if at not in done]

        log = await self._journal.read_range(batch, index, RangeLog())
        try:
            await self._journal.commit(batch, index, log, of_the_rest, seal=True)
        except Sealed:
            return

    async def _publish(self, batch: Batch, file_id: str, *, are_good: bool) -> None:
        async def parts() -> AsyncIterator[bytes]:
            for index in range(len(batch.ranges)):
                records = await self._journal.records(batch, index)
                if text := b"".join(record.text for record in records if record.is_good is are_good):
                    yield text

        name = f"{batch.id}_{'output' if are_good else 'error'}.jsonl"
        await self._files.publish(batch.tenant, file_id, parts(), name, "batch_output", batch.created.outputs_kept_s)

    async def _input(self, batch: Batch) -> FileRecord:
        return await self._files.find_input(batch.tenant, batch.created.input_file_id)

    def _ended(self, batch: Batch) -> None:
        took_s = max(0, int(self._now()) - batch.created.at)
        self._metrics.batch_duration.labels(batch.status).observe(took_s)
        progress = batch.closed.progress if batch.closed is not None else Progress()
        self._log.info(
            "batch ended",
            batch=batch.id,
            status=batch.status.value,
            lines=batch.total,
            completed=progress.completed,
            failed=progress.failed,
            duration_s=took_s,
        )

    async def _sweep(self) -> None:
        files = await self._files.sweep({batch.created.input_file_id for batch in self._known.values()})
        records = await self._journal.sweep(self._limits.batches_kept_s, self._limits.keys_kept_s)
        if files or records:
            self._log.info("batches swept", files=files, records=records)


async def _ended(tasks: Iterable[asyncio.Task[None]], timeout_s: float) -> set[asyncio.Task[None]]:
    """Wait for the end of all of these; those that have not ended in time."""
    running = {task for task in tasks if not task.done()}
    return (await asyncio.wait(running, timeout=timeout_s))[1] if running else running


def _is_over(head: Head | None, lines: int) -> bool:
    """Whether a range can get no more records."""
    return head is not None and (head.is_sealed or _is_full(head, lines))


def _is_full(head: Head | None, lines: int) -> bool:
    return head is not None and head.progress.lines >= lines
