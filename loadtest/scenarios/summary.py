"""Sums over calls: what was served, how long it took, how evenly. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from loadtest.pacing import NS
from loadtest.samples import percentile
from loadtest.scenarios.calls import Call

WAITED_IN_VAIN = "queue_timeout"
REFUSED_AT_ONCE = frozenset({"overloaded", "tenant_queue_full"})
GRANT_TRANSIT_S = 0.05
"""From Redis, where the deadline is judged, to the gateway's account: a grant in the last moment is none too late."""
TRANSIT_S = 0.1
"""The same, and on to the engine."""


def p(values: Sequence[float], q: float) -> float | None:
    """A percentile; None without samples."""
    return percentile(values, q) if values else None


def tokens_per_s(calls: Iterable[Call], begin_ns: int, end_ns: int) -> float:
    """Tokens of whole answers that ended in the window, per second of it. What was cut off or refused is no use."""
    tokens = sum(call.tokens for call in calls if call.is_served and begin_ns <= call.ended_ns < end_ns)
    return tokens * NS / (end_ns - begin_ns)


def due_between(calls: Iterable[Call], begin_ns: int, end_ns: int) -> list[Call]:
    return [call for call in calls if begin_ns <= call.due_ns < end_ns]


def of_band(calls: Iterable[Call], band: str) -> list[Call]:
    return [call for call in calls if call.ask.band == band]


def served_share(calls: Sequence[Call]) -> float | None:
    """Of all that were asked, 0..1."""
    return sum(call.is_served for call in calls) / len(calls) if calls else None


def ttfts_s(calls: Iterable[Call]) -> list[float]:
    """Of those that got a token."""
    return [call.ttft_s for call in calls if call.first_ns]


def durations_s(calls: Iterable[Call]) -> list[float]:
    return [call.took_s for call in calls if call.is_served]


def waits_s(calls: Iterable[Call], arrived_ns: Mapping[str, int]) -> list[float]:
    """From when each call was due until a worker had it: the wait for a slot, and both ways' transit."""
    return [(arrived_ns[call.ask.name] - call.due_ns) / NS for call in calls if call.ask.name in arrived_ns]


def refusals_s(calls: Iterable[Call]) -> list[float]:
    """How long those waited who were refused on arrival."""
    return [call.took_s for call in calls if call.code in REFUSED_AT_ONCE]


def granted_late(calls: Iterable[Call]) -> int:
    """Calls that waited for their slot longer than their clients' patience, by the gateway's own account."""
    return sum(call.queued_ms > 1e3 * (call.ask.patience_s + GRANT_TRANSIT_S) for call in calls)


def late_at_engine(calls: Iterable[Call], arrived_ns: Mapping[str, int]) -> int:
    """Calls that reached an engine when their clients' patience was over, and a transit's time more."""
    return sum(
        (arrived_ns[call.ask.name] - call.sent_ns) / NS > call.ask.patience_s + TRANSIT_S
        for call in calls
        if call.ask.name in arrived_ns and call.sent_ns
    )


def endings(calls: Iterable[Call]) -> Counter[str]:
    """How the calls ended: `served`, an error's code, or `open`."""
    return Counter(_ending(call) for call in calls)


def _ending(call: Call) -> str:
    if call.is_served:
        return "served"
    return call.code or ("open" if not call.ended_ns else f"status_{call.status}")


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index, (Σx)² / (n·Σx²): 1 for equal shares, 1/n when one has all. 1 when nobody has anything.

    Jain, Chiu, Hawe, "A Quantitative Measure of Fairness", DEC-TR-301, 1984.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
