"""I1 to I16 on the real scripts: replicas that crash, replay, miss replies; a server that forgets, fills up, goes back.

Time is the test's own. After every step the whole ledger is read and checked. Limits have windows longer than any run,
so that what is taken of them is exactly what was reserved and not given back.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

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
from app.admission.ledger import Answer, Call, Departures, Heard, LedgerChanged, LedgerFull, LiveReservation
from app.admission.quota import MINUTE_US, Claim, Demand, Settlement
from tests.integration.admission.driving import LEASE_US, RULES, SCRIPTS, Clock, Replica
from tests.integration.admission.fleet import PREFIX, Dump
from tests.processes import Valkey

SLOTS = {"w1": 2, "w2": 1}
ROUTES = (("w1",), ("w2", "w1"), ("w2",))
NAMES = ("p", "q")
ASKED = st.tuples(
    st.sampled_from(ROUTES),
    st.integers(1, 4),
    st.sampled_from("ab"),
    st.sampled_from((2_000_000, 60_000_000)),
    st.sampled_from((None, 1, 20, 45)),
)
LIMIT, MOST, AT_ONCE, WINDOW_US = "tokens_per_day", 100, 4, 120 * MINUTE_US


@dataclass(frozen=True)
class Made:
    """A reservation as its replica knows it."""

    tenant: str
    at_us: int
    claims: tuple[Claim, ...]
    heard: Heard = Heard.NOTHING


@dataclass
class Known:
    """What a replica remembers. `unsure`: a reply was lost, so it must sync before it calls again."""

    replica: Replica
    waiting: dict[str, tuple[Place, int]] = field(default_factory=dict)
    held: dict[str, tuple[str, Place]] = field(default_factory=dict)
    reserved: dict[str, Made] = field(default_factory=dict)
    unheard: list[Settlement] = field(default_factory=list)
    is_unsure: bool = True
    renewed_us: int = 0


class Truth:
    """What is taken and live, counted beside the scripts by what they answered: {reservation: (tenant, amount)}.

    Not exact any more when the ledger has forgotten: reservations are told to it anew, but not what was taken.
    """

    def __init__(self, *, is_exact: bool = True) -> None:
        self.is_exact = is_exact
        self.taken: Counter[str] = Counter()
        self.live: dict[str, tuple[str, int]] = {}

    def note(self, script: str, replica: str, told: Sequence[Any], body: Any, now_live: set[str]) -> None:
        if script == "arrive":
            for place, arrived in zip(told, body, strict=True):
                self._arrived(place, arrived.kind)
        elif script == "depart":
            for settlement in told:
                self._settled(settlement)
        elif script == "sync":
            self._synced(replica, told)
        elif body.replicas:  # reaped with all that they had reserved
            self.live = {name: made for name, made in self.live.items() if name in now_live}

    def _arrived(self, place: Place, kind: Kind) -> None:
        if place.demand is None:
            return
        (claim,) = place.demand.claims
        has_room = self.taken[place.tenant] + claim.amount <= MOST
        at_once = sum(tenant == place.tenant for tenant, _ in self.live.values())
        if self.is_exact:
            assert (kind is Kind.RATE_LIMITED) == (not has_room)
            assert (kind is Kind.TOO_MANY) == (has_room and at_once >= AT_ONCE)
        if kind <= Kind.WAITS:
            self.taken[place.tenant] += claim.amount
            self.live[place.demand.reservation] = (place.tenant, claim.amount)

    def _settled(self, settlement: Settlement) -> None:
        if settlement.reservation in self.live:
            tenant, amount = self.live.pop(settlement.reservation)
            self.taken[tenant] += settlement.amounts[0] - amount

    def _synced(self, replica: str, told: Sequence[LiveReservation]) -> None:
        named = {made.reservation for made in told}
        gone = [name for name in self.live if name.startswith(replica + ".") and name not in named]
        for name in gone:
            del self.live[name]
        for made in told:
            if made.heard:
                self.live.setdefault(made.reservation, (made.tenant, made.claims[0].amount))


class LedgerMachine(RuleBasedStateMachine):
    url = ""
    scripts = SCRIPTS
    may_forget = True

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
        self.truth = Truth()
        self.saved_truth = Truth()
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
    def arrive(
        self, name: str, asked: list[tuple[tuple[str, ...], int, str, int, int | None]], loses_reply: bool
    ) -> None:
        known = self._sure(name)
        places = []
        for route, band, tenant, patience_us, amount in asked:
            demand = None if amount is None else self._demand(known, tenant, amount)
            line = "+".join(route)
            place = Place(known.replica.new_id(), band, line, route, tenant, 1.0, 10.0, patience_us, 0, 10, demand)
            known.waiting[place.id] = (place, self.clock.now_us + patience_us)
            places.append(place)
        outcome = self._call(known, ledger.arrive(places), loses_reply, places)
        if isinstance(outcome, LedgerFull):
            for place in places:
                del known.waiting[place.id]
        elif isinstance(outcome, Answer):
            for place, arrived in zip(places, outcome.body, strict=True):
                self._note_reservation(known, place, arrived.kind)
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

    @rule(
        name=st.sampled_from(NAMES), at=st.integers(0, 99), used=st.sampled_from((0, 1, 30)), loses_reply=st.booleans()
    )
    def settle(self, name: str, at: int, used: int, loses_reply: bool) -> None:
        known = self._sure(name)
        if known.reserved:
            reservation = sorted(known.reserved)[at % len(known.reserved)]
            made = known.reserved.pop(reservation)
            known.unheard.append(Settlement(reservation, made.tenant, made.claims, (used,) * len(made.claims)))
            self._tell_settled(known, loses_reply)

    @rule(name=st.sampled_from(NAMES), used=st.sampled_from((0, 50)))
    def settle_what_is_not_reserved(self, name: str, used: int) -> None:
        known = self._sure(name)
        claims = (Claim(LIMIT, MOST, WINDOW_US, 1),)
        known.unheard.append(Settlement(known.replica.new_id(), "a", claims, (used,)))
        self._tell_settled(known, False)

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
        self.saved_truth = deepcopy(self.truth)

    @precondition(lambda self: self.may_forget and self.saved is not None and not self.is_full)
    @rule()
    def go_back(self) -> None:
        """A failover to an older state. What was granted since is held by nobody in it."""
        with redis.Redis.from_url(self.url) as raw:
            raw.flushdb()
            for name, value in (self.saved or {}).items():
                raw.restore(name, 0, value)
        self.clock.move(0)
        self.truth = deepcopy(self.saved_truth)
        self.truth.is_exact = False
        self._is_lost()

    @precondition(lambda self: self.may_forget and not self.is_full)
    @rule()
    def flush(self) -> None:
        self.client.flushdb()
        self.truth = Truth(is_exact=False)
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
        self._check_quota(state)

    def _check_quota(self, state: Dump) -> None:
        """What is taken is what was reserved and not given back, once each; what is live is what is not settled."""
        assert state.reserved == set(self.truth.live)
        assert state.reserving == set(state.live)
        for tenant in "ab":
            live = {name for name, (whose, _) in self.truth.live.items() if whose == tenant}
            assert state.live.get(tenant, set()) == live
            spent = state.spent.get(f"{LIMIT}:{tenant}", {})
            assert spent.get("sum", 0) == sum(amount for name, amount in spent.items() if name.isdigit())
            assert spent.get("sum", 0) == self.truth.taken[tenant] or not self.truth.is_exact

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

    def _demand(self, known: Known, tenant: str, amount: int) -> Demand:
        demand = Demand(known.replica.new_id(), AT_ONCE, (Claim(LIMIT, MOST, WINDOW_US, amount),))
        known.reserved[demand.reservation] = Made(tenant, self.clock.now_us, demand.claims)
        return demand

    def _note_reservation(self, known: Known, place: Place, kind: Kind) -> None:
        if place.demand is not None:
            made = known.reserved.pop(place.demand.reservation)
            if kind <= Kind.WAITS:
                known.reserved[place.demand.reservation] = replace(made, heard=Heard.TAKEN)

    def _tell_settled(self, known: Known, loses_reply: bool) -> None:
        """Settlements are told until they are heard."""
        departures = Departures.none()
        departures.settlements.extend(known.unheard)
        outcome = self._call(known, ledger.depart(departures), loses_reply, departures.settlements)
        if outcome is not None:
            known.unheard.clear()

    def _sync(self, known: Known) -> None:
        if known.unheard:
            self._tell_settled(known, False)
        reservations = [
            LiveReservation(name, made.tenant, self.clock.now_us - made.at_us, made.claims, made.heard)
            for name, made in known.reserved.items()
        ]
        leases = [(lease_id, worker) for lease_id, (worker, _) in known.held.items()]
        slots = sorted(SLOTS.items())
        call = ledger.sync(leases, [*known.waiting], slots, secrets.token_hex(8), (), reservations)
        outcome = self._call(known, call, False, reservations)
        assert isinstance(outcome, Answer)
        for lease_id in outcome.body.lost:
            del known.held[lease_id]
        known.renewed_us = self.clock.now_us
        known.is_unsure = False
        again = [known.waiting[ticket][0] for ticket in outcome.body.missing if ticket in known.waiting]
        for ticket in outcome.body.missing:
            known.waiting.pop(ticket, None)
        assert all(place.id not in self._tickets() for place in again)

    def _call(self, known: Known, call: Call, loses_reply: bool, told: Sequence[Any] = ()) -> object:
        self._note_call(known, call)
        (outcome,) = self.runner.run(known.replica.ledger.exchange([call]))
        if isinstance(outcome, Answer):
            self.truth.note(call.script, known.replica.name, told, outcome.body, self._reservations())
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

    def _reservations(self) -> set[str]:
        return Dump(self.client).reserved

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


@pytest.mark.parametrize("may_forget", [True, False], ids=["forgetful_server", "server"])
def test_the_invariants_hold_whatever_happens(valkey: Valkey, may_forget: bool) -> None:
    gc.collect()  # what is reported of garbage parses too, and CPython 3.11 fails if Hypothesis is at it just then
    run_state_machine_as_test(
        type("Machine", (LedgerMachine,), {"url": valkey.url, "may_forget": may_forget}),
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
