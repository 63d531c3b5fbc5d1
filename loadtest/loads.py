"""The shapes of load: closed loop, open loop, and streams that wait.

Each is bounded in connections and in time, and counts what went wrong instead of hiding it.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from loadtest.client import Address, ChatRequest, Connection, connect
from loadtest.pacing import NS, Pacer


class LoadError(Exception):
    """The load could not be applied, so there is nothing to report."""


class ClosedLoop:
    """N connections; each sends its next request when its answer is complete.

    Attributes:
        answers: answers with status 200 so far.
        tokens: content chunks so far.
        failures: what else happened: another status, or `lost` for a connection that the target closed.
    """

    def __init__(self, address: Address, request: ChatRequest, limit: int | None = None) -> None:
        """At most `limit` requests are sent in all, without end if None."""
        self._address, self._request = address, request.encode(address)
        self._remaining = math.inf if limit is None else limit
        self._under_way = 0
        self._done = asyncio.get_running_loop().create_future()
        self._connections: list[Connection] = []
        self._closing = False
        self.answers = 0
        self.tokens = 0
        self.failures: Counter[str] = Counter()

    async def start(self, connections: int, stagger_s: float) -> None:
        """Open all connections, their first requests spread evenly over `stagger_s`."""
        begin = time.monotonic()
        for index in range(connections):
            await asyncio.sleep(max(0.0, begin + stagger_s * index / connections - time.monotonic()))
            connection = await connect(self, self._address)
            self._connections.append(connection)
            self._send(connection, time.monotonic_ns())

    async def finished(self) -> None:
        """Wait until all requests up to the limit are answered or lost."""
        await asyncio.shield(self._done)

    def close(self) -> None:
        self._closing = True
        self._done.cancel()
        for connection in self._connections:
            connection.abort()

    def on_token(self, connection: Connection, due_ns: int, now_ns: int) -> None:
        self.tokens += 1

    def on_answer(self, connection: Connection, status: int, now_ns: int) -> None:
        if status == 200:
            self.answers += 1
        else:
            self.failures[str(status)] += 1
        self._under_way -= 1
        if connection.reusable and not self._closing:
            self._send(connection, now_ns)

    def on_lost(self, connection: Connection) -> None:
        if self._closing:
            return
        self.failures["lost"] += 1
        self._under_way -= connection.busy
        self._finish_when_empty()

    def _send(self, connection: Connection, now_ns: int) -> None:
        if self._remaining:
            self._remaining -= 1
            self._under_way += 1
            connection.send(self._request, now_ns)
        self._finish_when_empty()

    def _finish_when_empty(self) -> None:
        if not self._under_way and not self._done.done():
            self._done.set_result(None)


@asynccontextmanager
async def closed_loop(
    address: Address, request: ChatRequest, connections: int, stagger_s: float = 0.0, limit: int | None = None
) -> AsyncIterator[ClosedLoop]:
    """Keep `connections` exchanges going until `limit` requests are sent, or the block ends."""
    load = ClosedLoop(address, request, limit)
    try:
        await load.start(connections, stagger_s)
        yield load
    finally:
        load.close()


@dataclass
class OpenLoopResult:
    """What an open loop saw. Delays are in ns.

    Attributes:
        ttft_ns: from each request's *scheduled* time to its first content chunk; a request that has none when the load
            ends counts with the time it had waited by then, so a target that falls behind cannot look fast.
        chunk_delay_ns: from the time each content chunk was due at the worker to its arrival.
        offered: requests scheduled.
        unfinished: requests without a complete answer when the load ended.
        failures: another status, or `lost` for an exchange whose connection the target closed; one that carries none
            may be closed, be it for having waited too long.
    """

    offered: int
    ttft_ns: list[int] = field(default_factory=list)
    chunk_delay_ns: list[int] = field(default_factory=list)
    unfinished: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class OpenLoop:
    """Requests leave at their scheduled times whether or not earlier ones are answered (no coordinated omission).

    A request that finds every connection busy waits for one; its delay still counts from its scheduled time.
    """

    def __init__(self, address: Address, request: ChatRequest, times_ns: Sequence[int], warmup_s: float) -> None:
        self._address, self._request = address, request.encode(address)
        self._times_ns, self._warmup_ns = times_ns, round(warmup_s * NS)
        self._connections: list[Connection] = []
        self._idle: deque[Connection] = deque()
        self._waiting: deque[int] = deque()  # bounded by the schedule
        self._under_way: set[Connection] = set()
        self._next = 0
        self._done = asyncio.get_running_loop().create_future()
        self._result = OpenLoopResult(offered=len(times_ns))

    async def open(self, connections: int) -> None:
        for _ in range(connections):
            self._connections.append(await connect(self, self._address))
        self._idle.extend(self._connections)

    def close(self) -> None:
        self._done.cancel()
        for connection in self._connections:
            connection.abort()

    async def run(self, pacer: Pacer, grace_s: float) -> OpenLoopResult:
        """Apply the schedule, starting now, then wait at most `grace_s` for the last answers."""
        self._pacer, self._begin_ns = pacer, time.monotonic_ns()
        self._send_due()
        try:
            async with asyncio.timeout(self._times_ns[-1] / NS + grace_s):
                await asyncio.shield(self._done)
        except TimeoutError:
            self._count_unfinished(time.monotonic_ns())
        return self._result

    def _send_due(self) -> None:
        while self._next < len(self._times_ns):
            due_ns = self._begin_ns + self._times_ns[self._next]
            if due_ns > time.monotonic_ns():
                self._pacer.at(due_ns, self._send_due)
                break
            self._waiting.append(due_ns)
            self._next += 1
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting and self._idle:
            connection = self._idle.pop()
            self._under_way.add(connection)
            connection.send(self._request, self._waiting.popleft())

    def _sampled(self, due_ns: int) -> bool:
        return self._warmup_ns <= due_ns - self._begin_ns <= self._times_ns[-1]

    def on_token(self, connection: Connection, due_ns: int, now_ns: int) -> None:
        if connection.tokens == 1 and self._sampled(connection.sent_ns):
            self._result.ttft_ns.append(now_ns - connection.sent_ns)
        if self._sampled(due_ns):
            self._result.chunk_delay_ns.append(now_ns - due_ns)

    def on_answer(self, connection: Connection, status: int, now_ns: int) -> None:
        if status != 200:
            self._result.failures[str(status)] += 1
        self._under_way.discard(connection)
        if connection.reusable:
            self._idle.append(connection)
        self._send_waiting()
        self._finish_when_empty()

    def on_lost(self, connection: Connection) -> None:
        if self._done.done():
            return
        if connection in self._under_way:
            self._result.failures["lost"] += 1
            self._under_way.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._finish_when_empty()

    def _finish_when_empty(self) -> None:
        sent_all = self._next == len(self._times_ns) and not self._waiting
        if sent_all and not self._under_way and not self._done.done():
            self._done.set_result(None)

    def _count_unfinished(self, now_ns: int) -> None:
        """What waits now has waited at least until now; leaving it out would flatter a target that falls behind."""
        unsent = [*self._waiting, *(self._begin_ns + at for at in self._times_ns[self._next :])]
        tokenless = [connection.sent_ns for connection in self._under_way if not connection.tokens]
        self._result.unfinished = len(unsent) + len(self._under_way)
        self._result.ttft_ns += [now_ns - sent_ns for sent_ns in [*unsent, *tokenless] if self._sampled(sent_ns)]


async def open_loop(
    address: Address,
    request: ChatRequest,
    times_ns: Sequence[int],
    *,
    warmup_s: float,
    connections: int,
    grace_s: float,
) -> OpenLoopResult:
    """Send `request` at `times_ns` (ns from the start), over connections that are opened beforehand.

    Samples are kept of what was due between `warmup_s` and the last send time; `grace_s` bounds the wait for the last
    answers.

    Raises:
        LoadError: the connections could not be opened.
    """
    load = OpenLoop(address, request, times_ns, warmup_s)
    try:
        await load.open(connections)
        with Pacer(asyncio.get_running_loop()) as pacer:
            return await load.run(pacer, grace_s)
    except OSError as error:
        raise LoadError(f"cannot open {connections} connections to {address.url}: {error}") from error
    finally:
        load.close()


class IdleStreams:
    """Streams that have their first token and wait for the second.

    Attributes:
        ended: streams that did not stay open.
    """

    def __init__(self, address: Address, request: ChatRequest) -> None:
        self._address, self._request = address, request.encode(address)
        self._first: dict[Connection, asyncio.Future[None]] = {}
        self._closing = False
        self.ended = 0

    async def open(self, count: int, limit_s: float) -> None:
        """Open `count` streams, 16 at a time, and await the first token of each."""
        opening = asyncio.Semaphore(16)
        try:
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(self._open_one(opening))
        except (TimeoutError, ExceptionGroup) as error:
            cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else f"{limit_s:g} s passed"
            raise LoadError(f"{count} idle streams could not be opened: {cause}") from error

    async def _open_one(self, opening: asyncio.Semaphore) -> None:
        async with opening:
            connection = await connect(self, self._address)
            first = self._first[connection] = asyncio.get_running_loop().create_future()
            connection.send(self._request, time.monotonic_ns())
            await first

    def close(self) -> None:
        self._closing = True
        for connection, first in self._first.items():
            first.cancel()
            connection.abort()

    def on_token(self, connection: Connection, due_ns: int, now_ns: int) -> None:
        if not self._first[connection].done():
            self._first[connection].set_result(None)

    def on_answer(self, connection: Connection, status: int, now_ns: int) -> None:
        self._refuse(connection, f"an idle stream ended with status {status}")

    def on_lost(self, connection: Connection) -> None:
        self._refuse(connection, "an idle stream was closed by the target")

    def _refuse(self, connection: Connection, why: str) -> None:
        first = self._first.get(connection)
        if self._closing or first is None:
            return
        if first.done():
            self.ended += 1
        else:
            first.set_exception(LoadError(why))


@asynccontextmanager
async def idle_streams(
    address: Address, request: ChatRequest, count: int, limit_s: float
) -> AsyncIterator[IdleStreams]:
    """Hold `count` streams that each have had their first token, for as long as the block runs.

    Raises:
        LoadError: they could not all be opened within `limit_s`.
    """
    load = IdleStreams(address, request)
    try:
        await load.open(count, limit_s)
        yield load
    finally:
        load.close()
