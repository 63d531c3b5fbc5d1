"""What must hold in every scenario, on any machine: nothing late, nothing twice, no slot too many, nothing left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.scenarios import summary
from loadtest.scenarios.calls import Call
from loadtest.scenarios.fleet import Fleet
from loadtest.scenarios.goals import Goal


@dataclass(frozen=True, slots=True)
class Sight:
    """What the engines saw since their peaks were last forgotten, and what is left at the end.

    `arrived_ns` and `arrivals` are by name of request; `left` are leases, tickets, slots and waits.
    """

    arrived_ns: dict[str, int]
    arrivals: Counter[str]
    most_held: int
    left: dict[str, int]


async def look(house: Fleet) -> Sight:
    """Ask the witness, Redis and a gateway, once nothing is under way any more."""
    witness = house.witness
    left = {**await house.ledger(), **await house.queue_view()}
    return Sight(witness.arrived_ns, witness.arrivals, witness.most_held, left)


def truth(calls: Sequence[Call], sight: Sight, slots: int) -> list[Goal]:
    """The hard goals, and one that a busy machine may miss: how soon after its grant a request is with an engine."""
    twice = sum(count > 1 for count in sight.arrivals.values())
    late = summary.late_at_engine(calls, sight.arrived_ns)
    return [
        Goal("granted after their deadline", "=", 0, summary.granted_late(calls), is_hard=True),
        Goal(f"with an engine later than {1e3 * summary.TRANSIT_S:g} ms after it", "=", 0, late),
        Goal("dispatched twice", "=", 0, twice, is_hard=True),
        Goal("most requests that an engine held at once", "≤", slots, sight.most_held, is_hard=True),
        Goal("leases, tickets, slots and waits left at the end", "=", 0, sum(sight.left.values()), is_hard=True),
    ]
