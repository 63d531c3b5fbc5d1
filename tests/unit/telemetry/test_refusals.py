"""What was refused lately: counted by kind, bounded, forgotten."""

from __future__ import annotations

from app.inference import Outcome
from app.telemetry.refusals import KINDS_KEPT, QUIET_S, Count, Kind, Refusals
from app.tenant import Band


def kind(code: str, outcome: Outcome = Outcome.REJECTED) -> Kind:
    return Kind(outcome, code, "m", "t", Band.DEFAULT)


def test_a_kind_is_counted_and_the_latest_comes_first() -> None:
    refusals = Refusals()
    for at, code in enumerate(["overloaded", "queue_timeout", "overloaded"]):
        refusals.note(kind(code), at)
    assert refusals.recent(2) == [(kind("overloaded"), Count(2, 0, 2)), (kind("queue_timeout"), Count(1, 1, 1))]


def test_what_went_well_is_none() -> None:
    refusals = Refusals()
    for outcome in (Outcome.COMPLETED, Outcome.CANCELLED):
        refusals.note(kind("", outcome), 0)
    assert refusals.recent(0) == []


def test_an_old_kind_is_forgotten_and_counted_anew() -> None:
    refusals = Refusals()
    refusals.note(kind("overloaded"), 0)
    assert refusals.recent(QUIET_S + 1) == []
    refusals.note(kind("overloaded"), QUIET_S + 1)
    assert refusals.recent(QUIET_S + 1) == [(kind("overloaded"), Count(1, QUIET_S + 1, QUIET_S + 1))]


def test_a_flood_of_one_kind_leaves_the_others() -> None:
    refusals = Refusals()
    refusals.note(kind("rare"), 0)
    for at in range(1000):
        refusals.note(kind("common"), at / 1000)
    assert [found.code for found, _ in refusals.recent(1)] == ["common", "rare"]


def test_kinds_are_bounded_by_the_one_longest_ago() -> None:
    refusals = Refusals()
    for at in range(KINDS_KEPT + 5):
        refusals.note(kind(f"code-{at}"), at)
        refusals.note(kind("code-0"), at)
    kept = [found.code for found, _ in refusals.recent(KINDS_KEPT + 5)]
    assert len(kept) == KINDS_KEPT
    assert kept[0] == "code-0"
    assert "code-1" not in kept
