"""The curve of a cascade, from what both of its variants answered."""

from __future__ import annotations

import pytest

from loadtest.cascade import Answered, point, threshold_for

SEEN = [
    Answered("arithmetic", small_right=True, large_right=True, doubts={"margin": 0.1}, small_s=1, large_s=2),
    Answered("arithmetic", small_right=False, large_right=True, doubts={"margin": 0.9}, small_s=1, large_s=2),
    Answered("arithmetic", small_right=True, large_right=False, doubts={"margin": 0.5}, small_s=1, large_s=2),
    Answered("arithmetic", small_right=False, large_right=False, doubts={"margin": 0.3}, small_s=1, large_s=2),
]


@pytest.mark.parametrize(
    ("share", "right", "cost"), [(0.0, 0.5, 0.5), (0.25, 0.75, 0.75), (0.5, 0.5, 1.0), (1.0, 0.5, 1.5)]
)
def test_what_escalating_a_share_brings(share: float, right: float, cost: float) -> None:
    at = point(SEEN, "margin", threshold_for(SEEN, "margin", share))
    assert (at.escalated, at.right, at.cost) == (share, right, cost)
