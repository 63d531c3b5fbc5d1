"""What the workers themselves saw: each tells of every chat request that arrives and ends, over a connection.

Lines: `worker ADDRESS` first, then `arrived|ended|aborted NAME NANOSECONDS HELD WAITING`, where HELD are the requests
in the worker just after, and WAITING the most that its engine left waiting since the line before. Nothing is lost when
a worker is killed: what it had told is here, and what it held is known.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from loadtest.client import Address


@dataclass(slots=True)
class Record:
    """What one worker told, over all its lives. `held` are the names of the requests in it now."""

    held: set[str] = field(default_factory=set)
    most_held: int = 0
    most_waiting: int = 0
    deaths: int = 0


class Witness:
    """Listens on a port of 127.0.0.1; `on_arrival` hears the name of each request as it reaches a worker."""

    def __init__(self, on_arrival: Callable[[str, str], None] = lambda name, worker: None) -> None:
        self.port = 0
        self.records: dict[str, Record] = {}
        self.arrived_ns: dict[str, int] = {}
        """When each request first reached a worker, CLOCK_MONOTONIC."""
        self.arrivals: Counter[str] = Counter()
        """How often each request reached a worker."""
        self.killed = 0
        """Requests that were in a worker when it died."""
        self.on_arrival = on_arrival

    @property
    def held(self) -> int:
        return sum(len(record.held) for record in self.records.values())

    @property
    def deaths(self) -> int:
        return sum(record.deaths for record in self.records.values())

    def held_by(self, worker: Address) -> int:
        record = self.records.get(f"{worker.host}:{worker.port}")
        return len(record.held) if record else 0

    @property
    def most_held(self) -> int:
        """By any one worker at once."""
        return max((record.most_held for record in self.records.values()), default=0)

    @property
    def most_waiting(self) -> int:
        """Left waiting by any one engine."""
        return max((record.most_waiting for record in self.records.values()), default=0)

    def forget_peaks(self) -> None:
        """Let the highest numbers start again."""
        for record in self.records.values():
            record.most_held, record.most_waiting = len(record.held), 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Teller(self), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()

    def introduce(self, worker: str) -> Record:
        return self.records.setdefault(worker, Record())

    def note(self, worker: str, record: Record, words: list[str]) -> None:
        """One line of a worker."""
        event, name, at_ns, held, waiting = words
        if event == "arrived":
            record.held.add(name)
            self.arrived_ns.setdefault(name, int(at_ns))
            self.arrivals[name] += 1
            self.on_arrival(name, worker)
        else:
            record.held.discard(name)
        record.most_held = max(record.most_held, int(held))
        record.most_waiting = max(record.most_waiting, int(waiting))

    def bury(self, record: Record) -> None:
        """The end of a worker: what it still held dies with it."""
        record.deaths += 1
        self.killed += len(record.held)
        record.held.clear()


class _Teller(asyncio.Protocol):
    """The connection of one worker, in one of its lives."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._worker = ""
        self._record: Record | None = None
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            words = line.decode().split()
            if self._record is None:
                self._worker = words[1]
                self._record = self._witness.introduce(self._worker)
            else:
                self._witness.note(self._worker, self._record, words)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._record is not None:
            self._witness.bury(self._record)
