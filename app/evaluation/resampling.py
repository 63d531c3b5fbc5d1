"""Error bars: how much a figure would move if other texts or items of the same kind had been drawn. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from app.card import Estimate

DRAWS = 1000
DIGITS = 6  # significant; more would only record the order of floating-point sums
TAIL = 0.025  # left out at either end of a 95 % interval

T = TypeVar("T")


def bootstrap(
    groups: Sequence[Sequence[T]], statistic: Callable[[Sequence[Sequence[T]]], float], seed: int, draws: int = DRAWS
) -> Estimate:
    """`statistic` of the groups, with the interval of its values when each group is drawn anew with replacement.

    The percentile bootstrap (Efron 1979): texts, or items, are what varies, not the tokens within them. The same seed
    gives the same interval, whatever was resampled before.
    """
    random = Random(seed)  # noqa: S311 - statistics, no secret
    drawn = sorted(statistic([random.choices(group, k=len(group)) for group in groups]) for _ in range(draws))
    last = len(drawn) - 1
    value, low, high = statistic(groups), drawn[round(TAIL * last)], drawn[round((1 - TAIL) * last)]
    return Estimate(value=shortened(value), low=shortened(low), high=shortened(high))


def shortened(value: float) -> float:
    """`value` in DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")
