"""Calls: requests on their way, each with what became of it. Latencies count from when a request was due."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from loadtest.client import Address, Connection, Scanner, StampScanner, connect
from loadtest.pacing import NS, Pacer
from loadtest.scenarios.demand import Ask

MOST_CONNECTIONS = 8_192
QUEUE_HEADER = b"x-sluice-queue-ms"
_CODE = re.compile(rb'"code": ?"(\w+)"')


@dataclass(slots=True, eq=False)
class Call:
    """One request and its answer. Times are CLOCK_MONOTONIC ns, 0 for what did not happen.

    `code` is the error's, `lost` for an answer that was cut off; empty for a whole answer, and while there is none.
    `queued_ms` is the wait for a slot as the gateway tells it.
    """

    ask: Ask
    due_ns: int
    sent_ns: int = 0
    first_ns: int = 0
    ended_ns: int = 0
    status: int = 0
    code: str = ""
    tokens: int = 0
    queued_ms: float = 0.0
    was_cancelled: bool = False

    @property
    def is_served(self) -> bool:
        return self.ended_ns > 0 and self.status == 200 and not self.code and not self.was_cancelled

    @property
    def ttft_s(self) -> float:
        return (self.first_ns - self.due_ns) / NS

    @property
    def took_s(self) -> float:
        return (self.ended_ns - self.due_ns) / NS


class Callers:
    """Places calls over kept connections, and hears how they end. Enter before use; leaving it cuts what is left."""

    def __init__(
        self, *, scanner: type[Scanner] = StampScanner, on_end: Callable[[Call], None] = lambda call: None
    ) -> None:
        self._scanner = scanner
        self.on_end = on_end
        self.on_progress: Callable[[Call], None] = lambda call: None
        self._idle: dict[Address, deque[Connection]] = defaultdict(deque)
        self._calls: dict[Connection, Call] = {}
        self._at: dict[Connection, Address] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._lines: dict[Call, Connection] = {}
        self._changed = asyncio.Event()
        self._is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        for task in self._connecting:
            task.cancel()
        for connection in list(self._at):
            connection.abort()

    @property
    def under_way(self) -> int:
        return len(self._calls) + len(self._connecting)

    def place(self, ask: Ask, address: Address, due_ns: int) -> Call:
        """Send `ask` now; it was due at `due_ns`."""
        call = Call(ask, due_ns)
        idle = self._idle[address]
        if idle:
            self._send(call, idle.pop(), address)
        elif len(self._at) >= MOST_CONNECTIONS:
            self._end(call, "no_connection")
        else:
            task = asyncio.create_task(self._connect_and_send(call, address))
            self._connecting.add(task)
            task.add_done_callback(self._connected)
        return call

    async def play(
        self, asks: Sequence[Ask], address_of: Callable[[Ask], Address], begin_ns: int | None = None
    ) -> list[Call]:
        """Place every ask when it is due, whether or not earlier ones are answered. Returns when the last was sent."""
        begin_ns = begin_ns or time.monotonic_ns()
        calls: list[Call] = []
        done = asyncio.get_running_loop().create_future()

        def send_due() -> None:
            while len(calls) < len(asks):
                ask = asks[len(calls)]
                due_ns = begin_ns + round(ask.due_s * NS)
                if due_ns > time.monotonic_ns():
                    pacer.at(due_ns, send_due)
                    return
                calls.append(self.place(ask, address_of(ask), due_ns))
            if not done.done():
                done.set_result(None)

        with Pacer(asyncio.get_running_loop()) as pacer:
            send_due()
            await done
        return calls

    async def saturate(
        self, asks: Iterator[Ask], addresses: Sequence[Address], callers: int, seconds: float
    ) -> list[Call]:
        """A closed loop: so many callers at each address, who ask again as soon as they are answered, for a time."""
        calls: list[Call] = []
        end_ns = time.monotonic_ns() + round(seconds * NS)
        places: dict[Call, Address] = {}

        def again(call: Call) -> None:
            address = places.pop(call, None)
            if address is not None and call.ended_ns < end_ns:
                ask(address)

        def ask(address: Address) -> None:
            call = self.place(next(asks), address, time.monotonic_ns())
            places[call] = address
            calls.append(call)

        before, self.on_end = self.on_end, again
        try:
            for address in addresses:
                for _ in range(callers):
                    ask(address)
            await asyncio.sleep(seconds)
            await self.settled(60.0)
        finally:
            self.on_end = before
        return calls

    def under_way_at(self, address: Address) -> int:
        return sum(self._at.get(connection) == address for connection in self._calls)

    def cancel(self, call: Call) -> bool:
        """Leave: close the connection while the answer is awaited. False if there is none to be left."""
        connection = self._lines.get(call)
        if connection is None or call.was_cancelled:
            return False
        call.was_cancelled = True
        connection.abort()
        return True

    async def settled(self, timeout_s: float) -> None:
        """Wait until no call is under way. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while self.under_way:
                self._changed.clear()
                await self._changed.wait()

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        self._changed.set()

    async def _connect_and_send(self, call: Call, address: Address) -> None:
        try:
            connection = await connect(self, address, self._scanner)
        except (OSError, TimeoutError):
            self._end(call, "no_connection")
            return
        self._at[connection] = address
        self._send(call, connection, address)

    def _send(self, call: Call, connection: Connection, address: Address) -> None:
        call.sent_ns = time.monotonic_ns()
        self._calls[connection] = call
        self._lines[call] = connection
        connection.send(call.ask.encode(address), call.due_ns)

    def _end(self, call: Call, code: str) -> None:
        call.ended_ns, call.code = time.monotonic_ns(), code
        self._lines.pop(call, None)
        self._changed.set()
        if self._is_open:
            self.on_end(call)

    # client.Load

    def on_token(self, connection: Connection, due_ns: int, now_ns: int) -> None:
        call = self._calls[connection]
        call.first_ns = call.first_ns or now_ns
        call.tokens += 1
        self.on_progress(call)

    def on_answer(self, connection: Connection, status: int, now_ns: int) -> None:
        call = self._calls.pop(connection, None)
        if call is None or call.was_cancelled:
            # Who has left may find the rest of the answer in what was read already; it left all the same.
            if call is not None:
                self._end(call, "cancelled")
            return
        if connection.reusable:
            self._idle[self._at[connection]].append(connection)
        call.status, call.queued_ms = status, float(connection.headers.get(QUEUE_HEADER, b"0"))
        self._end(call, "" if status == 200 else _code_in(connection.refusal))

    def on_lost(self, connection: Connection) -> None:
        address = self._at.pop(connection, None)
        if address is not None:
            with suppress(ValueError):
                self._idle[address].remove(connection)
        call = self._calls.pop(connection, None)
        if call is not None:
            self._end(call, "cancelled" if call.was_cancelled else "lost")


def _code_in(body: bytes) -> str:
    found = _CODE.search(body)
    return found[1].decode() if found else "unknown"
