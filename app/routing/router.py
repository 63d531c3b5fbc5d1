"""The router: filter → score → order, with reasons.

A score is in 0..1, higher is better. To add one: write a function of a worker in `scorers`, give it a weight in
`SCORERS`. The order is total and deterministic: equal scores keep the catalogue's order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from app.routing.scorers import SCORERS
from app.workers.worker import Worker


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may serve the request, what it scored, and why it may (or can't yet)."""

    worker_id: str
    score: float
    reason: str


def rank(pool: Iterable[Worker]) -> tuple[Candidate, ...]:
    """Every worker of the pool, best first.

    Workers that are not ready stay in the ranking, last: they have no slots now, and a request that waits takes the
    first slot that comes up anywhere, theirs too.
    """
    candidates = [_candidate(worker) for worker in pool]
    if len(candidates) > 1:
        candidates.sort(key=_worst_last)
    return tuple(candidates)


def _candidate(worker: Worker) -> Candidate:
    if not worker.is_ready:
        return Candidate(worker.id, -1.0, worker.condition.reason)
    return Candidate(worker.id, sum(weight * score(worker) for score, weight in SCORERS), "ready")


def _worst_last(candidate: Candidate) -> float:
    return -candidate.score
