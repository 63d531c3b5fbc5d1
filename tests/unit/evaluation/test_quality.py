"""Sums to figures, and error bars that a seed brings back."""

from __future__ import annotations

import math

import pytest

from app.evaluation.quality import Graded, TextSums, kept_share, of_the_dense, quality, relative
from app.evaluation.resampling import bootstrap

TEXTS = [
    TextSums(tokens=10, kl=1.0, js=0.2, agreeing=9, nll=25.0, dense_nll=20.0),
    TextSums(tokens=30, kl=0.5, js=0.1, agreeing=30, nll=60.0, dense_nll=60.0),
    TextSums(tokens=20, kl=4.5, js=0.9, agreeing=12, nll=70.0, dense_nll=50.0),
]


def graded(right: int, dense: int, count: int) -> list[Graded]:
    return [Graded(index < right, index < dense) for index in range(count)]


def test_long_texts_weigh_as_much_as_their_tokens() -> None:
    measured = quality(TEXTS, {}, seed=1)
    assert measured.kl_nats_per_token.value == 0.1
    assert measured.js_nats_per_token.value == 0.02
    assert measured.top1_agreement.value == 0.85
    assert measured.perplexity_ratio.value == pytest.approx(math.exp(25 / 60), rel=1e-5)
    assert measured.relative.value == pytest.approx(math.exp(-0.1), rel=1e-5)
    assert measured.tokens == 60


def test_relative_quality_is_the_mean_of_text_and_tasks() -> None:
    tasks = [graded(3, 6, 10), graded(9, 9, 10)]
    assert relative(TEXTS, tasks) == pytest.approx((math.exp(-0.1) + 0.75) / 2)


def test_what_the_dense_sibling_cannot_do_is_not_held_against_a_variant() -> None:
    assert kept_share(graded(0, 0, 10)) is None
    assert kept_share(graded(8, 4, 10)) == 1.0
    assert relative(TEXTS, [graded(0, 0, 10)]) == pytest.approx(math.exp(-0.1))


def test_the_dense_sibling_is_its_own_measure() -> None:
    measured = quality(of_the_dense(TEXTS), {"retrieval": graded(5, 5, 10)}, seed=1)
    assert (measured.relative.low, measured.relative.value, measured.relative.high) == (1.0, 1.0, 1.0)
    assert measured.kl_nats_per_token.value == 0.0
    assert measured.perplexity_ratio.value == 1.0


def test_the_same_seed_gives_the_same_quality_and_another_one_other_error_bars() -> None:
    tasks = {"arithmetic": graded(3, 6, 10)}
    assert quality(TEXTS, tasks, seed=7) == quality(TEXTS, tasks, seed=7)  # type: ignore[arg-type]
    # Of ten items there are many draws; of three texts too few to differ for sure.
    first, second = (quality(TEXTS, tasks, seed=seed).relative for seed in (1, 2))  # type: ignore[arg-type]
    assert first.value == second.value
    assert (first.low, first.high) != (second.low, second.high)


def test_an_interval_holds_its_value_and_narrows_with_more_texts() -> None:
    few = bootstrap([[0.0, 1.0] * 5], lambda drawn: sum(drawn[0]) / len(drawn[0]), seed=3)
    many = bootstrap([[0.0, 1.0] * 200], lambda drawn: sum(drawn[0]) / len(drawn[0]), seed=3)
    assert few.low < few.value == 0.5 < few.high
    assert many.high - many.low < (few.high - few.low) / 3
    # Of a mean of 400 coins the standard error is 0.025; 95 % are 1.96 of it to either side.
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.025, rel=0.2)


def test_what_does_not_vary_has_no_width() -> None:
    one = bootstrap([[0.25] * 8], lambda drawn: sum(drawn[0]) / len(drawn[0]), seed=1)
    assert (one.low, one.value, one.high) == (0.25, 0.25, 0.25)
