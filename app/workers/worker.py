"""One worker: its state, and the pure transitions between states. Times are monotonic seconds, passed in.

                      saturated
                ready <───────> resting                     it says that it is full: no new work for some seconds
                ^ │ │ │ rest is over
          token │ │ │ └─ failures in a row ──> ejected      for a time that doubles; never more than half of a pool
                │ │ └─── silence ────────────> stalled      it takes connections and says nothing
                │ └───── refused connection ─> lost         nothing listens
                │                                │
             unproven <── probe answered, time is over ──┘

A worker is `ready` only after it generated a real token: vLLM answers `/health` with 200 while its engine is dead. So
every way back leads through `unproven`, except from a rest, which says nothing against the worker. From every state one
leads to `leaving`: it is not in the configuration any more, and only finishes what it holds. The ejection rule is
Envoy's outlier detection with consecutive failures.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf

from app import settings
from app.catalogue import Variant, WorkerAddress
from app.workers.vllm_metrics import EngineLoad

LATENCY_WEIGHT = 0.3
"""Of the newest sample in the moving average."""
LATENCY_FADING = 0.9
"""What is left of a worker's latency after a look at it during which no request went to it."""
QUICK_S = 0.02
"""Nobody is quicker than this: below it, latencies tell of the network and of chance."""
FAILURE_SLOWNESS = 30.0
"""A failure counts as so many times the latency of the quickest worker: who fails fast must not look fast."""
FAILURE_LATENCY_S = (5.0, 60.0)
"""The latency that a failure counts as while no other worker's is known, and the most that it counts as."""


class State(StrEnum):
    UNPROVEN = "unproven"
    READY = "ready"
    RESTING = "resting"
    EJECTED = "ejected"
    STALLED = "stalled"
    LOST = "lost"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Condition:
    """What the gateway believes about a worker. `reason` says why it is not ready, in an operator's words.

    `until` ends a rest or an ejection. `ready_since` is None for a worker that was never ready, and -inf for one whose
    first proof it was: only a worker that returns starts slowly. `ejections` is how often it was ejected in a row.
    """

    state: State = State.UNPROVEN
    reason: str = "not probed yet"
    misses: int = 0
    failures: int = 0
    until: float = -inf
    ready_since: float | None = None
    ejections: int = 0

    @property
    def serves(self) -> bool:
        """Whether work may wait for it: it is ready, or will be without having to prove itself again."""
        return self.state is State.READY or self.state is State.RESTING


def _left(condition: Condition, state: State, reason: str, until: float = -inf) -> Condition:
    return Condition(state, reason, until=until, ready_since=condition.ready_since, ejections=condition.ejections)


def proven(condition: Condition, now: float = -inf) -> Condition:
    """It generated a token."""
    since = -inf if condition.ready_since is None else now
    return Condition(State.READY, "", ready_since=since, ejections=condition.ejections)


def unproven(condition: Condition, reason: str) -> Condition:
    """It answers, but no token came from it, or it serves another model."""
    return _left(condition, State.UNPROVEN, reason)


def probed(condition: Condition) -> Condition:
    """A probe was answered. A worker that was lost or stalled has to prove itself again."""
    if condition.state is State.LOST or condition.state is State.STALLED:
        return unproven(condition, "answers again, no token yet")
    return replace(condition, misses=0) if condition.misses else condition


def leaving(condition: Condition) -> Condition:
    """Nobody is to be sent to it any more."""
    return _left(condition, State.LEAVING, "not in the configuration any more")


def missed(condition: Condition, reason: str, limit: int) -> Condition:
    """A probe was not answered; `limit` of them in a row and a worker that serves is one that stalls."""
    misses = condition.misses + 1
    if misses >= limit or not condition.serves:
        return replace(_left(condition, State.STALLED, reason), misses=misses)
    return replace(condition, misses=misses)


def stalled(condition: Condition, reason: str) -> Condition:
    """It holds work, says nothing, and does not generate a token when asked for one."""
    return _left(condition, State.STALLED, reason)


def refused(condition: Condition, reason: str) -> Condition:
    """A connection was refused: nothing listens there, whatever the last probe said."""
    return _left(condition, State.LOST, reason)


def saturated(condition: Condition, now: float, rest_s: float) -> Condition:
    """It said that it is full: back-pressure, not a failure."""
    if not condition.serves:
        return condition
    return replace(
        condition, state=State.RESTING, reason="says that it is full", until=max(condition.until, now + rest_s)
    )


def failed(condition: Condition, reason: str, now: float, rules: settings.Relay, *, may_eject: bool) -> Condition:
    """A request broke on it; several in a row eject it, each time for twice as long, up to a limit.

    An ejection is forgiven when the worker was ready for longer than it had been ejected for.
    """
    if not condition.serves:
        return condition
    failures = condition.failures + 1
    if failures < rules.failures_until_ejected or not may_eject:
        return replace(condition, failures=failures)
    ready_for = now - (condition.ready_since if condition.ready_since is not None else -inf)
    is_forgiven = ready_for > _ejection_s(condition.ejections, rules)
    ejections = 1 if is_forgiven else condition.ejections + 1
    ejected = _left(condition, State.EJECTED, reason, until=now + _ejection_s(ejections, rules))
    return replace(ejected, ejections=ejections)


def _ejection_s(ejections: int, rules: settings.Relay) -> float:
    # The exponent is bounded: a float has no room for the power of a number that only ever grows.
    return min(rules.ejection_s * 2.0 ** min(ejections - 1, 30), rules.ejection_max_s)


def may_eject(pool: Collection[Worker]) -> bool:
    """Whether one more worker of `pool` may be ejected: at least half of all must go on serving.

    When everything fails there is no better place to send work to, and real traffic is what shows that it is repaired.
    """
    return (sum(worker.condition.serves for worker in pool) - 1) * 2 >= len(pool)


def succeeded(condition: Condition) -> Condition:
    """It answered a request whole."""
    return replace(condition, failures=0) if condition.failures else condition


def elapsed(condition: Condition, now: float) -> Condition:
    """What time alone changes: a rest and an ejection end."""
    if now < condition.until:
        return condition
    if condition.state is State.RESTING:
        return replace(condition, state=State.READY, reason="", until=-inf)
    if condition.state is State.EJECTED:
        return unproven(condition, "its ejection is over, no token yet")
    return condition


def smoothed(latency_s: float, sample_s: float) -> float:
    """The moving average after one more sample; 0 is a worker that nothing is known of yet."""
    return sample_s if not latency_s else latency_s + LATENCY_WEIGHT * (sample_s - latency_s)


def penalised(latency_s: float, quickest_s: float) -> float:
    """The latency that a worker is held to have after a failure, beside the quickest other of its pool (0: unknown)."""
    at_least, at_most = FAILURE_LATENCY_S
    return max(latency_s, min(FAILURE_SLOWNESS * max(quickest_s, QUICK_S) if quickest_s else at_least, at_most))


@dataclass(slots=True)
class Pace:
    """The lowest latency in a pool, in seconds, shared by its workers; 0 while none is known."""

    quickest_s: float = 0.0


@dataclass(slots=True)
class Progress:
    """When a worker was last seen at work: a byte of an answer, or a token that its own metrics count."""

    heard: float = -inf


@dataclass(slots=True, eq=False)
class Worker:
    """A worker as this process knows it.

    `in_flight` counts the attempts that this process has open on it. `strangers` are the requests that its engine
    works on and that nobody here holds a slot for. `limit` is what was found to be worth while of the slots of a worker
    that adapts. `latency_s` is the moving average from dispatch to first byte, 0 while it is unknown. `doubt` is what
    speaks against its version.
    """

    address: WorkerAddress
    variant: Variant
    condition: Condition = field(default_factory=Condition)
    load: EngineLoad | None = None
    context_length: int | None = None
    doubt: str | None = None
    limit: int | None = None
    in_flight: int = 0
    strangers: int = 0
    latency_s: float = 0.0
    is_latency_fresh: bool = False
    pace: Pace = field(default_factory=Pace)
    progress: Progress = field(default_factory=Progress)

    @property
    def id(self) -> str:
        return self.address.id

    @property
    def slots(self) -> int:
        """The most that it is to hold at once."""
        return self.address.slots if self.limit is None else self.limit

    @property
    def is_ready(self) -> bool:
        return self.condition.state is State.READY

    @property
    def slowness(self) -> float:
        """How many times the latency of its pool's quickest worker it has; at least 1, also while one is unknown."""
        quickest_s = self.pace.quickest_s
        return max(1.0, self.latency_s / max(quickest_s, QUICK_S)) if quickest_s else 1.0
