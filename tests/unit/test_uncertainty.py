from __future__ import annotations

import math

import pytest

from app.card import Uncertainty, UncertaintyStep
from app.uncertainty import entropy, highest_mean, margin, of_answer


def calibrated(measure: str, window: int = 2, top: int = 2) -> Uncertainty:
    step = UncertaintyStep(threshold=0, escalated_share=1, expected_quality=1, agreement=1)
    return Uncertainty.model_validate(
        {"measure": measure, "window_tokens": window, "top_logprobs": top, "items": 1, "table": (step,)}
    )


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_entropy_counts_what_the_alternatives_leave_as_one_more() -> None:
    assert entropy(logs(1.0)) == 0
    assert entropy(logs(0.5, 0.5)) == pytest.approx(math.log(2))
    assert entropy(logs(0.5, 0.25)) == pytest.approx(1.5 * math.log(2))
    assert entropy([-math.inf, 0.0]) == 0
    assert entropy([]) == 0


def test_margin_is_one_for_a_tie() -> None:
    assert margin(logs(0.4, 0.4, 0.1)) == 1
    assert margin(logs(0.1, 0.9)) == pytest.approx(0.2)
    assert margin(logs(1.0)) == 0


def test_a_doubtful_passage_counts_wherever_it_stands() -> None:
    assert highest_mean([0, 0, 3, 1, 0], 2) == 2
    assert highest_mean([1, 0, 0], 2) == 0.5
    assert highest_mean([4, 2], 8) == 3
    assert highest_mean([], 8) == 0


def test_more_alternatives_than_were_calibrated_change_nothing() -> None:
    two, three = [logs(0.6, 0.3)] * 3, [logs(0.1, 0.6, 0.3)] * 3
    assert of_answer(two, calibrated("entropy")) == of_answer(three, calibrated("entropy"))
    assert of_answer(two, calibrated("margin")) == pytest.approx(0.7)
