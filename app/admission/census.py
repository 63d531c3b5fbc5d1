"""How many processes share the ledger, as one of them knows it from its own syncs. Pure; times are monotonic seconds.

It decides what each may grant while Redis is gone: together never more than there are slots. So a process divides by
the most that it heard of during the life of a lease, and one that joined so late that others may not have heard of it
grants nothing. A number that is configured counts at the least: it is all that a process knows which never reached the
ledger.
"""

from __future__ import annotations

from collections import deque


class Census:
    """`memory_s` is the life of a lease, `settle_s` longer than any two syncs of a process are apart."""

    def __init__(self, at_least: int, *, memory_s: float, settle_s: float) -> None:
        self._at_least = at_least
        self._memory_s = memory_s
        self._settle_s = settle_s
        self._heard: deque[tuple[float, int]] = deque()
        self._joined = 0.0

    def heard(self, processes: int, now: float) -> None:
        """The answer to a sync: so many processes called within the life of a lease, this one included."""
        if not self._heard or now - self._heard[-1][0] > self._memory_s:
            self._joined = now  # the others had time to forget it
        self._heard.append((now, processes))
        while now - self._heard[0][0] > self._memory_s:
            self._heard.popleft()

    @property
    def processes(self) -> int:
        return max(self._at_least, *(count for _, count in self._heard), 1)

    def share(self, slots: int) -> int:
        """The part of `slots` that this process may grant when it hears nothing more."""
        is_counted = not self._heard or self._heard[-1][0] - self._joined >= self._settle_s
        if is_counted or self.processes <= self._at_least or self._is_alone:
            return slots // self.processes
        return 0

    @property
    def _is_alone(self) -> bool:
        """Who joined after it knows of it."""
        return all(count == 1 for _, count in self._heard)
