"""The lease protocol holds in every reachable state, and each safeguard is needed: without it a state breaks."""

from __future__ import annotations

import pytest

from tests.model.leases import Protocol, search


def test_the_protocol_holds_in_every_state_and_always_can_end() -> None:
    searched = search(2, Protocol())
    assert (searched.broken, searched.trace, searched.stuck) == ("", (), 0)
    assert searched.states == 26_670


@pytest.mark.parametrize(
    ("mutant", "breaks", "steps"),
    [
        (Protocol(fenced=False), "I2", 3),
        (Protocol(random_ids=False), "I3", 3),
        (Protocol(slot_set=False, fenced=False), "I5", 3),
        (Protocol(delivery_limit=False), "I6", 5),
        (Protocol(guarded_publish=False), "I18", 7),
    ],
    ids=["no fencing", "counter token", "slot counter", "no delivery limit", "publish not guarded"],
)
def test_without_a_safeguard_a_state_breaks(mutant: Protocol, breaks: str, steps: int) -> None:
    searched = search(2, mutant)
    assert searched.broken.startswith(breaks), searched
    assert len(searched.trace) == steps, searched.trace


def test_a_counter_token_hides_until_a_failover() -> None:
    """Why the failover is in the model."""
    assert search(2, Protocol(random_ids=False, failover=False)).broken == ""
