"""What a test may see of a fake worker: counters, received requests, and waiting for them without sleeping."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tests.fakes.server import Request

HISTORY = 2_000
GAUGES = ("open", "running", "waiting", "connections")


@dataclass
class Counts:
    """Inference requests: seen = open + finished + aborted + broken."""

    seen: int = 0
    open: int = 0
    finished: int = 0
    """Answered whole, errors included."""
    aborted: int = 0
    """The client left first."""
    broken: int = 0
    """Cut by a fault, by `stop` or by `crash`."""


@dataclass
class Received:
    """One inference request as it arrived. `outcome` is open, finished, aborted or broken."""

    request: Request
    outcome: str = "open"

    @property
    def path(self) -> str:
        return self.request.path

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.request.headers)

    @property
    def body(self) -> Any:
        """The JSON body. Raises json.JSONDecodeError."""
        return self.request.json()


class Observer:
    """Counts and remembers requests; `wait_for` resolves as soon as the numbers are reached."""

    def __init__(self, gauges: Callable[[], Mapping[str, int]]) -> None:
        self.counts = Counts()
        self.requests: deque[Received] = deque(maxlen=HISTORY)
        self.probes: Counter[str] = Counter()
        self._gauges = gauges
        self._waiters: set[tuple[frozenset[tuple[str, int]], asyncio.Future[None]]] = set()

    def begin(self, request: Request) -> Received:
        received = Received(request)
        self.requests.append(received)
        self.counts.seen += 1
        self.counts.open += 1
        self.changed()
        return received

    def end(self, received: Received, outcome: str) -> None:
        received.outcome = outcome
        self.counts.open -= 1
        setattr(self.counts, outcome, getattr(self.counts, outcome) + 1)
        self.changed()

    def state(self) -> dict[str, int]:
        """All counters and gauges by name."""
        return {**asdict(self.counts), **self._gauges()}

    def changed(self) -> None:
        if not self._waiters:
            return
        state = self.state()
        for expected, waiter in list(self._waiters):
            if not waiter.done() and _reached(state, expected):
                waiter.set_result(None)

    async def wait_for(self, timeout_s: float, expected: Mapping[str, int]) -> None:
        """Wait until gauges equal and counters are at least what is expected. Raises TimeoutError naming the state."""
        unknown = set(expected) - set(self.state())
        if unknown:
            raise ValueError(f"no such number: {', '.join(sorted(unknown))}; known: {', '.join(self.state())}")
        wanted = frozenset(expected.items())
        if _reached(self.state(), wanted):
            return
        entry = (wanted, asyncio.get_running_loop().create_future())
        self._waiters.add(entry)
        try:
            await asyncio.wait_for(entry[1], timeout_s)
        except TimeoutError:
            raise TimeoutError(f"expected {dict(expected)} within {timeout_s} s, have {self.state()}") from None
        finally:
            self._waiters.discard(entry)


def _reached(state: Mapping[str, int], expected: frozenset[tuple[str, int]]) -> bool:
    return all(state[name] == value if name in GAUGES else state[name] >= value for name, value in expected)
