"""What attempts say about their workers, and about the requests that workers die of."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable

from app.errors import RequestQuarantined, WorkerLost
from app.inference import InferenceRequest
from app.relay.attempt import Attempt
from app.relay.quarantine import Death, Fingerprint, Quarantine, cell_of
from app.relay.refusal import AttemptFailed, Fault
from app.settings import Relay as Limits
from app.workers import worker as transitions
from app.workers.registry import Registry
from app.workers.worker import State, Worker

MOST_CASUALTIES = 1024
DYING_S = 10.0
"""How long after its connection was lost a request is a suspect, when its worker then turns out to be dead."""


class Blame:
    """Turns failed attempts into states of workers, and deaths of workers into quarantined requests.

    Does no I/O; `clock` is monotonic seconds.
    """

    def __init__(self, registry: Registry, limits: Limits, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._limits = limits
        self._clock = clock
        self._quarantine = Quarantine(limits.quarantine_s)
        self._deaths = Counter[str]()
        self._dead = set[str]()
        self._casualties: defaultdict[str, deque[tuple[float, Fingerprint]]] = defaultdict(
            lambda: deque(maxlen=MOST_CASUALTIES)
        )

    def screen(self, request: InferenceRequest, candidates: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `candidates` that may get `request`. Raises RequestQuarantined."""
        if not self._quarantine:
            return candidates
        self.refuse_quarantined(request)
        # Requests without a tenant are everybody's: one sender of deadly ones must not confine them all.
        tenant = request.tenant
        if not tenant.is_anonymous and self._quarantine.confines(tenant.name, self._clock()):
            return (cell_of(tenant.name, candidates),)
        return candidates

    def refuse_quarantined(self, request: InferenceRequest) -> None:
        """Raises RequestQuarantined for a request that workers died of."""
        if self._quarantine and self._quarantine.holds(_fingerprint(request), self._clock()):
            raise RequestQuarantined("Workers died while they held this request; it is not tried again.")

    def failed(self, worker: Worker, failure: AttemptFailed) -> None:
        """An attempt on `worker` failed before its first byte. Back-pressure says nothing against it."""
        if failure.fault is Fault.REFUSED:
            self._registry.change(worker, transitions.refused(worker.condition, failure.error.message))
        elif failure.fault is Fault.SATURATED:
            rest_s = min(failure.error.retry_after_s or 1.0, self._limits.rest_max_s)
            self._registry.change(worker, transitions.saturated(worker.condition, self._clock(), rest_s))
        else:
            self._broke(worker, failure.error.message)

    def died(self, worker: Worker) -> None:
        """It lost a connection, and nothing listens there any more."""
        self._registry.change(worker, transitions.refused(worker.condition, "it died at work"))

    def lost(self, worker: Worker) -> None:
        """It was found dead: what it just held is suspect of having killed it.

        While it dies it may be found silent in between, and dead again: that is one death.
        """
        if worker.id not in self._dead:
            self._dead.add(worker.id)
            self._deaths[worker.id] += 1
        self._suspect(worker)

    def lives(self, worker: Worker) -> None:
        """It is ready, so it can die again."""
        self._dead.discard(worker.id)

    def forget(self, worker: Worker) -> None:
        """It is gone for good."""
        self._deaths.pop(worker.id, None)
        self._dead.discard(worker.id)
        self._casualties.pop(worker.id, None)

    def left(self, attempt: Attempt) -> None:
        """The exchange of an attempt is over, and its connection was given back."""
        worker, connection = attempt.worker, attempt.connection
        if connection is None:
            return
        failure = connection.failure
        if isinstance(failure, WorkerLost):
            self._casualties[worker.id].append((self._clock(), _fingerprint(attempt.blamed)))
            if worker.condition.state is State.LOST:
                self._suspect(worker)
        if not attempt.has_begun:
            return
        if failure is not None:
            self._broke(worker, failure.message)
        elif connection.is_complete and worker.condition.failures:
            self._registry.change(worker, transitions.succeeded(worker.condition))

    def _broke(self, worker: Worker, reason: str) -> None:
        self._registry.penalise(worker)
        is_allowed = transitions.may_eject(self._registry.pool((worker.variant,)))
        self._registry.change(
            worker,
            transitions.failed(worker.condition, reason, self._clock(), self._limits, may_eject=is_allowed),
        )

    def _suspect(self, worker: Worker) -> None:
        casualties, now = self._casualties[worker.id], self._clock()
        death = Death(worker.id, self._deaths[worker.id])
        while casualties:
            lost, fingerprint = casualties.popleft()
            if now - lost <= DYING_S:
                self._quarantine.blame(fingerprint, death, now)


def _fingerprint(request: InferenceRequest) -> Fingerprint:
    return Fingerprint.of(request.tenant.name, request.fields)
