"""How much work a worker is offered now. Pure: the time comes in as monotonic seconds."""

from __future__ import annotations

from math import ceil

from app.settings import Health
from app.workers.worker import Condition, Worker


def open_slots(worker: Worker, now: float, rules: Health) -> int:
    """The slots that may be held on `worker`, 0 while it should get no new work.

    Fewer than configured while it starts slowly after a return, while its engine works on requests that nobody holds a
    slot for (clients that left and were not noticed, other clients), and none while its KV cache is full. One slot
    stays open to it in spite of strangers: a count that never falls again must not shut a worker out for ever.
    """
    if not worker.is_ready or is_kv_full(worker, rules.kv_usage_max):
        return 0
    unclaimed = max(1, worker.slots - worker.strangers)
    return min(unclaimed, ramped(worker.slots, worker.condition, now, rules.slow_start_s))


def is_kv_full(worker: Worker, limit: float) -> bool:
    """Whether new work would only make the engine preempt old; an engine without work has room whatever it says."""
    load = worker.load
    return load is not None and load.kv_usage >= limit and load.running + load.waiting > 0


def ramped(slots: int, condition: Condition, now: float, slow_start_s: float) -> int:
    """The share of `slots` that a worker gets this long after its return: from one to all of them, linearly."""
    if condition.ready_since is None or slow_start_s <= 0:
        return slots
    share = (now - condition.ready_since) / slow_start_s
    return slots if share >= 1 else max(1, ceil(slots * share))


def is_ramping(condition: Condition, now: float, slow_start_s: float) -> bool:
    return condition.ready_since is not None and now - condition.ready_since < slow_start_s


def strangers_in(worker: Worker, held: int) -> int:
    """Requests in the engine that are not among the `held` slots, by the load that was just read."""
    if worker.load is None:
        return 0
    return max(0, worker.load.running + worker.load.waiting - held)
