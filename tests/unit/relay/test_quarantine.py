"""Quarantine: what two workers died with is refused for a time, and memory of it is bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from app.relay.quarantine import MOST_REMEMBERED, Death, Fingerprint, Quarantine, cell_of

PERIOD_S = 600


def fingerprint(text: str = "x", tenant: str = "t") -> Fingerprint:
    return Fingerprint.of(tenant, {"prompt": Raw(text.encode())})


def killed(quarantine: Quarantine, *texts: str, tenant: str = "t", now: float = 0.0) -> None:
    for text in texts:
        quarantine.blame(fingerprint(text, tenant), Death("a", 1), now)
        quarantine.blame(fingerprint(text, tenant), Death("b", 1), now)


def test_one_death_is_a_coincidence_two_are_not() -> None:
    quarantine = Quarantine(PERIOD_S)
    assert not quarantine
    quarantine.blame(fingerprint(), Death("a", 1), 0.0)
    quarantine.blame(fingerprint(), Death("a", 1), 0.0)  # it was held twice
    assert not quarantine.holds(fingerprint(), 0.0)
    quarantine.blame(fingerprint(), Death("a", 2), 500.0)
    assert quarantine.holds(fingerprint(), 500.0)
    assert not quarantine.holds(fingerprint("another"), 500.0)
    assert not quarantine.holds(fingerprint(tenant="another"), 500.0)


def test_it_is_forgotten_after_its_time() -> None:
    quarantine = Quarantine(PERIOD_S)
    killed(quarantine, "x", now=100.0)
    assert quarantine.holds(fingerprint(), 699.9)
    assert not quarantine.holds(fingerprint(), 700.0)
    assert not quarantine


def test_the_third_quarantined_request_confines_its_tenant() -> None:
    quarantine = Quarantine(PERIOD_S)
    killed(quarantine, "a", "b")
    killed(quarantine, "c", tenant="another")
    quarantine.blame(fingerprint("once"), Death("a", 1), 0.0)
    assert not quarantine.confines("t", 0.0)
    killed(quarantine, "c", now=1.0)
    assert quarantine.confines("t", 1.0)
    assert not quarantine.confines("another", 1.0)
    assert not quarantine.confines("t", 600.0)


def test_what_is_remembered_is_bounded() -> None:
    quarantine = Quarantine(PERIOD_S)
    for number in range(MOST_REMEMBERED + 50):
        killed(quarantine, str(number), tenant=str(number))
    assert len(quarantine._records) == MOST_REMEMBERED
    assert len(quarantine._quarantined) == MOST_REMEMBERED
    assert not quarantine.holds(fingerprint("0", "0"), 0.0)


def test_fields_do_not_run_into_each_other() -> None:
    one = Fingerprint.of("t", {"a": Raw(b"1"), "b": Raw(b"2")})
    assert one != Fingerprint.of("t", {"a": Raw(b"1'b':2")})
    assert one == Fingerprint.of("t", {"a": Raw(b"1"), "b": Raw(b"2")})


@given(st.text(), st.lists(st.text(min_size=1), min_size=1, unique=True).flatmap(lambda ids: st.permutations(ids)))
def test_a_cell_depends_on_nothing_but_the_tenant_and_the_pool(tenant: str, worker_ids: list[str]) -> None:
    cell = cell_of(tenant, tuple(worker_ids))
    assert cell == cell_of(tenant, tuple(sorted(worker_ids)))
    left = tuple(worker_id for worker_id in worker_ids if worker_id != cell)
    if left:
        assert cell_of(tenant, (*left, cell)) == cell
