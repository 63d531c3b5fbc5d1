import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.samples import Spread, percentile


@pytest.mark.parametrize(
    ("samples", "q", "expected"),
    [
        ([7], 0.5, 7),
        ([3, 1, 2], 0.5, 2),
        ([4, 3, 2, 1], 0.5, 2),
        (range(1, 101), 0.99, 99),
        (range(1, 101), 1.0, 100),
        (range(1, 201), 0.99, 198),
        ([5, 5, 5, 900], 0.75, 5),
        ([5, 5, 5, 900], 0.76, 900),
    ],
)
def test_percentile_is_the_nearest_rank(samples: list[int], q: float, expected: int) -> None:
    assert percentile(samples, q) == expected


@given(st.lists(st.integers(), min_size=1), st.floats(0.01, 1.0))
def test_at_least_q_of_the_samples_are_at_or_below_the_percentile(samples: list[int], q: float) -> None:
    found = percentile(samples, q)
    assert found in samples
    assert sum(sample <= found for sample in samples) >= q * len(samples) - 1e-9
    assert sum(sample < found for sample in samples) < q * len(samples)


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)


@pytest.mark.parametrize("q", [0, -0.1, 1.1, 99])
def test_percentile_takes_a_fraction(q: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        percentile([1], q)


def test_spread_keeps_median_and_extremes() -> None:
    assert Spread.of([3.0, 9.0, 4.0]) == Spread(4.0, 3.0, 9.0)


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(statistics.StatisticsError):
        Spread.of([])
