"""I1 to I16 on the real scripts: replicas that crash, replay, miss replies; a server that forgets, fills up, goes back.

Time is the test's own. After every step the whole ledger is read and checked.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.admission import ledger
from app.admission.fairness import Debt, Grant, Kind, Place
from app.admission.ledger import Answer, Call, Departures, LedgerChanged, LedgerFull
from tests.integration.admission.driving import LEASE_US, RULES, SCRIPTS, Clock, Replica
from tests.integration.admission.fleet import PREFIX, Dump
from tests.processes import Valkey

SLOTS = {"w1": 2, "w2": 1}
ROUTES = (("w1",), ("w2", "w1"), ("w2",))
NAMES = ("p", "q")
ASKED = st.tuples(
    st.sampled_from(ROUTES), st.integers(1, 4), st.sampled_from("ab"), st.sampled_from((2_000_000, 60_000_000))
)


@dataclass
class Known:
    """What a replica remembers. `unsure`: a reply was lost, so it must sync before it calls again."""

    replica: Replica
    waiting: dict[str, tuple[Place, int]] = field(default_factory=dict)
    held: dict[str, tuple[str, Place]] = field(default_factory=dict)
    is_unsure: bool = True
    renewed_us: int = 0


class LedgerMachine(RuleBasedStateMachine):
    url = ""
    scripts = SCRIPTS

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client = redis.Redis.from_url(self.url, decode_responses=True)
        self.client.config_set("maxmemory", 0)
        self.client.flushall()
        self.client.script_flush()
        self.clock = Clock(self.client)
        self.known: dict[str, Known] = {}
        self.born = 0
        self.sent: list[tuple[bytes, ...]] = []
        self.saved: dict[bytes, bytes] | None = None
        self.worker_of: dict[str, str] = {}
        self.went_back_us = 0
        self.is_full = False

    @initialize()
    def begin(self) -> None:
        for name in NAMES:
            self._join(name)
        for name in NAMES:
            self._sync(self.known[name])

    def teardown(self) -> None:
        for known in self.known.values():
            self.runner.run(known.replica.ledger.close())
        self.client.config_set("maxmemory", 0)
        self.client.close()
        self.runner.close()

    # What replicas do

    @rule(name=st.sampled_from(NAMES), asked=st.lists(ASKED, min_size=1, max_size=4), loses_reply=st.booleans())
    def arrive(self, name: str, asked: list[tuple[tuple[str, ...], int, str, int]], loses_reply: bool) -> None:
        known = self._sure(name)
        places = []
        for route, band, tenant, patience_us in asked:
            place = Place(known.replica.new_id(), band, "+".join(route), route, tenant, 1.0, 10.0, patience_us, 0, 10)
            known.waiting[place.id] = (place, self.clock.now_us + patience_us)
            places.append(place)
        outcome = self._call(known, ledger.arrive(places), loses_reply)
        if isinstance(outcome, LedgerFull):
            for place in places:
                del known.waiting[place.id]
        elif isinstance(outcome, Answer):
            for place, arrived in zip(places, outcome.body, strict=True):
                if arrived.kind is Kind.GRANTED:
                    self._granted(known, [Grant(place.id, arrived.outcome)])
                elif arrived.kind is not Kind.WAITS:
                    del known.waiting[place.id]

    @rule(name=st.sampled_from(NAMES), at=st.integers(0, 99), loses_reply=st.booleans())
    def release(self, name: str, at: int, loses_reply: bool) -> None:
        known = self._sure(name)
        if not known.held:
            return
        lease_id = sorted(known.held)[at % len(known.held)]
        worker, place = known.held.pop(lease_id)
        departures = Departures.none()
        departures.release(lease_id, worker, Debt(place.band, place.tenant, 3.0))
        self._call(known, ledger.depart(departures), loses_reply)

    @rule(name=st.sampled_from(NAMES), at=st.integers(0, 99), loses_reply=st.booleans())
    def cancel(self, name: str, at: int, loses_reply: bool) -> None:
        known = self._sure(name)
        if not known.waiting:
            return
        place, _ = known.waiting.pop(sorted(known.waiting)[at % len(known.waiting)])
        departures = Departures.none()
        departures.cancel(place.id, place.candidates, Debt(place.band, place.tenant, -10.0))
        self._call(known, ledger.depart(departures), loses_reply)
        if not known.is_unsure:
            assert place.id not in self._leases() | self._tickets()  # I14

    @rule(name=st.sampled_from(NAMES))
    def release_what_is_not_held(self, name: str) -> None:
        known = self._sure(name)
        before = Dump(self.client).held
        departures = Departures.none()
        departures.release(known.replica.new_id(), "w1", Debt(2, "a", 50.0))
        self._call(known, ledger.depart(departures), False)
        assert Dump(self.client).held == before  # I4

    @rule(name=st.sampled_from(NAMES))
    def sync(self, name: str) -> None:
        self._sync(self.known[name])

    @rule(name=st.sampled_from(NAMES))
    def reap(self, name: str) -> None:
        known = self._sure(name)
        outcome = self._call(known, ledger.reap(), False)
        if isinstance(outcome, Answer) and not outcome.opens_in_s:
            self._check_no_slot_idles()

    # What befalls them

    @rule(by_us=st.sampled_from((1000, 900_000, 3_000_000, LEASE_US + 1)))
    def pass_time(self, by_us: int) -> None:
        self.client.config_set("maxmemory", 0)
        self.clock.move(by_us)
        self.client.config_set("maxmemory", int(self.is_full))

    @rule(name=st.sampled_from(NAMES))
    def crash(self, name: str) -> None:
        self.runner.run(self.known[name].replica.ledger.close())
        self._join(name)

    @precondition(lambda self: self.sent)
    @rule(at=st.integers(0, 1 << 16))
    def replay_any_call(self, at: int) -> None:
        """I9. A call that was sent before, byte for byte, is without effect and answered as it was, or as outdated."""
        call = self.sent[at % len(self.sent)]
        before = self._everything()
        try:
            with redis.Redis.from_url(self.url) as raw:
                raw.execute_command(*call)
        except (redis.exceptions.NoScriptError, redis.exceptions.OutOfMemoryError):
            return
        if self.went_back_us == 0:
            assert self._everything() == before

    @rule()
    def flush_scripts(self) -> None:
        self.client.script_flush()

    @rule()
    def fill_up(self) -> None:
        self.is_full = not self.is_full
        self.client.config_set("maxmemory", int(self.is_full))

    @precondition(lambda self: not self.is_full)
    @rule()
    def save(self) -> None:
        with redis.Redis.from_url(self.url) as raw:
            self.saved = {name: raw.dump(name) for name in raw.keys(PREFIX + "*")}

    @precondition(lambda self: self.saved is not None and not self.is_full)
    @rule()
    def go_back(self) -> None:
        """A failover to an older state. What was granted since is held by nobody in it."""
        with redis.Redis.from_url(self.url) as raw:
            raw.flushdb()
            for name, value in (self.saved or {}).items():
                raw.restore(name, 0, value)
        self.clock.move(0)
        self._is_lost()

    @precondition(lambda self: not self.is_full)
    @rule()
    def flush(self) -> None:
        self.client.flushdb()
        self.clock.move(0)
        self._is_lost()

    # What must hold

    @invariant()
    def holds(self) -> None:
        state = Dump(self.client)
        self._check_places(state)
        self._check_indexes(state)
        self._check_depths(state)
        self._check_renewed(state)

    def _check_places(self, state: Dump) -> None:
        """I1, I3: each is in one place, once. I5: no worker has more leases than slots."""
        leases = [lease for ids in state.held.values() for lease in ids]
        assert len(set(leases)) == len(leases)
        assert not set(leases) & state.tickets
        for worker, ids in state.held.items():
            assert len(ids) <= SLOTS[worker], worker

    def _check_indexes(self, state: Dump) -> None:
        """I8: no reachable state has one part of a step without the other."""
        assert sorted(ticket for ids in state.flows.values() for ticket in ids) == sorted(state.tickets)
        assert state.deadlines == state.tickets
        assert {(line, tenant) for line, tenants in state.lines.items() for tenant in tenants} == set(state.flows)
        for worker in SLOTS:
            may = {line for line in state.lines if worker in line.partition(":")[2].split("+")}
            assert state.lines_of.get(worker, set()) == may

    def _check_depths(self, state: Dump) -> None:
        """I15: what is counted is what waits, and within bounds."""
        counted: Counter[str] = Counter()
        for (line, tenant), ids in state.flows.items():
            counted.update({f"t:{tenant}": len(ids), f"b:{line[0]}": len(ids), "a": len(ids), f"l:{line}": len(ids)})
        assert {key: value for key, value in state.depth.items() if not key.startswith("#")} == dict(counted)
        assert state.depth.get("#a", 0) == 10 * len(state.tickets)
        assert counted["a"] <= RULES.total_limit
        assert all(value <= RULES.tenant_limit for key, value in counted.items() if key.startswith("t:"))
        assert all(value <= RULES.band_limit for key, value in counted.items() if key.startswith("b:"))

    def _check_renewed(self, state: Dump) -> None:
        """I7: who renews in time keeps what it holds, as far as it is sure of it."""
        for known in self.known.values():
            if not known.is_unsure and self.clock.now_us - known.renewed_us < LEASE_US:
                for lease_id, (worker, _) in known.held.items():
                    assert lease_id in state.held.get(worker, ()), lease_id

    # Doing

    def _join(self, name: str) -> None:
        self.born += 1
        known = self.known[name] = Known(
            Replica(self.url, f"{name}{self.born}", replicas=len(NAMES), scripts=self.scripts)
        )
        self.runner.run(known.replica.ledger.open())

    def _sure(self, name: str) -> Known:
        known = self.known[name]
        if known.is_unsure:
            self._sync(known)
        return known

    def _sync(self, known: Known) -> None:
        leases = [(lease_id, worker) for lease_id, (worker, _) in known.held.items()]
        call = ledger.sync(leases, [*known.waiting], sorted(SLOTS.items()), secrets.token_hex(8))
        outcome = self._call(known, call, False)
        assert isinstance(outcome, Answer)
        for lease_id in outcome.body.lost:
            del known.held[lease_id]
        known.renewed_us = self.clock.now_us
        known.is_unsure = False
        again = [known.waiting[ticket][0] for ticket in outcome.body.missing if ticket in known.waiting]
        for ticket in outcome.body.missing:
            known.waiting.pop(ticket, None)
        assert all(place.id not in self._tickets() for place in again)

    def _call(self, known: Known, call: Call, loses_reply: bool) -> object:
        self._note_call(known, call)
        (outcome,) = self.runner.run(known.replica.ledger.exchange([call]))
        if loses_reply:
            known.is_unsure = True
            return None
        if isinstance(outcome, LedgerChanged):
            known.is_unsure = True
        elif isinstance(outcome, Answer):
            self._granted(known, outcome.grants)
            self._hear_others(known)
        return outcome

    def _note_call(self, known: Known, call: Call) -> None:
        way = known.replica.ledger
        way._number += 1
        self.sent.append(_words(way._packed_call(call)))
        way._number -= 1

    def _hear_others(self, caller: Known) -> None:
        """Grants that the call brought to the other replica: it finds them by a sync, as if the word was lost."""
        for known in self.known.values():
            if known is not caller and known.waiting.keys() & self._leases():
                self._sync(known)

    def _granted(self, known: Known, grants: list[Grant]) -> None:
        for lease_id, worker in grants:
            if lease_id not in known.waiting:
                continue
            place, deadline_us = known.waiting.pop(lease_id)
            assert worker in place.candidates
            assert self.clock.now_us < deadline_us or known.is_unsure or self.went_back_us  # I13
            assert self.worker_of.setdefault(lease_id, worker) == worker or self.went_back_us
            known.held[lease_id] = (worker, place)

    def _is_lost(self) -> None:
        self.went_back_us = self.clock.now_us
        for known in self.known.values():
            known.is_unsure = True

    def _check_no_slot_idles(self) -> None:
        """V2: nobody waits in vain."""
        state = Dump(self.client)
        for worker, count in SLOTS.items():
            assert len(state.held.get(worker, ())) == count or worker not in state.lines_of

    def _leases(self) -> set[str]:
        return {lease for ids in Dump(self.client).held.values() for lease in ids}

    def _tickets(self) -> set[str]:
        return Dump(self.client).tickets

    def _everything(self) -> dict[bytes, bytes]:
        with redis.Redis.from_url(self.url) as raw:
            return {name: raw.dump(name) for name in raw.keys(PREFIX + "*")}


def _words(packed: bytes) -> tuple[bytes, ...]:
    """The words of a packed command."""
    words, rest = [], packed.partition(b"\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        words.append(rest[: int(size[1:])])
        rest = rest[int(size[1:]) + 2 :]
    return tuple(words)


@pytest.fixture
def machine(valkey: Valkey) -> type[LedgerMachine]:
    return type("Machine", (LedgerMachine,), {"url": valkey.url})


def test_the_invariants_hold_whatever_happens(machine: type[LedgerMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
