"""One worker: its state, and the pure transitions between states.

    unproven ──token──> ready ──misses, refusals, failures──> lost ──probe──> unproven
        ^________________________________________________________________________|

A worker is `ready` only after it generated a real token: vLLM answers `/health` with 200 while its engine is dead.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from app.catalogue import Variant, WorkerAddress
from app.workers.vllm_metrics import EngineLoad

FAILURES_UNTIL_LOST = 3


class State(StrEnum):
    UNPROVEN = "unproven"
    READY = "ready"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Condition:
    """What the gateway believes about a worker. `reason` says why it is not ready, in an operator's words."""

    state: State = State.UNPROVEN
    reason: str = "not probed yet"
    misses: int = 0
    failures: int = 0


def proven(condition: Condition) -> Condition:
    """It generated a token."""
    return Condition(State.READY, reason="")


def unproven(condition: Condition, reason: str) -> Condition:
    """It answers, but no token came from it, or it serves another model."""
    return Condition(State.UNPROVEN, reason)


def probed(condition: Condition) -> Condition:
    """A probe was answered. A lost worker has to prove itself again; a ready one stays ready."""
    if condition.state is State.LOST:
        return Condition(State.UNPROVEN, "answers again, no token yet")
    return replace(condition, misses=0)


def missed(condition: Condition, reason: str, limit: int) -> Condition:
    """A probe was not answered; `limit` of them in a row lose the worker."""
    misses = condition.misses + 1
    if misses >= limit or condition.state is not State.READY:
        return Condition(State.LOST, reason, misses=misses)
    return replace(condition, misses=misses)


def refused(condition: Condition, reason: str) -> Condition:
    """A connection was refused or broke at once: nothing listens there, whatever the last probe said."""
    return Condition(State.LOST, reason)


def failed(condition: Condition, reason: str) -> Condition:
    """A request broke on it before its first byte; several in a row lose the worker."""
    failures = condition.failures + 1
    if failures >= FAILURES_UNTIL_LOST:
        return Condition(State.LOST, reason)
    return replace(condition, failures=failures)


def succeeded(condition: Condition) -> Condition:
    """A request got its first byte from it."""
    return replace(condition, failures=0) if condition.failures else condition


@dataclass(slots=True, eq=False)
class Worker:
    """A worker as this process knows it. `in_flight` counts the attempts that this process has open on it."""

    address: WorkerAddress
    variant: Variant
    condition: Condition = field(default_factory=Condition)
    load: EngineLoad | None = None
    context_length: int | None = None
    in_flight: int = 0

    @property
    def id(self) -> str:
        return self.address.id

    @property
    def is_ready(self) -> bool:
        return self.condition.state is State.READY
