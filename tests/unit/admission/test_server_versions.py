"""Which servers an operator is warned of."""

from __future__ import annotations

import pytest

from app.admission.server_versions import doubt_about


@pytest.mark.parametrize(
    ("facts", "is_doubted"),
    [
        ({"redis_version": "7.0.15"}, True),
        ({"redis_version": "7.2.10"}, True),
        ({"redis_version": "7.2.11"}, False),
        ({"redis_version": "7.3.99"}, True),
        ({"redis_version": "8.2.1"}, True),
        ({"redis_version": "8.2.2"}, False),
        ({"redis_version": "8.6.3"}, False),
        ({"redis_version": "7.2.4", "valkey_version": "8.1.5"}, True),
        ({"redis_version": "7.2.4", "valkey_version": "8.1.6"}, False),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, False),
        ({"redis_version": "unknown"}, False),
        ({}, False),
    ],
)
def test_what_lacks_a_fix(facts: dict[str, str], is_doubted: bool) -> None:
    assert (doubt_about(facts) is not None) == is_doubted


def test_it_says_which() -> None:
    told = doubt_about({"redis_version": "7.2.4", "valkey_version": "8.0.5"})
    assert told == "Valkey 8.0.5 lacks fixes of its script engine, unless its package has them backported"
