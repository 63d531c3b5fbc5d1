"""What was refused or broke lately: how often, never what it was about. Pure; monotonic seconds come in."""

from __future__ import annotations

import msgspec

from app.inference import Outcome
from app.tenant import Band

KINDS_KEPT = 50
QUIET_S = 300.0
"""After so long without another one of its kind, a kind is counted from one again."""
_GOOD = frozenset({Outcome.COMPLETED, Outcome.CANCELLED})


class Kind(msgspec.Struct, array_like=True, frozen=True):
    """What refusals that are counted together have in common. `code` is that of the error; `model` and `tenant` are
    names of the configuration or of keys, empty where it never came to them."""

    outcome: Outcome
    code: str
    model: str
    tenant: str
    band: Band


class Count(msgspec.Struct, array_like=True, frozen=True):
    """How many of a kind there were, and when the first and the last was."""

    count: int
    first: float
    last: float

    def __add__(self, other: Count) -> Count:
        return Count(self.count + other.count, min(self.first, other.first), max(self.last, other.last))


class Refusals:
    """The latest kinds, at most KINDS_KEPT: under a flood of one kind the others stay to be seen."""

    def __init__(self) -> None:
        self._counts: dict[Kind, Count] = {}

    def note(self, kind: Kind, now: float) -> None:
        """A request ended this way. One that was answered, or given up by its client, is no refusal."""
        if kind.outcome in _GOOD:
            return
        known, one = self._counts.pop(kind, None), Count(1, now, now)
        self._counts[kind] = one if known is None or now - known.last > QUIET_S else known + one
        if len(self._counts) > KINDS_KEPT:
            del self._counts[next(iter(self._counts))]

    def recent(self, now: float) -> list[tuple[Kind, Count]]:
        """Those of the last QUIET_S, the latest first."""
        return [(kind, count) for kind, count in reversed(self._counts.items()) if now - count.last <= QUIET_S]
