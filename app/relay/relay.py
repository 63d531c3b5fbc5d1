"""The relay: attempts on workers, and a second one only before the first byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from app.catalogue import Cascade
from app.errors import GatewayError, NoHealthyWorker
from app.inference import InferenceRequest
from app.relay.answer import Answer, BegunStream, StreamedAnswer, WholeAnswer
from app.relay.attempt import Attempt, usage_of
from app.relay.blame import Blame
from app.relay.doubt import HeldStream, armed, disarmed, doubt_of, tokens_of
from app.relay.refusal import AttemptFailed, Fault
from app.relay.resumption import Resume, open_resumable
from app.relay.retry_budget import RetryBudget
from app.relay.upstream import Upstream
from app.settings import Relay as Limits
from app.telemetry.account import Account
from app.telemetry.metrics import Metrics
from app.workers.registry import Registry
from app.workers.worker import State, Worker

MOST_ATTEMPTS = 32
"""Above what rests and refusals leave room for within a request's patience: a bound, never a policy."""
LEFT_PAUSE_S = 0.25
"""Before an attempt on a worker that this process has left, and whose slots another gateway still offers."""


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
        for fault in Fault:  # each from 0: where a series begins with 1, nobody sees its first increase
            metrics.retries.labels(fault)
        for end in Resume:
            metrics.resumes.labels(end)
        self._clock = clock
        self._upstreams: dict[str, Upstream] = {}
        self._budgets: dict[str, RetryBudget] = {}
        self._blame = Blame(registry, limits, clock)
        registry.follow(self)
        registry.listen(self._on_state)

    def joined(self, worker: Worker) -> None:
        """Be ready to reach it, by the address that it has now."""
        upstream = self._upstreams.get(worker.id)
        if upstream is None:
            self._upstreams[worker.id] = Upstream(worker.address, self._limits, worker.progress)
        else:
            upstream.address = worker.address

    def left(self, worker: Worker) -> None:
        """What it holds goes on."""

    def forgotten(self, worker: Worker) -> None:
        self._upstreams.pop(worker.id).close()
        self._blame.forget(worker)

    def screen(self, request: InferenceRequest, candidates: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `candidates` that may get `request`. Raises RequestQuarantined; NoHealthyWorker for none."""
        if not candidates:  # those of a name that stands for nobody now
            raise NoHealthyWorker("There is no worker of this model now. Please try again later.", retry_after_s=1)
        return self._blame.screen(request, candidates)

    async def open(
        self, request: InferenceRequest, slot: Slot, candidates: tuple[str, ...], account: Account
    ) -> Answer:
        """The answer to `request`: see `attempt`, and `resumption` for streams of models that go on elsewhere."""
        if not request.stream or not self._resumes(request, slot):
            return await self.attempt(request, slot, candidates, account)
        carriers = _Carriers(self, self._registry, slot, candidates, account, request)
        return await open_resumable(request, carriers, self._limits, account, self._metrics, self._clock)

    async def open_doubted(
        self, request: InferenceRequest, slot: Slot, candidates: tuple[str, ...], account: Account, cascade: Cascade
    ) -> tuple[Answer, float]:
        """The answer of a cascade's small variant, and how unsure of it that is. Raises GatewayError.

        A stream's beginning has been waited for, and comes with the rest.
        """
        asking = armed(request, cascade.calibrated.top_logprobs)
        answer = await self.attempt(asking, slot, candidates, account, blamed=request)
        if not isinstance(answer, StreamedAnswer):
            body = await answer.next()
            return WholeAnswer(disarmed(body, request)), doubt_of(tokens_of(body), cascade)
        held = HeldStream(answer.stream, request, account, self._clock)
        try:
            return held, doubt_of(await held.hear(cascade.hold_tokens), cascade)
        except BaseException:
            held.close()
            raise

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
            budget = self._budget(worker)
            if not attempt:
                budget.request(self._clock())
            account.admitted(worker.variant.name, slot.waited_s)
            try:
                return await self._attempt(request, worker, account, suspect)
            except AttemptFailed as error:
                failure = error
            account.attempt_failed(failure.fault)
            await self._note(worker, failure)
            self._blame.refuse_quarantined(suspect)
            if not failure.fault.is_free:
                if retried or failure.fault.is_final or not budget.take(self._clock()):
                    raise self._last_word(failure, candidates, worker)
                retried = True
            self._metrics.retries.labels(failure.fault).inc()
            account.redispatched(failure.fault)
            await slot.move(self._elsewhere(candidates, worker, failure.fault))
            await self._rest(self._registry[slot.worker_id])
        raise failure.error

    def _budget(self, worker: Worker) -> RetryBudget:
        """Of the worker's pool; there are as many as variants were ever configured."""
        name = worker.variant.public_name
        budget = self._budgets.get(name)
        if budget is None:
            budget = self._budgets[name] = RetryBudget(self._limits.retry_share, self._limits.retries_per_s)
        return budget

    def close(self) -> None:
        for upstream in self._upstreams.values():
            upstream.close()

    async def _attempt(
        self, request: InferenceRequest, worker: Worker, account: Account, blamed: InferenceRequest
    ) -> Answer:
        sent = self._clock()
        attempt = Attempt(worker, self._upstreams[worker.id], blamed, self._blame.left, sent)
        try:
            account.dispatched(sent, worker.id)
            begun = await attempt.begin(request, account.trace_headers)
            now = self._clock()
            account.first_byte(now)
            self._registry.took(worker, now - sent)
            if request.stream and attempt.is_stream:
                return StreamedAnswer(BegunStream(attempt, begun), request, account, self._clock)
            account.usage = usage_of(begun)
        except BaseException:
            attempt.close()
            raise
        attempt.close()
        return WholeAnswer(begun)

    async def _note(self, worker: Worker, failure: AttemptFailed) -> None:
        self._blame.failed(worker, failure)
        if failure.fault.is_loss and await self._upstreams[worker.id].refuses():
            self._blame.died(worker)

    def _on_state(self, worker: Worker) -> None:
        if worker.condition.state is State.STALLED:
            self._upstreams[worker.id].give_up(self._limits.stalled_gap_timeout_s)
        elif worker.condition.state is State.LOST:
            self._blame.lost(worker)
        elif worker.condition.state is State.READY:
            self._blame.lives(worker)

    def _elsewhere(self, candidates: tuple[str, ...], worker: Worker, fault: Fault) -> tuple[str, ...]:
        """Where to try again: on the same worker only if it has to be, or if all that it needed was a rest."""
        others = tuple(other for other in candidates if other != worker.id and self._registry.find(other))
        if fault is not Fault.SATURATED and self._serves_besides(candidates, worker):
            return others
        return (*others, worker.id)

    def _serves_besides(self, candidates: tuple[str, ...], worker: Worker) -> bool:
        others = (self._registry.find(other) for other in candidates if other != worker.id)
        return any(other.condition.serves for other in others if other is not None)

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
        known = (self.registry.find(worker_id) for worker_id in self.candidates if worker_id != mine.id)
        same = mine.variant.public_name
        return tuple(other.id for other in known if other is not None and other.variant.public_name == same)

    async def open(self, request: InferenceRequest) -> Answer:
        return await self.relay.attempt(request, self.slot, self.candidates, self.account, blamed=self.original)

    async def move(self) -> None:
        self.candidates = self.others
        await self.slot.move(self.candidates)
