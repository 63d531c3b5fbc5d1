"""The last minutes in steps of some seconds: what each variant did in each. Pure; wall-clock time comes in.

Steps are numbered from the epoch, so that those of several processes can be added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf

import msgspec

from app.telemetry.metrics import TTFT_BUCKETS
from app.telemetry.tally import NOTHING_YET, Tally

STEP_S = 5.0
STEPS_KEPT = 60
LATELY = 12
"""Steps, a minute, that a variant's present figures are taken over."""

Steps = Mapping[int, Mapping[str, Tally]]
"""Number of a step → public name of a variant → what it did then. A step in which nothing happened is there, empty."""


def step_at(now: float) -> int:
    """The number of the step that this moment of wall-clock time is in."""
    return int(now // STEP_S)


class History:
    """What the variants of one process did, step by step, for STEPS_KEPT steps."""

    def __init__(self) -> None:
        self._totals: Mapping[str, Tally] = {}
        self.steps: dict[int, dict[str, Tally]] = {}

    def take(self, step: int, totals: Mapping[str, Tally]) -> None:
        """`step` has ended, with these totals since the process began."""
        grown = {name: total.since(self._totals.get(name, NOTHING_YET)) for name, total in totals.items()}
        self._totals = totals
        self.steps[step] = {name: tally for name, tally in grown.items() if tally}
        for old in [known for known in self.steps if known <= step - STEPS_KEPT]:
            del self.steps[old]


def added(histories: Iterable[Steps]) -> Steps:
    """Several processes' steps as one's."""
    found: dict[int, dict[str, Tally]] = {}
    for steps in histories:
        for number, tallies in steps.items():
            step = found.setdefault(number, {})
            for name, tally in tallies.items():
                step[name] = step.get(name, NOTHING_YET) + tally
    return found


class Pace(msgspec.Struct, frozen=True):
    """Rates a second, and quantiles of TTFT in seconds, None where no stream got a token."""

    tokens_per_s: float
    requests_per_s: float
    ttft_p50_s: float | None
    ttft_p95_s: float | None


class Traffic(msgspec.Struct, frozen=True):
    """The paces of STEPS_KEPT steps of `step_s` each, oldest first; None before any process was there to tell."""

    step_s: float
    paces: list[Pace | None]
    lately: Pace


def pace(tallies: Sequence[Tally], over_s: float) -> Pace:
    """What these amount to when they took so long together."""
    total = sum(tallies, NOTHING_YET)
    return Pace(
        total.tokens / over_s,
        total.ended / over_s,
        ttft_quantile(total.ttfts, 0.5),
        ttft_quantile(total.ttfts, 0.95),
    )


def traffic(steps: Steps, last: int) -> Traffic:
    """All variants together, up to the step `last`."""
    numbers = range(last - STEPS_KEPT + 1, last + 1)
    paces = [pace(list(steps[number].values()), STEP_S) if number in steps else None for number in numbers]
    lately = [steps[number] for number in numbers[-LATELY:] if number in steps]
    total = [tally for step in lately for tally in step.values()]
    return Traffic(STEP_S, paces, pace(total, STEP_S * max(1, len(lately))))


def pace_of(variant: str, steps: Steps, last: int) -> Pace:
    """One variant's, over the steps of the last minute."""
    lately = [steps[number] for number in range(last - LATELY + 1, last + 1) if number in steps]
    return pace([step.get(variant, NOTHING_YET) for step in lately], STEP_S * max(1, len(lately)))


def ttft_quantile(counts: Mapping[int, float], quantile: float) -> float | None:
    """The quantile of a histogram over TTFT_BUCKETS, linear within a bucket, as Prometheus' `histogram_quantile`.

    Beyond the last edge nothing is known but that edge.
    """
    total = sum(counts.values())
    if not total:
        return None
    rank, below = quantile * total, 0.0
    edges = (0.0, *TTFT_BUCKETS, inf)
    for bucket in sorted(counts):
        if below + counts[bucket] >= rank:
            low, high = edges[bucket], edges[bucket + 1]
            return low if high == inf else low + (high - low) * (rank - below) / counts[bucket]
        below += counts[bucket]
    return edges[-2]
