"""How many users there are, second by second. Pure: `users(at_s)` is None once the run is over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Shape(Protocol):
    def users(self, at_s: float) -> int | None:
        """Users wanted `at_s` seconds after the start."""
        ...


@dataclass(frozen=True, slots=True)
class Steady:
    """`peak` users from the first second to the last."""

    peak: int
    lasts_s: float

    def users(self, at_s: float) -> int | None:
        return self.peak if at_s < self.lasts_s else None


@dataclass(frozen=True, slots=True)
class Step:
    """From `low` to `peak` in `steps` equal steps of equal length: where does it bend?"""

    low: int
    peak: int
    steps: int
    lasts_s: float

    def users(self, at_s: float) -> int | None:
        if at_s >= self.lasts_s:
            return None
        at = int(at_s / self.lasts_s * self.steps)
        return round(self.low + (self.peak - self.low) * at / max(1, self.steps - 1))


@dataclass(frozen=True, slots=True)
class Spike:
    """`low` users, `peak` in the middle fifth, `low` again: how soon is it over?"""

    low: int
    peak: int
    lasts_s: float

    def users(self, at_s: float) -> int | None:
        if at_s >= self.lasts_s:
            return None
        return self.peak if 0.4 <= at_s / self.lasts_s < 0.6 else self.low


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Days of `day_s`: `low` users at midnight, `peak` at noon, a cosine between them."""

    low: int
    peak: int
    day_s: float
    lasts_s: float

    def users(self, at_s: float) -> int | None:
        if at_s >= self.lasts_s:
            return None
        return round(self.low + (self.peak - self.low) * (1 - math.cos(2 * math.pi * at_s / self.day_s)) / 2)


NAMES = ("steady", "step", "spike", "diurnal")


def shape(name: str, low: int, peak: int, lasts_s: float, *, steps: int, day_s: float) -> Shape:
    """The shape of this name. Raises ValueError for a name or numbers that make none."""
    if not 0 <= low <= peak or not peak or lasts_s <= 0 or steps < 1 or day_s <= 0:
        raise ValueError("a load shape needs 0 <= low <= peak users, a run time, steps and a day above zero")
    shapes: dict[str, Shape] = {
        "steady": Steady(peak, lasts_s),
        "step": Step(low, peak, steps, lasts_s),
        "spike": Spike(low, peak, lasts_s),
        "diurnal": Diurnal(low, peak, day_s, lasts_s),
    }
    if name not in shapes:
        raise ValueError(f"unknown load shape {name!r}; known: {', '.join(shapes)}")
    return shapes[name]
