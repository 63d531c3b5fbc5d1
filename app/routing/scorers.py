"""Scores of a worker: pure functions to 0..1, higher is better."""

from __future__ import annotations

from collections.abc import Callable
from math import log10

from app.workers.worker import Worker

UNKNOWN_LOAD_SHARE = 0.01
"""Of its idleness that a worker without readable metrics keeps: below all others, among its like by our own counts."""
QUICKEST_S = 0.001
LATENCY_DECADES = 5.0


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
    """How soon it begins to answer: 1 at a millisecond or where nothing is known, a fifth less for ten times more.

    The logarithm makes it a comparison of ratios, so that one weight serves pools of milliseconds and of minutes.
    """
    if worker.latency_s <= QUICKEST_S:
        return 1.0
    return max(0.0, 1.0 - log10(worker.latency_s / QUICKEST_S) / LATENCY_DECADES)


# With these weights a worker that is ten times slower is preferred only to one with 40 % more of its slots in use.
SCORERS: tuple[tuple[Callable[[Worker], float], float], ...] = ((idleness, 1.0), (quickness, 2.0))
