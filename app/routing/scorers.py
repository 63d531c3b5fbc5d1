"""Scores of a worker: pure functions to 0..1, higher is better."""

from __future__ import annotations

from collections.abc import Callable

from app.workers.worker import Worker

UNKNOWN_LOAD_SHARE = 0.01
"""Of its idleness that a worker without readable metrics keeps: below all others, among its like by our own counts."""
TOLERATED_SLOWNESS = 3.0
"""Prompts differ in length, so that equal workers look this different for a while."""


def idleness(worker: Worker) -> float:
    """The free share of its slots, by our own count or by the engine's, whichever is busier.

    Ours is exact but blind to other gateways; the engine's is up to a probe interval old. Stale knowledge means full.
    """
    busy = worker.in_flight
    if worker.load is not None:
        busy = max(busy, worker.load.running + worker.load.waiting)
    free = max(0.0, 1.0 - busy / worker.address.slots)
    return free if worker.load is not None else free * UNKNOWN_LOAD_SHARE


def quickness(worker: Worker) -> float:
    """How soon it begins to answer, beside the quickest worker of its pool: 1 for about as soon."""
    return min(1.0, TOLERATED_SLOWNESS / worker.slowness)


# A worker that is ten times slower is preferred only to one with 70 % more of its slots taken.
SCORERS: tuple[tuple[Callable[[Worker], float], float], ...] = ((idleness, 1.0), (quickness, 1.0))
