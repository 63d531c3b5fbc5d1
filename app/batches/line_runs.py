"""Lines on their way through the gateway, as many at a time as there is slack for."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from math import ceil
from types import TracebackType
from typing import Protocol, Self

from app.batches.batch import Batch
from app.batches.journal import Journal, RangeLog, Sealed
from app.batches.lines import Line, Record, answered, refused
from app.batches.slack import Seen, Slack
from app.errors import (
    GatewayError,
    InternalError,
    InvalidRequest,
    InvalidValue,
    RequestQuarantined,
    StorageUnavailable,
    Unavailable,
    UnsupportedParameter,
    WorkerLost,
    jittered,
)
from app.gateway import Gateway
from app.inference import Band, InferenceRequest, Route
from app.settings import Batches as Limits
from app.settings import Parameters
from app.telemetry.account import PREEMPTED
from app.telemetry.logs import Log
from app.telemetry.metrics import Metrics
from app.tenant import Tenant

REST_MAX_S = 10.0
COMMIT_BYTES = 1024 * 1024
STORAGE_REST_S = 1.0
PACE_S = 0.2
AHEAD_S = 1.0
SPEED_WEIGHT = 0.1


class Gate:
    """Lets so many lines of one model pass at a time, first come first served; how many may change at any moment.

    `interactive` are the slots that others hold now: what they took or left since the latest look is at once less or
    more for lines, of which there are `most` at the most.
    """

    def __init__(self, interactive: Callable[[], int], most: int) -> None:
        self.slack = Slack()
        self._interactive = interactive
        self._most = most
        self._interactive_seen = 0
        self.inside = 0
        self.passed_ever = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        if self._waiting or self.inside >= self._limit:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave()
                elif turn in self._waiting:  # or it was passed over, as it was cancelled already
                    self._waiting.remove(turn)
                raise
        else:
            self.inside += 1
        self.passed_ever += 1
        try:
            yield
        finally:
            self._leave()

    def set(self, slack: Slack, interactive: int) -> None:
        """From a look that saw so many others."""
        self.slack, self._interactive_seen = slack, interactive
        self._let_in()

    def narrow(self, lines: int) -> None:
        """So many are on their way out, and their places are not theirs to give: until the next look."""
        self.slack = replace(self.slack, limit=max(0, min(self.slack.limit, self.inside) - lines))

    @property
    def _limit(self) -> int:
        return (
            min(self._most, self.slack.limit + self._interactive_seen - self._interactive()) if self.slack.limit else 0
        )

    def _leave(self) -> None:
        self.inside -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self.inside < self._limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self.inside += 1
                turn.set_result(None)


class Preempted(Exception):
    """The line gave its slot to a better request: it is sent again, as if it had not been."""


class Preemption:
    """Lets a line be taken off its worker while this is entered: see `InferenceRequest.on_preempt`.

    What is called ends the task's present wait, which raises Preempted here; as in `asyncio.timeout`, a cancellation
    that comes from elsewhere in the same moment stays one.
    """

    __slots__ = ("_cancelling", "_is_open", "_task", "has_happened")

    def __init__(self) -> None:
        self.has_happened = False
        self._is_open = False

    def __call__(self) -> None:
        if self._is_open and not self.has_happened:
            self.has_happened = True
            self._task.cancel(PREEMPTED)

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - inside a coroutine there is one
        self._task, self._cancelling, self._is_open = task, task.cancelling(), True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        if self.has_happened and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise Preempted from error


class Pace:
    """How fast lines pass a gate, from looks at how many have: the mean of the latest second or so."""

    def __init__(self) -> None:
        self.per_s = 0.0
        self._passed = 0
        self._at = 0.0

    def look(self, passed: int, now: float) -> None:
        elapsed_s = now - self._at
        if elapsed_s >= PACE_S:
            self.per_s += min(1.0, elapsed_s) * ((passed - self._passed) / elapsed_s - self.per_s)
            self._passed, self._at = passed, now


class Sight(Protocol):
    """What there is to see of a model's workers: see `meter.Meter`."""

    async def look(self, name: str) -> Seen: ...

    def interactive(self, name: str) -> int: ...

    async def give_way(self, name: str) -> int: ...


class LineRuns:
    """Sends lines to the gateway in the band `batch`, under the name of the tenant whose they are."""

    def __init__(
        self,
        gateway: Gateway,
        journal: Journal,
        sight: Sight,
        tenant: Callable[[str], Tenant],
        limits: Limits,
        parameters: Parameters,
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float],
    ) -> None:
        self.journal = journal
        self.limits = limits
        self._gateway = gateway
        self._sight = sight
        self._tenant = tenant
        self._parameters = parameters
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._gates: dict[str, Gate] = {}
        self._paces: dict[str, Pace] = {}
        self._tokens_per_s: dict[str, float] = {}
        self._runs: set[RangeRun] = set()

    @property
    def in_flight(self) -> int:
        return sum(gate.inside for gate in self._gates.values())

    def tend(self, models: Iterable[str]) -> None:
        """These models have batches; gates of others that nobody uses are forgotten."""
        wanted = set(models)
        for model in wanted.difference(self._gates):
            self._gates[model] = Gate(partial(self._sight.interactive, model), self.limits.lines_in_flight)
        for model in [
            name for name, gate in self._gates.items() if not (name in wanted or gate.inside or gate.waiting)
        ]:
            del self._gates[model]
            self._paces.pop(model, None)
            self._tokens_per_s.pop(model, None)

    async def look(self) -> None:
        """Let as many lines pass as there is slack for now."""
        for model, gate in list(self._gates.items()):
            seen = await self._sight.look(model)
            most, target_s = self.limits.lines_in_flight, self.limits.ttft_target_s
            self._paces.setdefault(model, Pace()).look(gate.passed_ever, self._clock())
            gate.set(gate.slack.look(seen, gate.inside, most=most, ttft_target_s=target_s), seen.interactive)

    async def give_way(self) -> None:
        """Make room for interactive requests that wait, whichever process they came to."""
        for model, gate in list(self._gates.items()):
            if gate.inside:
                given = await self._sight.give_way(model)
                if given:
                    gate.narrow(given)

    def room(self, model: str) -> int:
        """How many more lines are wanted at hand, so that none of those in flight is missed until the next looks."""
        at_hand = sum(run.left for run in self._runs if run.batch.model == model)
        limit = self._gates[model].slack.limit
        return limit + ceil(self._paces[model].per_s * AHEAD_S) - at_hand if limit else 0

    def range(self, batch: Batch, index: int, is_held: Callable[[], bool]) -> RangeRun:
        run = RangeRun(self, batch, index, is_held, self._gates[batch.model])
        self._runs.add(run)
        return run

    def left(self, run: RangeRun) -> None:
        self._runs.discard(run)

    async def answer(self, batch: Batch, index: int, line: Line, *, is_protected: bool) -> Record:
        """One dispatch of one line. Raises what may go better another time; Preempted unless it `is_protected`."""
        began = self._clock()
        try:
            with Preemption() as preemption:
                record = await self._answer(batch, index, line, None if is_protected else preemption)
        except Preempted:
            self._metrics.batch_preemptions.inc()
            in_vain = self._tokens_per_s.get(batch.model, 0.0) * (self._clock() - began)
            self._metrics.batch_preempted_tokens.inc(in_vain)
            raise
        self._learn(batch.model, record, self._clock() - began)
        return record

    def _learn(self, model: str, record: Record, took_s: float) -> None:
        """How fast lines generate, for what those that are taken away have generated in vain."""
        if record.cost.output_tokens and took_s > 0:
            per_s = record.cost.output_tokens / took_s
            known = self._tokens_per_s.get(model, per_s)
            self._tokens_per_s[model] = known + SPEED_WEIGHT * (per_s - known)

    async def _answer(self, batch: Batch, index: int, line: Line, on_preempt: Callable[[], None] | None) -> Record:
        request_id = secrets.token_hex(16)
        try:
            request = self._request(batch, line, request_id)
            request.on_preempt = on_preempt
            body = await self._ask(request)
            record = answered(index, line, request_id, body)
        except (InvalidRequest, RequestQuarantined) as error:
            if error.status == 429:
                raise
            record = refused(index, line, request_id, error)
        except GatewayError:
            raise  # may go better another time
        except Exception:  # noqa: BLE001 - a bug of ours costs this line, not the batch
            self._log.exception("a line was not answered", request_id=request_id, batch=batch.id)
            record = refused(index, line, request_id, InternalError("The server had an error while processing it."))
        return record

    def ended(self, records: list[Record]) -> None:
        """These are stored."""
        for record in records:
            self._metrics.batch_lines_ended.labels("completed" if record.is_good else "failed").inc()

    def _request(self, batch: Batch, line: Line, request_id: str) -> InferenceRequest:
        request = InferenceRequest.parse(
            bytes(line.body),
            request_id=request_id,
            route=Route(batch.created.endpoint),
            arrived=self._clock(),
            limits=self._parameters,
            tenant=self._tenant(batch.tenant),
        )
        if request.stream:
            raise UnsupportedParameter("A line of a batch cannot be streamed.", param="stream")
        if request.model != batch.model:
            raise InvalidValue("All lines of a batch ask for the same model.", param="model")
        request.band = Band.BATCH
        request.batch_id = batch.id
        return request

    async def _ask(self, request: InferenceRequest) -> bytes:
        with await self._gateway.serve(request) as reply:
            parts = []
            while part := await reply.answer.next():
                parts.append(part)
            if not reply.answer.is_whole:
                raise WorkerLost("The worker broke while it answered.")
            return b"".join(parts)


class RangeRun:
    """One range on its way: its lines through the gate, their records to the journal, in groups."""

    def __init__(self, runs: LineRuns, batch: Batch, index: int, is_held: Callable[[], bool], gate: Gate) -> None:
        self.batch = batch
        self.index = index
        self.left = batch.ranges[index].lines
        self._runs = runs
        self._is_held = is_held
        self._gate = gate
        self._log = RangeLog()
        self._lines: set[asyncio.Task[None]] = set()
        self._finished: list[Record] = []
        self._news = asyncio.Event()
        self._can_store = asyncio.Event()
        self._can_store.set()
        self._is_stopping = False

    def wind_down(self) -> None:
        """Send nothing any more; what is on its way is still answered and stored."""
        self._is_stopping = True

    def stop(self) -> None:
        """Send nothing any more, and give up what is on its way. What is finished is still stored."""
        self._is_stopping = True
        for task in self._lines:
            task.cancel()
        self._news.set()

    async def complete(self, lines: list[Line]) -> None:
        """Until every line has a record, or the range is no longer ours. Raises StorageUnavailable when stopped."""
        try:
            await self._runs.journal.read_range(self.batch, self.index, self._log)
            is_open = not self._log.head.is_sealed  # or a batch that has ended would be worked on
            missing = [(at, line) for at, line in enumerate(lines) if is_open and at not in self._log.done]
            self.left = len(missing)
            self._lines = {asyncio.create_task(self._line(at, line)) for at, line in missing}
            if self._is_stopping:
                self.stop()
            await self._store()
        finally:
            for task in self._lines:
                task.cancel()
            self._runs.left(self)

    async def _store(self) -> None:
        """Commit what is finished, in groups, until nothing is on its way."""
        while self._lines or self._finished:
            await self._news.wait()
            self._news.clear()
            if self._lines and sum(len(record.text) for record in self._finished) < COMMIT_BYTES:
                await asyncio.sleep(self._runs.limits.commit_interval_s)
            try:
                await self._commit()
                self._can_store.set()
            except StorageUnavailable:
                if self._is_stopping:
                    raise
                self._can_store.clear()  # what could not be stored is not computed
                self._news.set()
                await asyncio.sleep(STORAGE_REST_S)
            except Sealed:
                self.stop()
                self._finished = []

    async def _commit(self) -> None:
        group = self._finished[:]
        stored = await self._runs.journal.commit(
            self.batch, self.index, self._log, lambda done: [record for record in group if record.index not in done]
        )
        del self._finished[: len(group)]
        self._runs.ended(stored)

    async def _line(self, at: int, line: Line) -> None:
        try:
            record = await self._try(at, line)
            if record is not None:
                self._finished.append(record)
        finally:
            self.left -= 1
            task = asyncio.current_task()
            assert task is not None  # noqa: S101 - inside a coroutine there is one
            self._lines.discard(task)
            self._news.set()

    async def _try(self, at: int, line: Line) -> Record | None:
        """Its record; None if it is not ours to send any more."""
        attempts = preemptions = 0
        while True:
            await self._can_store.wait()
            async with self._gate.passed():
                if not self._may_send(at):
                    return None
                try:
                    is_protected = preemptions >= self._runs.limits.preemptions_per_line
                    return await self._runs.answer(self.batch, at, line, is_protected=is_protected)
                except Preempted:
                    preemptions += 1
                    continue  # behind all others: in front, the same ones were taken until they keep their slots
                except GatewayError as error:
                    # What nobody worked on does not count: no worker, no slot, a limit of the tenant's.
                    if not isinstance(error, Unavailable) and error.status != 429:
                        attempts += 1
                        if attempts >= self._runs.limits.attempts_per_line:
                            return refused(at, line, "", error)
                    rest_s = min(error.retry_after_s or 1.0, REST_MAX_S)
            await asyncio.sleep(jittered(rest_s))

    def _may_send(self, at: int) -> bool:
        return self._is_held() and not self._is_stopping and at not in self._log.done
