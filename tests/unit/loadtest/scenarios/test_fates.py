"""Who leaves, and when."""

from collections import Counter

from loadtest.scenarios.fates import SHARES, Fate, Fates


def test_fates_are_drawn_in_their_shares() -> None:
    fates = Fates(1)
    drawn = Counter(fates.draw() for _ in range(10_000))
    for fate, share in SHARES.items():
        assert abs(drawn[fate] - 10_000 * share) < 150, fate
    assert abs(drawn[Fate.STAYS] - 7_000) < 200


def test_a_fate_that_came_too_late_is_made_up_for() -> None:
    fates, drawn, missed = Fates(1), 0, 0
    for _ in range(10_000):
        if fates.draw() is Fate.QUEUED:
            drawn += 1
            if drawn % 2:
                fates.missed(Fate.QUEUED)
                missed += 1
    assert abs(drawn - missed - 1_000) < 150
