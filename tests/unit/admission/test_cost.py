"""What is learned of a model's requests."""

from __future__ import annotations

import random

import pytest

from app.admission.cost import FIRST_OUTPUT_TOKENS, QUANTILE, Costs, Habits
from app.inference import TokenUsage


def test_before_anything_is_known() -> None:
    assert Habits().estimate(400, None) == 100 + FIRST_OUTPUT_TOKENS


def test_output_is_no_more_than_was_asked_for() -> None:
    assert Habits().estimate(400, 10) == 110


def test_nothing_costs_nothing() -> None:
    assert Habits().estimate(0, 0) == 1


def test_bytes_per_token_are_learned() -> None:
    habits = Habits()
    for _ in range(400):
        habits.learn(900, TokenUsage(prompt_tokens=300))
    assert habits.bytes_per_token == pytest.approx(3, rel=0.01)


def test_the_output_of_four_in_five_is_within_the_estimate() -> None:
    dice = random.Random(1)  # noqa: S311 - a test's dice
    habits = Habits()
    drawn = [int(dice.expovariate(1 / 500)) + 1 for _ in range(6000)]
    within = 0
    for index, tokens in enumerate(drawn):
        within += index >= 1000 and tokens <= habits.output_tokens
        habits.learn(0, TokenUsage(completion_tokens=tokens))
    assert within / 5000 == pytest.approx(QUANTILE, abs=0.03)


def test_models_have_habits_of_their_own() -> None:
    costs = Costs()
    costs.of("a").learn(1000, TokenUsage(prompt_tokens=1000))
    assert costs.of("a").bytes_per_token != costs.of("b").bytes_per_token
