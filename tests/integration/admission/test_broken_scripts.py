"""Safeguards of the scripts are needed: without one the machine of `test_invariants` finds a state that is wrong.

The machine is carried on here to what a lasting life needs: after a fault everything comes to rest again (V1, V3, V5),
and no slot is given to a second holder while the first, who has spoken lately, still uses it (I16 and F27).
"""

from __future__ import annotations

import gc
from collections import Counter
from hashlib import sha1

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from app.admission import ledger
from app.admission.fairness import Debt
from app.admission.ledger import Departures, Scripts
from tests.integration.admission.driving import LEASE_US, MOVED_CLOCK, SETTLE_US
from tests.integration.admission.fleet import Dump
from tests.integration.admission.test_invariants import SLOTS, LedgerMachine
from tests.processes import Valkey

pytestmark = pytest.mark.slow

ROUNDS = 40
EXAMPLES = 60


class LastingMachine(LedgerMachine):
    @rule()
    def comes_to_rest(self) -> None:
        """V1, V3, V5: the dead are forgotten when their leases are over, and everybody else gets a slot or an end."""
        self.is_full = False
        self.client.config_set("maxmemory", 0)
        for _ in range(4):  # longer than leases live, with all who live calling in time
            self.clock.move(LEASE_US // 3)
            self._all_sync()
        living = {known.replica.name for known in self.known.values()}
        state = Dump(self.client)
        assert {lease.partition(".")[0] for lease in state.leases | state.tickets} <= living
        for _ in range(ROUNDS):
            if not any(known.held or known.waiting for known in self.known.values()):
                break
            self._all_leave()
            self._all_sync()
        state = Dump(self.client)
        assert (state.leases, state.tickets, state.depth, state.flows, state.lines) == (set(), set(), {}, {}, {})
        self.saved, self.went_back_us = None, 0

    def _all_sync(self) -> None:
        """Whoever was granted something by another's call hears of it by a sync; a second one finds nothing new."""
        for _ in range(2):
            for known in self.known.values():
                self._sync(known)
        (first, *_) = self.known.values()
        self._call(first, ledger.reap(), False)
        for known in self.known.values():
            self._sync(known)

    def _all_leave(self) -> None:
        for known in self.known.values():
            departures = Departures.none()
            for lease_id, (worker, place) in known.held.items():
                departures.release(lease_id, worker, Debt(place.band, place.tenant, 0.0))
            known.held.clear()
            self._call(known, ledger.depart(departures), False)

    @invariant()
    def no_slot_has_two_users(self) -> None:
        """Whoever synced within the time for which a ledger that lost its state withholds grants."""
        users: Counter[str] = Counter()
        for known in self.known.values():
            if self.clock.now_us - known.renewed_us < SETTLE_US:
                users.update(worker for worker, _ in known.held.values())
        assert all(users[worker] <= slots for worker, slots in SLOTS.items()), users


class BrokenScripts(Scripts):
    """All scripts, with one piece of their text replaced wherever it is."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(MOVED_CLOCK)
        assert any(old.encode() in source for source in self._source.values()), f"not in the scripts any more: {old}"
        self._source = {name: source.replace(old.encode(), new.encode()) for name, source in self._source.items()}
        self.digest = {name: sha1(source).hexdigest().encode() for name, source in self._source.items()}  # noqa: S324


def run(valkey: Valkey, scripts: Scripts | None, examples: int) -> None:
    made = {"url": valkey.url} if scripts is None else {"url": valkey.url, "scripts": scripts}
    gc.collect()  # what is reported of garbage parses too, and CPython 3.11 fails if Hypothesis is at it just then
    run_state_machine_as_test(
        type("Machine", (LastingMachine,), made),
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            print_blob=False,
        ),
    )


def test_it_comes_to_rest_whatever_has_happened(valkey: Valkey) -> None:
    run(valkey, None, EXAMPLES // 2)


BROKEN = {
    "an old call has an effect": ("elseif number < last then", "elseif false then"),
    "one slot too many": (
        "return load.get(worker) < slots.get(worker)",
        "return load.get(worker) <= slots.get(worker)",
    ),
    "counted on when it has left": ("  count(place, -1)", ""),
}


@pytest.mark.parametrize(("old", "new"), BROKEN.values(), ids=BROKEN.keys())
def test_without_a_safeguard_a_state_is_wrong(valkey: Valkey, old: str, new: str) -> None:
    """Wrong, or such that the scripts themselves stumble over it."""
    with pytest.raises(Exception, match=r".") as found:
        run(valkey, BrokenScripts(old, new), EXAMPLES)
    assert isinstance(found.value, AssertionError | ledger.LedgerGone), found.value
