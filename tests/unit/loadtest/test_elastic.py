"""Stepping down, in virtual time: who consents begins in time, who does not keeps the best variant."""

from __future__ import annotations

import pytest

from app.card import Speed
from app.manifest import Manifest
from loadtest.elastic import FORMS, ElasticPlan, Form, capacity_per_s, form_of, measure
from tests.unit.cards import card, quality


def test_who_consents_is_served_and_begins_in_time() -> None:
    plan = ElasticPlan(requests=200, workers=1, forms=FORMS[:2])
    _, found = measure(plan)
    without, stepping, _ = found.values()
    assert without.shares == {"dense": 1.0, "w8a8": 0.0}
    assert without.steps == 0
    assert stepping.steps > 0
    assert stepping.shares["w8a8"] > 0
    assert stepping.in_time > without.in_time
    assert stepping.goodput > without.goodput


def test_an_engine_is_as_fast_as_its_form() -> None:
    shape = Form("x", 1.0, 20.0, 80.0, 0.004).shape
    assert shape.step_s + shape.step_s_per_sequence == pytest.approx(1 / 20)
    assert shape.step_s + 8 * shape.step_s_per_sequence == pytest.approx(8 / 80)


def test_more_workers_end_more() -> None:
    one, two = (capacity_per_s(ElasticPlan(workers=workers, forms=FORMS[:1])) for workers in (1, 2))
    assert 1.7 < two / one < 2.2


def test_a_form_comes_from_a_card() -> None:
    made = Manifest(model="m", variant="v", base="b", recipe="r", weights_bytes=1, parameters_count=1)
    with pytest.raises(ValueError, match="lacks"):
        form_of(made, 256)
    speed = [
        Speed(streams=streams, ttft_p50_s=1.05, itl_p50_s=itl_s, tokens_per_s=streams / itl_s)
        for streams, itl_s in ((1, 0.05), (8, 0.1))
    ]
    form = form_of(made.model_copy(update={"card": card(quality(0.8), speed=speed)}), 200)
    assert (form.quality, form.tokens_per_s_1, form.tokens_per_s_8) == (0.8, 20, 80)
    assert form.prefill_s == pytest.approx(0.005)
