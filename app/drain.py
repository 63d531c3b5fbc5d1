"""How a gateway process ends: quiet, then drain, then stop.

serving ──a signal──> quiet        probes say no; who comes is still served, and told that the connection closes
                        └─notice─> closed       nobody new; what is held goes on
                                     └─────────> turned away   who still waits for a slot is refused
                                                   └──limit──> cut   what is left ends in an error
"""

from __future__ import annotations

from collections.abc import Callable

from app.errors import Draining
from app.served import Served
from app.telemetry.logs import Log

RETRY_AFTER_S = 1.0  # another replica, or this one's successor, is there already


class Drain:
    """The steps; who takes them, and when, is the server's to say. None of them waits."""

    __slots__ = ("_log", "_served", "_turn_away", "is_quiet")

    def __init__(self, turn_away: Callable[[Draining], None], served: Served, log: Log) -> None:
        self._turn_away = turn_away
        self._served = served
        self._log = log
        self.is_quiet = False

    def begin(self) -> None:
        """Be quiet: whoever asks whether to send requests here is told not to."""
        self.is_quiet = True
        self._log.info("draining", requests=len(self._served))

    def turn_away(self) -> None:
        """Refuse who waits for a slot, now and from now on."""
        self._turn_away(_error())

    def cut(self) -> None:
        """End what is left."""
        self.turn_away()
        if count := self._served.cut(_error()):
            self._log.warning("drain time over", requests=count)


def _error() -> Draining:
    return Draining("This gateway is shutting down. Please try again.", retry_after_s=RETRY_AFTER_S)
