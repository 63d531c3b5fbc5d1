"""How many second attempts a pool may cost. Pure: times come in as monotonic seconds."""

from __future__ import annotations

WINDOW_S = 10


class RetryBudget:
    """Second attempts within any window of ten seconds: a share of its requests, and some for each of its seconds.

    The share keeps an outage of everything from being multiplied by retries; the rest lets a pool with little traffic,
    or one that loses a worker with all that it held, move what it can. Finagle's RetryBudget, over a ring of seconds.
    """

    __slots__ = ("_latest", "_requests", "_retries", "_retries_per_s", "_share")

    def __init__(self, share: float, retries_per_s: float) -> None:
        self._share = share
        self._retries_per_s = retries_per_s
        self._requests = [0] * WINDOW_S
        self._retries = [0] * WINDOW_S
        self._latest = 0

    def request(self, now: float) -> None:
        """A first attempt was made."""
        second = int(now)
        if second != self._latest:
            self._move_to(second)
        self._requests[second % WINDOW_S] += 1

    def take(self, now: float) -> bool:
        """Whether one more second attempt may be made; if so it is spent."""
        self._move_to(int(now))
        allowed = self._share * sum(self._requests) + self._retries_per_s * WINDOW_S
        if sum(self._retries) + 1 > allowed:
            return False
        self._retries[self._latest % WINDOW_S] += 1
        return True

    def _move_to(self, second: int) -> None:
        """Forget the seconds that left the window."""
        for passed in range(max(self._latest + 1, second - WINDOW_S + 1), second + 1):
            self._requests[passed % WINDOW_S] = self._retries[passed % WINDOW_S] = 0
        self._latest = max(self._latest, second)
