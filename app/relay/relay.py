"""The relay: attempts on workers, and a second one only before the first byte."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import msgspec

from app.errors import GatewayError, NoHealthyWorker, RequestQuarantined, UpstreamBadResponse, WorkerLost
from app.inference import InferenceRequest, TokenUsage
from app.relay.answer import JSON_TYPE, SSE_TYPE, Answer, BegunStream, StreamedAnswer, WholeAnswer
from app.relay.dialect import usage_of_answer
from app.relay.quarantine import Death, Fingerprint, Quarantine, cell_of
from app.relay.refusal import AttemptFailed, Fault, late_status, refusal
from app.relay.resumption import open_resumable
from app.relay.retry_budget import RetryBudget
from app.relay.upstream import ConnectFailed, Connection, Header, Upstream
from app.settings import Relay as Limits
from app.telemetry.account import Account
from app.telemetry.metrics import Metrics
from app.workers import worker as transitions
from app.workers.registry import Registry
from app.workers.worker import State, Worker

WHOLE_ANSWER_MAX_BYTES = 8 * 1024 * 1024
MOST_ATTEMPTS = 32
"""Above what rests and refusals leave room for within a request's patience: a bound, never a policy."""
LEFT_PAUSE_S = 0.25
"""Before an attempt on a worker that this process has left, and whose slots another gateway still offers."""
MOST_CASUALTIES = 1024
DYING_S = 10.0
"""How long after its connection was lost a request is a suspect, when its worker then turns out to be dead."""


class Slot(Protocol):
    """What the relay needs of a lease: where it may send, and a way to go elsewhere."""

    @property
    def worker_id(self) -> str: ...

    @property
    def waited_s(self) -> float: ...

    async def move(self, candidates: tuple[str, ...]) -> None: ...


class Relay:
    """Owns the connections to all workers, and learns from what happens on them."""

    def __init__(self, registry: Registry, limits: Limits, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._upstreams = {worker.id: Upstream(worker.address, limits, worker.progress) for worker in registry}
        self._budgets = {
            worker.variant.public_name: RetryBudget(limits.retry_share, limits.retries_per_s) for worker in registry
        }
        self._quarantine = Quarantine(limits.quarantine_s)
        self._deaths = Counter[str]()
        self._casualties: dict[str, deque[tuple[float, Fingerprint]]] = {
            worker.id: deque(maxlen=MOST_CASUALTIES) for worker in registry
        }
        registry.listen(self._on_state)

    def screen(self, request: InferenceRequest, candidates: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `candidates` that may get `request`. Raises RequestQuarantined."""
        if not self._quarantine:
            return candidates
        self._refuse_quarantined(request)
        # Requests without a tenant are everybody's: one sender of deadly ones must not confine them all.
        tenant = request.tenant
        if not tenant.is_anonymous and self._quarantine.confines(tenant.name, self._clock()):
            return (cell_of(tenant.name, candidates),)
        return candidates

    async def open(
        self, request: InferenceRequest, slot: Slot, candidates: tuple[str, ...], account: Account
    ) -> Answer:
        """The answer to `request`: see `attempt`, and `resumption` for streams of models that go on elsewhere."""
        if not request.stream or not self._resumes(request, slot):
            return await self.attempt(request, slot, candidates, account)
        carriers = _Carriers(self, self._registry, slot, candidates, account, request)
        return await open_resumable(request, carriers, self._limits, account, self._metrics, self._clock)

    def _resumes(self, request: InferenceRequest, slot: Slot) -> bool:
        wanted = request.tenant.resume
        return self._registry[slot.worker_id].variant.resumes if wanted is None else wanted

    async def attempt(
        self,
        request: InferenceRequest,
        slot: Slot,
        candidates: tuple[str, ...],
        account: Account,
        *,
        blamed: InferenceRequest | None = None,
    ) -> Answer:
        """The worker's answer to `request`, from its first body byte on.

        What failed before that byte is tried once more if the pool's retry budget has room. A worker that could not
        be reached, or that is full, did no work: then it is tried elsewhere for free. `blamed` is what a worker dies
        of, if it does: for a continuation the client's own request. Raises GatewayError.
        """
        suspect = blamed or request
        retried = False
        for attempt in range(MOST_ATTEMPTS):
            worker = self._registry[slot.worker_id]
            budget = self._budgets[worker.variant.public_name]
            if not attempt:
                budget.request(self._clock())
            account.admitted(worker.variant.name, slot.waited_s)
            try:
                return await self._attempt(request, worker, account, suspect)
            except AttemptFailed as error:
                failure = error
            await self._note(worker, failure)
            self._refuse_quarantined(suspect)
            if not failure.fault.is_free:
                if retried or failure.fault.is_final or not budget.take(self._clock()):
                    raise self._last_word(failure, candidates, worker)
                retried = True
            self._metrics.retries.labels(failure.fault).inc()
            await slot.move(self._elsewhere(candidates, worker, failure.fault))
            await self._rest(self._registry[slot.worker_id])
        raise failure.error

    def close(self) -> None:
        for upstream in self._upstreams.values():
            upstream.close()

    async def _attempt(
        self, request: InferenceRequest, worker: Worker, account: Account, blamed: InferenceRequest
    ) -> Answer:
        with ExitStack() as held:
            sent = self._clock()
            attempt = held.enter_context(_Attempt(self, blamed, worker, sent))
            body = request.body_for(worker.address.served_model)
            account.dispatched(sent)
            try:
                exchange = held.enter_context(
                    await self._upstreams[worker.id].send(request.route, _headers(request), body)
                )
            except ConnectFailed as error:
                raise AttemptFailed(
                    Fault.REFUSED, WorkerLost(f"No worker could be reached: {error}", retry_after_s=1)
                ) from None
            connection = attempt.connection = exchange.connection
            begun = await self._first_bytes(request, connection)
            attempt.has_begun = True
            now = self._clock()
            account.first_byte(now)
            self._registry.took(worker, now - sent)
            if request.stream and connection.headers[b"content-type"].startswith(SSE_TYPE):
                return StreamedAnswer(BegunStream(held.pop_all(), connection, begun), request, account, self._clock)
            account.usage = _usage_of(begun)
            return WholeAnswer(begun)

    async def _first_bytes(self, request: InferenceRequest, connection: Connection) -> bytes:
        """The first bytes of a stream, or the whole of any other answer. Raises GatewayError or AttemptFailed."""
        try:
            await connection.read_head()
            if connection.status == 200 and connection.headers.get(b"content-type", b"").startswith(SSE_TYPE):
                body = await _begun_stream(connection)
                late = late_status(body)
                if late is None:
                    return body
                status, body = late
            else:
                body = await _whole_body(connection)
                status = connection.status
        except UpstreamBadResponse as error:
            raise AttemptFailed(Fault.GARBAGE, error) from None
        except WorkerLost as error:
            error.retry_after_s = 1
            raise AttemptFailed(Fault.CUT if connection.has_body_begun else Fault.LOST, error) from None
        except GatewayError as error:
            raise AttemptFailed(Fault.TIMEOUT, error) from None
        if status != 200:
            raise refusal(
                status,
                body,
                route=request.route,
                model=request.resolved_model,
                retry_after=connection.headers.get(b"retry-after"),
            )
        if not connection.headers.get(b"content-type", b"").startswith(JSON_TYPE):
            raise AttemptFailed(Fault.GARBAGE, UpstreamBadResponse("The worker's answer is not JSON."))
        return body

    async def _note(self, worker: Worker, failure: AttemptFailed) -> None:
        """Let the registry know what the failure says about the worker. Back-pressure says nothing against it."""
        reason = failure.error.message
        if failure.fault is Fault.REFUSED:
            self._registry.change(worker, transitions.refused(worker.condition, reason))
        elif failure.fault is Fault.SATURATED:
            rest_s = min(failure.error.retry_after_s or 1.0, self._limits.rest_max_s)
            self._registry.change(worker, transitions.saturated(worker.condition, self._clock(), rest_s))
        else:
            self._failed(worker, reason)
            if failure.fault.is_loss and await self._upstreams[worker.id].refuses():
                self._registry.change(worker, transitions.refused(worker.condition, "it died at work"))

    def _failed(self, worker: Worker, reason: str) -> None:
        self._registry.penalise(worker)
        is_allowed = transitions.may_eject(self._registry.pool((worker.variant,)))
        self._registry.change(
            worker,
            transitions.failed(worker.condition, reason, self._clock(), self._limits, may_eject=is_allowed),
        )

    def _elsewhere(self, candidates: tuple[str, ...], worker: Worker, fault: Fault) -> tuple[str, ...]:
        """Where to try again: on the same worker only if it has to be, or if all that it needed was a rest."""
        others = tuple(other for other in candidates if other != worker.id)
        if fault is not Fault.SATURATED and self._serves_besides(candidates, worker):
            return others
        return (*others, worker.id)

    def _serves_besides(self, candidates: tuple[str, ...], worker: Worker) -> bool:
        return any(self._registry[other].condition.serves for other in candidates if other != worker.id)

    def _last_word(self, failure: AttemptFailed, candidates: tuple[str, ...], worker: Worker) -> GatewayError:
        """What the client hears when there is no other attempt: of a lost worker, whether any is left."""
        if failure.fault is Fault.LOST and not self._serves_besides(candidates, worker):
            return NoHealthyWorker("The only worker of this model was lost. Please try again later.", retry_after_s=1)
        return failure.error

    async def _rest(self, worker: Worker) -> None:
        """With a shared queue a slot may come up on a worker that only this process knows to be full or gone."""
        condition = worker.condition
        if condition.state is State.RESTING:
            await asyncio.sleep(max(0.0, condition.until - self._clock()))
        elif not condition.serves:
            await asyncio.sleep(LEFT_PAUSE_S)

    def left(self, attempt: _Attempt) -> None:
        """The exchange of an attempt is over, and its connection was given back."""
        worker, connection = attempt.worker, attempt.connection
        if connection is None:
            return
        failure = connection.failure
        if isinstance(failure, WorkerLost):
            self._casualties[worker.id].append((self._clock(), _fingerprint(attempt.blamed)))
            if worker.condition.state is State.LOST:
                self._blame(worker)
        if not attempt.has_begun:
            return
        if failure is not None:
            self._failed(worker, failure.message)
        elif connection.is_complete and worker.condition.failures:
            self._registry.change(worker, transitions.succeeded(worker.condition))

    def _on_state(self, worker: Worker) -> None:
        if worker.condition.state is State.STALLED:
            self._upstreams[worker.id].give_up(self._limits.stalled_gap_timeout_s)
        elif worker.condition.state is State.LOST:
            self._deaths[worker.id] += 1
            self._blame(worker)

    def _blame(self, worker: Worker) -> None:
        """The worker is dead: what it just held is suspect of having killed it."""
        casualties, now = self._casualties[worker.id], self._clock()
        death = Death(worker.id, self._deaths[worker.id])
        while casualties:
            lost, fingerprint = casualties.popleft()
            if now - lost <= DYING_S:
                self._quarantine.blame(fingerprint, death, now)

    def _refuse_quarantined(self, request: InferenceRequest) -> None:
        if self._quarantine and self._quarantine.holds(_fingerprint(request), self._clock()):
            raise RequestQuarantined("Workers died while they held this request; it is not tried again.")


class _Attempt:
    """One attempt on one worker, entered before it is dispatched and left when its answer is."""

    __slots__ = ("_relay", "_sent", "blamed", "connection", "has_begun", "worker")

    def __init__(self, relay: Relay, blamed: InferenceRequest, worker: Worker, sent: float) -> None:
        self._relay = relay
        self._sent = sent
        self.blamed = blamed
        self.worker = worker
        self.connection: Connection | None = None
        self.has_begun = False

    def __enter__(self) -> Self:
        if not self.worker.in_flight:  # a worker without work is silent because of that
            self.worker.progress.heard = self._sent
        self.worker.in_flight += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.in_flight -= 1
        self._relay.left(self)


def _fingerprint(request: InferenceRequest) -> Fingerprint:
    return Fingerprint.of(request.tenant.name, request.fields)


@dataclass(slots=True)
class _Carriers:
    """See `resumption.Carriers`."""

    relay: Relay
    registry: Registry
    slot: Slot
    candidates: tuple[str, ...]
    account: Account
    original: InferenceRequest

    @property
    def context_length(self) -> int | None:
        return self.registry[self.slot.worker_id].context_length

    @property
    def others(self) -> tuple[str, ...]:
        mine = self.registry[self.slot.worker_id]
        return tuple(
            worker_id
            for worker_id in self.candidates
            if worker_id != mine.id and self.registry[worker_id].variant is mine.variant
        )

    async def open(self, request: InferenceRequest) -> Answer:
        return await self.relay.attempt(request, self.slot, self.candidates, self.account, blamed=self.original)

    async def move(self) -> None:
        self.candidates = self.others
        await self.slot.move(self.candidates)


async def _begun_stream(connection: Connection) -> bytes:
    begun = await connection.read()
    if not begun:
        raise WorkerLost("The worker ended its answer before it began.")
    return begun


async def _whole_body(connection: Connection) -> bytes:
    parts = []
    size = 0
    while part := await connection.read():
        size += len(part)
        if size > WHOLE_ANSWER_MAX_BYTES:
            raise UpstreamBadResponse("The worker's answer is too large.")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _usage_of(body: bytes) -> TokenUsage | None:
    try:
        return usage_of_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise AttemptFailed(Fault.GARBAGE, UpstreamBadResponse("The worker's answer is not JSON.")) from None


def _headers(request: InferenceRequest) -> tuple[Header, ...]:
    return ((b"x-request-id", request.id.encode()), *request.trace_headers)
