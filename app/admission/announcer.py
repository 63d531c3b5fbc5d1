"""Tells those who asked for it where their tickets stand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

TICK_S = 0.25
FIRST_S = 0.25
"""Most waits are over by then."""
INTERVAL_S = 1.0
MOST_AT_ONCE = 256
"""Tickets in one question: with more than a thousand listeners each hears less often."""


class Waiting(Protocol):
    """What it needs of a lease that waits."""

    id: str

    @property
    def is_waiting(self) -> bool: ...


class Announcer:
    """Asks for all listeners of a process in one question, four times a second at most and only while there are any.

    `ask` takes ids of waiting tickets and has their listeners told.
    """

    def __init__(self, ask: Callable[[list[str]], None], clock: Callable[[], float]) -> None:
        self._ask = ask
        self._clock = clock
        self._due: dict[Waiting, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, waiting: Waiting) -> None:
        self._due[waiting] = self._clock() + FIRST_S
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def close(self) -> None:
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        now = self._clock()
        self._due = {waiting: due for waiting, due in self._due.items() if waiting.is_waiting}
        asked = [waiting for waiting, due in self._due.items() if due <= now][:MOST_AT_ONCE]
        for waiting in asked:
            del self._due[waiting]  # to the end of the line
            self._due[waiting] = now + INTERVAL_S
        if asked:
            self._ask([waiting.id for waiting in asked])
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick) if self._due else None
