"""How a gateway process ends: quiet, then drain, then stop.

serving ──a signal──> quiet        probes say no; who comes is still served, and told that the connection closes
                        └─notice─> closed       nobody new; what is held goes on
                                     └─────────> turned away   who still waits for a slot is refused
                                                   └──limit──> cut   what is left ends in an error
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from app.errors import Draining

RETRY_AFTER_S = 1.0  # another replica, or this one's successor, is there already


class Cuttable(Protocol):
    """A request that is being served."""

    def cut(self, error: Draining) -> None:
        """End it with `error`, as soon as the event loop turns."""


class Drain:
    """The steps; who takes them, and when, is the server's to say. None of them waits."""

    __slots__ = ("_served", "_turn_away", "is_quiet")

    def __init__(self, turn_away: Callable[[Draining], None]) -> None:
        self._turn_away = turn_away
        self._served: set[Cuttable] = set()
        self.is_quiet = False

    def opened(self, request: Cuttable) -> None:
        self._served.add(request)

    def closed(self, request: Cuttable) -> None:
        self._served.discard(request)

    @property
    def served(self) -> int:
        """Requests that are being served."""
        return len(self._served)

    def begin(self) -> None:
        """Be quiet: whoever asks whether to send requests here is told not to."""
        self.is_quiet = True

    def turn_away(self) -> None:
        """Refuse who waits for a slot, now and from now on."""
        self._turn_away(_error())

    def cut(self) -> None:
        """End what is left."""
        self.turn_away()
        for request in list(self._served):
            request.cut(_error())


def _error() -> Draining:
    return Draining("This gateway is shutting down. Please try again.", retry_after_s=RETRY_AFTER_S)
