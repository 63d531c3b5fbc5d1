"""How often an address may fail."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.tenancy.failures import ADDRESSES, Failures


def test_so_many_at_once_and_then_one_by_one() -> None:
    failures = Failures(per_min=60)
    assert [failures.count("a", 0.0) for _ in range(60)] == [0.0] * 60
    assert failures.count("a", 0.0) == 1.0
    assert failures.count("a", 0.5) == 0.5
    assert failures.count("a", 1.0) == 0.0
    assert failures.count("b", 0.0) == 0.0


def test_what_one_host_can_choose_from_is_one_address() -> None:
    failures = Failures(per_min=1)
    assert failures.count("2001:db8:0:1::1", 0.0) == 0.0
    assert failures.count("2001:db8:0:1:ffff::2", 0.0) > 0
    assert failures.count("2001:db8:0:2::1", 0.0) == 0.0
    assert failures.count("fe80::1%eth0", 0.0) == 0.0
    assert failures.count("fe80::2%eth1", 0.0) > 0
    assert failures.count("not an address", 0.0) == 0.0
    assert failures.count("a:b", 0.0) == 0.0


def test_it_remembers_no_more_than_it_says() -> None:
    failures = Failures(per_min=1)
    for number in range(ADDRESSES + 100):
        failures.count(f"10.0.{number // 256}.{number % 256}", float(number))
    assert len(failures._buckets) == ADDRESSES
    assert failures.count("10.0.16.99", ADDRESSES + 100.0) > 0
    assert failures.count("10.0.0.0", 1.0) == 0.0  # forgotten


@given(st.integers(1, 20), st.lists(st.floats(0, 10), max_size=100))
def test_never_more_than_the_rate_allows(per_min: int, gaps: list[float]) -> None:
    failures = Failures(per_min)
    now, passed = 0.0, 0
    for gap in gaps:
        now += gap
        passed += failures.count("a", now) == 0
    assert passed <= per_min + now * per_min / 60 + 1e-6
