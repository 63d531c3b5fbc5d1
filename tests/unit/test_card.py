from __future__ import annotations

from pathlib import Path

import pytest

from app.card import Card, gate
from app.errors import ConfigurationError
from app.manifest import Manifest
from app.settings import QualityGate
from tests.unit.cards import card, quality


def failed(given: Card | None, **thresholds: float | bool | None) -> list[str]:
    verdict = gate(given, QualityGate.model_validate(thresholds))
    assert verdict.passed is not bool(verdict.failed)
    return [failure.threshold for failure in verdict.failed]


def test_a_variant_that_keeps_its_quality_passes() -> None:
    assert failed(card(quality(0.9))) == []
    assert failed(card(quality(0.49))) == ["min_quality"]
    assert failed(card(quality(0.49)), min_quality=None) == []


def test_a_threshold_that_is_just_met_is_met() -> None:
    met = card(quality(0.5, kl=0.2, top1=0.8, tasks={"retrieval": (0.4, 0.8)}))
    assert failed(met, min_quality=0.5, max_kl=0.2, min_top1=0.8, max_perplexity_ratio=1.1, min_task_share=0.5) == []
    assert failed(met, max_kl=0.19, min_top1=0.81, max_perplexity_ratio=1.09, min_task_share=0.51) == [
        "min_top1",
        "max_kl",
        "max_perplexity_ratio",
        "min_task_share (retrieval)",
    ]


def test_a_task_that_the_dense_sibling_does_not_solve_fails_nobody() -> None:
    assert failed(card(quality(tasks={"arithmetic": (0.0, 0.0)})), min_task_share=0.9) == []


@pytest.mark.parametrize("unmeasured", [None, card()])
def test_what_was_not_measured_fails_only_where_a_card_is_required(unmeasured: Card | None) -> None:
    assert failed(unmeasured, min_quality=1.0) == []
    assert failed(unmeasured, require_card=True) == ["require_card"]


def test_a_divergence_that_is_not_a_number_fails() -> None:
    assert failed(card(quality(kl=float("nan"))), max_kl=1.0) == ["max_kl"]


def test_a_verdict_says_what_was_missed_by_how_much() -> None:
    assert str(gate(card(quality(0.41)), QualityGate())) == "min_quality 0.5, measured 0.41"
    assert str(gate(card(quality(0.61)), QualityGate())) == "passed"


def test_a_card_travels_in_its_manifest(tmp_path: Path) -> None:
    written = Manifest(
        model="m", variant="v", base="b", recipe="r", weights_bytes=1, parameters_count=1, card=card(quality())
    )
    written.write(tmp_path)
    assert Manifest.read(tmp_path) == written


def test_a_manifest_with_an_unknown_part_in_its_card_is_refused(tmp_path: Path) -> None:
    manifest = Manifest(model="m", variant="v", base="b", recipe="r", weights_bytes=1, parameters_count=1, card=card())
    (tmp_path / "sluice.json").write_text(manifest.model_dump_json().replace('"seed":1', '"seed":1,"sed":2'))
    with pytest.raises(ConfigurationError, match=r"card\.sed"):
        Manifest.read(tmp_path)
