"""What is to become of a request: most are let be, some are left by their clients at a chosen stage. Pure."""

from __future__ import annotations

import random
from collections import Counter
from enum import StrEnum


class Fate(StrEnum):
    """When its client leaves."""

    STAYS = "stays"
    QUEUED = "leaves while queued"
    DISPATCHED = "leaves before the first byte"
    STREAMING = "leaves mid-stream"


SHARES = {Fate.QUEUED: 0.10, Fate.DISPATCHED: 0.10, Fate.STREAMING: 0.10}


class Fates:
    """Draws fates in these shares. A fate that came too late is drawn again for a later request."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(f"{seed} fates")
        self._owed: Counter[Fate] = Counter()
        self.met: Counter[Fate] = Counter()

    def draw(self) -> Fate:
        drawn = self._chance.choices(list(SHARES), list(SHARES.values()))[0]
        if self._chance.random() < sum(SHARES.values()):
            return drawn
        for fate in SHARES:
            if self._owed[fate] > 0:
                self._owed[fate] -= 1
                return fate
        return Fate.STAYS

    def missed(self, fate: Fate) -> None:
        """The stage was over before the client could leave."""
        self._owed[fate] += 1
