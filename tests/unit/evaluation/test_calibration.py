"""A cascade's table, by answers whose doubt is known."""

from __future__ import annotations

import math

from app.card import Uncertainty
from app.evaluation.calibration import Answered, calibrate


def answered(lead: float, *, right: bool, dense_right: bool = True, same: bool | None = None) -> Answered:
    """One token, whose best alternative is ahead by `lead`."""
    best = (1 + lead) / 2
    alternatives = [[math.log(best), math.log(1 - best)]]
    return Answered(alternatives, right, dense_right, right and dense_right if same is None else same)


def margins(answers: list[Answered]) -> Uncertainty:
    return next(one for one in calibrate(answers) if one.measure == "margin")


def test_escalating_nothing_is_the_small_variant_and_everything_the_dense_one() -> None:
    answers = [answered(lead / 10, right=lead > 4) for lead in range(10)]
    table = margins(answers).table
    first, last = table[0], table[-1]
    assert (first.threshold, first.escalated_share, first.expected_quality, first.agreement) == (0, 1, 1, 1)
    assert (last.escalated_share, last.expected_quality, last.agreement) == (0, 0.5, 0.5)
    assert [step.escalated_share for step in table] == sorted((step.escalated_share for step in table), reverse=True)


def test_doubt_that_tells_wrong_from_right_buys_all_the_quality_for_half_of_the_cost() -> None:
    answers = [answered(lead / 10, right=lead > 4) for lead in range(10)]
    enough = [step for step in margins(answers).table if step.expected_quality == 1.0]
    assert min(step.escalated_share for step in enough) == 0.5


def test_a_small_variant_may_be_right_where_the_dense_one_is_not() -> None:
    answers = [answered(0.9, right=True, dense_right=False), answered(0.5, right=True)]
    assert margins(answers).table[-1].expected_quality == 2.0


def test_without_anything_solved_agreement_is_the_measure() -> None:
    answers = [answered(0.9, right=False, dense_right=False, same=same) for same in (True, False)]
    assert margins(answers).table[-1].expected_quality == 0.5


def test_both_measures_rest_on_all_answers() -> None:
    assert [(one.measure, one.items) for one in calibrate([answered(0.2, right=True)] * 3)] == [
        ("entropy", 3),
        ("margin", 3),
    ]
