"""What is said of adaptive slots follows from what was read."""

from __future__ import annotations

from loadtest.adaptive import AUTO, Brought, Limit, figures, round_ratios

FOUND: dict[Limit, Brought] = {
    AUTO: Brought([90.0, 60.0, 99.0], [0, 0, 2, 0], [7, 7, 8]),
    4: Brought([70.0, 70.0, 70.0], [0], [4, 4, 4]),
    8: Brought([100.0, 50.0, 99.0], [0], [8, 8, 8]),
}


def test_auto_is_compared_with_the_best_static_limit_of_the_same_round() -> None:
    assert round_ratios(FOUND) == [0.9, 1.2, 1.0]


def test_the_table_tells_every_round_and_how_often_more_than_one_waited() -> None:
    page = figures(FOUND)
    assert "| `auto` | 7 7 8 | 90.0 (90.0 60.0 99.0) | 2 | 75.0% |" in page
    assert "median 1.000 (0.900 1.200 1.000)" in page
