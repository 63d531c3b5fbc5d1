"""Scores of a worker: pure functions to 0..1, higher is better."""

from __future__ import annotations

from collections.abc import Callable

from app.workers.worker import Worker


def idleness(worker: Worker) -> float:
    """The free share of its slots, by our own count or by the engine's, whichever is busier.

    Ours is exact but blind to other gateways; the engine's is up to a probe interval old.
    """
    busy = worker.in_flight
    if worker.load is not None:
        busy = max(busy, worker.load.running + worker.load.waiting)
    return max(0.0, 1.0 - busy / worker.address.slots)


SCORERS: tuple[tuple[Callable[[Worker], float], float], ...] = ((idleness, 1.0),)
