"""Scores of a worker: pure functions to 0..1, higher is better, and what each weighs."""

from __future__ import annotations

import math
from collections.abc import Callable

from app.workers.worker import Worker

TOLERATED_SLOWNESS = 3.0
"""Prompts differ in length, so that equal workers look this different for a while."""


def busy(worker: Worker) -> int:
    """Requests that it carries, by our own count or by the engine's, whichever is higher.

    Ours is exact but blind to other gateways; the engine's is up to a probe interval old.
    """
    if worker.load is None:
        return worker.in_flight
    return max(worker.in_flight, worker.load.running + worker.load.waiting)


def idleness(worker: Worker) -> float:
    """The free share of its slots."""
    return max(0.0, 1.0 - busy(worker) / worker.slots)


def certainty(worker: Worker) -> float:
    """Whether its load is known. Stale knowledge means full: such a worker comes after all that have room, and among
    its like our own counts decide.
    """
    return 0.0 if worker.load is None else 1.0


def quickness(worker: Worker) -> float:
    """How soon it begins to answer, beside the quickest worker of its pool: 1 for about as soon."""
    return min(1.0, TOLERATED_SLOWNESS / worker.slowness)


# A worker that is ten times slower is preferred only to one with 70 % more of its slots taken.
SCORERS: tuple[tuple[Callable[[Worker], float], float], ...] = (
    (idleness, 1.0),
    (certainty, 1.0),
    (quickness, 1.0),
)

# What the prompt adds under the policy `prefix`: the share of it that the worker has cached, and the share that it can
# cache without dropping other prompts. At two to one, a full cache gives a prompt away to one with room when less than
# a third of it is in there. Preble weighs the same two costs and the load (arXiv:2407.00023).
AFFINITY_WEIGHT = 2.0
ROOM_WEIGHT = 1.0


def load_limit(worker: Worker, pool_busy: int, pool_slots: int, bound: float) -> int:
    """Requests that a worker may carry, the next one included, and still be preferred for its cache.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, arXiv:1608.01350): ⌈c·(m + 1)/n⌉ with m
    requests on n workers, here in proportion to each one's slots. At least one worker is always below its limit.
    """
    return math.ceil(bound * (pool_busy + 1) * worker.slots / pool_slots)
