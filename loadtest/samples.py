"""Sums over samples: percentiles of one run, the spread over repeats."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


def percentile(samples: Sequence[float], q: float) -> float:
    """The nearest-rank percentile of unsorted samples: the smallest one with at least `q` (0..1] of them at or below.

    Raises:
        ValueError: no samples, or `q` outside (0, 1].
    """
    if not samples:
        raise ValueError("no samples")
    if not 0 < q <= 1:
        raise ValueError(f"percentile {q} is outside (0, 1]")
    return sorted(samples)[math.ceil(q * len(samples)) - 1]


@dataclass(frozen=True)
class Spread:
    """One figure over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Raises statistics.StatisticsError when there are no values."""
        return cls(statistics.median(values), min(values), max(values))
