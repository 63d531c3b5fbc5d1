"""Goals: what was promised, what came out, whether it is met."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.report import table

_SIGNS: dict[str, Callable[[float, float], bool]] = {"≥": operator.ge, "≤": operator.le, "=": operator.eq}


@dataclass(frozen=True, slots=True)
class Goal:
    """One promise. `got` is None where nothing was measured, which is not met.

    An `is_hard` one holds on any machine, however busy: it is about what is done, not how fast.
    """

    what: str
    sign: str
    target: float
    got: float | None
    unit: str = ""
    digits: int = 0
    is_hard: bool = False

    @property
    def is_met(self) -> bool:
        return self.got is not None and _SIGNS[self.sign](self.got, self.target)

    def row(self) -> list[str]:
        got = "–" if self.got is None else f"{self.got:,.{self.digits}f}{self.unit}"
        return [self.what, f"{self.sign} {self.target:,g}{self.unit}", got, "met" if self.is_met else "**missed**"]


def goals_table(goals: Sequence[Goal]) -> str:
    return table(["", "target", "got", ""], [goal.row() for goal in goals])
