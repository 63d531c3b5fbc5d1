"""The lease protocol as a small model whose states are searched one and all.

Subjects are queued, leased or terminal; holders run, finish late, crash; leases expire at any time; a client cancels;
once, a failover forgets the last write; results are published. A `Protocol` says which safeguards are in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

SLOTS = 1
ATTEMPTS = 2
QUEUED, LEASED, COMPLETED, CANCELLED, FAILED = "queued", "leased", "completed", "cancelled", "failed"
TERMINAL = (COMPLETED, CANCELLED, FAILED)


@dataclass(frozen=True)
class Protocol:
    """The safeguards. All of them: what the scripts do."""

    random_ids: bool = True
    fenced: bool = True
    slot_set: bool = True
    delivery_limit: bool = True
    guarded_publish: bool = True
    failover: bool = True


@dataclass(frozen=True)
class Subject:
    status: str = QUEUED
    lease: int = 0
    attempts: int = 0
    records: int = 0


@dataclass(frozen=True)
class Ledger:
    """What Redis holds. `held` is the set of lease ids, or in a mutant's place a number."""

    subjects: tuple[Subject, ...]
    held: frozenset[int] = frozenset()
    counted: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class State:
    """The world: the ledger, as it was a write ago, what holders believe, what was published, all ids given."""

    ledger: Ledger
    before: Ledger
    holders: frozenset[tuple[int, int]] = frozenset()
    published: tuple[str, ...] = ()
    has_failed_over: bool = False
    given: tuple[tuple[int, int], ...] = ()
    broken: str = ""


def first(subjects: int) -> State:
    ledger = Ledger((Subject(),) * subjects)
    return State(ledger, ledger)


def steps(state: State, protocol: Protocol) -> Iterator[tuple[str, State]]:
    for index, subject in enumerate(state.ledger.subjects):
        if subject.status == QUEUED and _has_slot(state.ledger, protocol):
            yield f"claim {index}", _claim(state, index, protocol)
        if subject.status == LEASED:
            yield f"expire {index}", _written(state, _expired(state.ledger, index, protocol))
        if subject.status in (QUEUED, LEASED):
            yield f"cancel {index}", _written(state, _ended(state.ledger, index, CANCELLED, protocol))
    for index, lease in sorted(state.holders):
        gone = replace(state, holders=state.holders - {(index, lease)})
        yield f"crash {index}", gone
        yield f"commit {index}", _committed(gone, index, lease, protocol)
        if not protocol.fenced or state.ledger.subjects[index].lease == lease:
            yield f"nack {index}", _nacked(gone, index, protocol)
    if protocol.failover and not state.has_failed_over and state.before != state.ledger:
        yield "failover", replace(state, ledger=state.before, has_failed_over=True)
    if all(subject.status in TERMINAL for subject in state.ledger.subjects):
        yield "publish", _published(state, protocol)


def _has_slot(ledger: Ledger, protocol: Protocol) -> bool:
    return (len(ledger.held) if protocol.slot_set else ledger.counted) < SLOTS


def _written(state: State, ledger: Ledger) -> State:
    return replace(state, ledger=ledger, before=state.ledger)


def _put(ledger: Ledger, index: int, subject: Subject) -> Ledger:
    return replace(ledger, subjects=(*ledger.subjects[:index], subject, *ledger.subjects[index + 1 :]))


def _claim(state: State, index: int, protocol: Protocol) -> State:
    ledger = state.ledger
    # A random id is new for ever; a token from a counter only as long as the counter is not set back.
    lease = (max((lease for _, lease in state.given), default=0) if protocol.random_ids else ledger.tokens) + 1
    broken = "I3: an id was current twice" if any(lease == given for _, given in state.given) else ""
    subject = ledger.subjects[index]
    claimed = _put(ledger, index, replace(subject, status=LEASED, lease=lease, attempts=subject.attempts + 1))
    claimed = replace(claimed, held=ledger.held | {lease}, counted=ledger.counted + 1, tokens=ledger.tokens + 1)
    return replace(
        _written(state, claimed),
        holders=state.holders | {(index, lease)},
        given=(*state.given, (index, lease)),
        broken=broken,
    )


def _freed(ledger: Ledger, lease: int) -> Ledger:
    return replace(ledger, held=ledger.held - {lease}, counted=ledger.counted - 1)


def _ended(ledger: Ledger, index: int, status: str, protocol: Protocol) -> Ledger:
    subject = ledger.subjects[index]
    freed = _freed(ledger, subject.lease) if subject.status == LEASED else ledger
    return _put(freed, index, replace(subject, status=status, lease=0, records=subject.records + 1))


def _expired(ledger: Ledger, index: int, protocol: Protocol) -> Ledger:
    subject = ledger.subjects[index]
    if protocol.delivery_limit and subject.attempts >= ATTEMPTS:
        return _ended(ledger, index, FAILED, protocol)
    return _put(_freed(ledger, subject.lease), index, replace(subject, status=QUEUED, lease=0))


def _committed(state: State, index: int, lease: int, protocol: Protocol) -> State:
    subject = state.ledger.subjects[index]
    if subject.lease == lease:
        return _written(state, _ended(state.ledger, index, COMPLETED, protocol))
    if protocol.fenced:
        return state
    late = _put(state.ledger, index, replace(subject, status=COMPLETED, records=subject.records + 1))
    return _written(state, _freed(late, lease))


def _nacked(state: State, index: int, protocol: Protocol) -> State:
    if state.ledger.subjects[index].status != LEASED:
        return state
    return _written(state, _expired(state.ledger, index, protocol))


def _published(state: State, protocol: Protocol) -> State:
    outcome = tuple(subject.status for subject in state.ledger.subjects)
    if state.published and protocol.guarded_publish:
        return state
    broken = "I18: published output changed" if state.published not in ((), outcome) else ""
    return replace(state, published=outcome, broken=broken)


def violation(state: State, protocol: Protocol) -> str:
    """The first invariant that the state breaks, or nothing."""
    if state.broken:
        return state.broken
    ledger = state.ledger
    for subject in ledger.subjects:
        if subject.records != (subject.status in TERMINAL):
            return "I2: not one record exactly when terminal"
        if subject.attempts > ATTEMPTS:
            return "I6: too many attempts"
    leased = [subject.lease for subject in ledger.subjects if subject.status == LEASED]
    if len(set(leased)) != len(leased):
        return "I3: an id is current twice"
    slots = len(ledger.held) if protocol.slot_set else ledger.counted
    if not 0 <= slots <= SLOTS:
        return f"I5: {slots} slots"
    if protocol.slot_set and ledger.held != set(leased):
        return "I5: slots are not the set of current leases"
    return ""


@dataclass(frozen=True)
class Searched:
    """How many states were seen; the broken invariant and the shortest way there; states that cannot end."""

    states: int
    broken: str = ""
    trace: tuple[str, ...] = ()
    stuck: int = 0


def search(subjects: int, protocol: Protocol) -> Searched:
    """All reachable states, breadth first, up to the first violation."""
    start = first(subjects)
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    leads_to: dict[State, list[State]] = {}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        broken = violation(state, protocol)
        if broken:
            return Searched(len(came_from), broken, _trace(came_from, state))
        for name, after in steps(state, protocol):
            leads_to.setdefault(after, []).append(state)
            if after not in came_from:
                came_from[after] = (state, name)
                queue.append(after)
    return Searched(len(came_from), stuck=len(came_from) - len(_can_end(came_from, leads_to)))


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    names: list[str] = []
    while (step := came_from[state]) is not None:
        state, name = step
        names.append(name)
    return tuple(reversed(names))


def _can_end(states: dict[State, tuple[State, str] | None], leads_to: dict[State, list[State]]) -> set[State]:
    """V1: those from which a state with every subject terminal can be reached."""
    reached = {state for state in states if all(subject.status in TERMINAL for subject in state.ledger.subjects)}
    queue = deque(reached)
    while queue:
        for earlier in leads_to.get(queue.popleft(), ()):
            if earlier not in reached:
                reached.add(earlier)
                queue.append(earlier)
    return reached
