"""The measurement: which load, on which target, in which order, and what is read meanwhile."""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from loadtest.client import ChatRequest
from loadtest.cpu import CpuReading, MeterError, cpu_between, read_cpu, read_pss_mib
from loadtest.figures import Figure
from loadtest.loads import LoadError, OpenLoopResult, closed_loop, idle_streams, open_loop
from loadtest.pacing import jittered_times, poisson_times
from loadtest.processes import ProcessError, free_address, running, until_ready
from loadtest.samples import percentile
from loadtest.targets import Site, Target, valkey

TTFT_RATE = 200
"""Requests per second of the open loop that measures added TTFT."""
CHUNK_RATE = 6_000
"""Chunks per second of the open loop that measures added inter-token delay."""
DIRECT_P99_MS = 5.0
"""A direct reading above this says that other work has the cores; what a target adds to it would be noise."""
STREAMS = 64
CARRIED = 0.95
"""The part of a load's chunks that must arrive; below it the load is another one than is said."""
BUSY = 0.9
"""The part of its cores from which the load is what could not keep up."""
MARGIN_S = 120.0
"""What one step may take beyond the windows that it measures."""
WINDOWS_PER_STEP = 4


@dataclass(frozen=True)
class Pace:
    """Streams of one kind, `itl_ms` between their tokens; the requests' own cost is in that of their chunks."""

    request: ChatRequest
    itl_ms: float

    @property
    def length_s(self) -> float:
        return self.request.tokens * self.itl_ms / 1e3

    @property
    def chunks_per_s(self) -> float:
        return STREAMS * 1e3 / self.itl_ms


DENSE = Pace(ChatRequest(1_000, 256, stream=True), 10.0)
"""A chunk each 10 ms, long enough that the chunk is what is measured, and not the request."""
BRIEF = Pace(ChatRequest(1_000, 64, stream=True), 32.0)
"""Short answers of a slow engine: a third of the cost are the streams' beginnings and ends."""


@dataclass(frozen=True)
class Plan:
    """How long and how often. Seconds throughout.

    Attributes:
        window_s: length of one measured window.
        warmup_s: load applied before the window opens.
        idle_count: streams held open for the memory figure.
        idle_gap_s: between the first and the second token of those; bounds the time to open and weigh them.
    """

    repeats: int = 3
    window_s: float = 6.0
    warmup_s: float = 1.5
    idle_count: int = 8_000
    idle_gap_s: float = 60.0


@dataclass(frozen=True)
class Cores:
    """Which cores the worker and the client share, and which the target has."""

    load: set[int]
    target: set[int]


@dataclass
class Findings:
    """What one target showed: for each figure one value per repeat, and what a reader must know beside them."""

    values: dict[Figure, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, figure: Figure, value: float) -> None:
        self.values.setdefault(figure, []).append(value)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Window:
    """What happened between two readings: CPU and wall time in ns, answers and content chunks.

    `load_cpu_ns` is what worker, client and all else but the target took.
    """

    cpu_ns: int
    load_cpu_ns: int
    wall_ns: int
    answers: int
    tokens: int


class Visit:
    """One freshly started target in front of a fresh worker, and the loads it is put through."""

    def __init__(
        self,
        target: Target,
        plan: Plan,
        repeat: int,
        site: Site,
        pid: int,
        findings: Findings,
        *,
        load_cores: int = 1,
        margin_s: float = MARGIN_S,
    ) -> None:
        self._target, self._plan, self._repeat = target, plan, repeat
        self._site, self._pid, self._findings = site, pid, findings
        self._load_cores = load_cores
        self._limit_s = margin_s + WINDOWS_PER_STEP * (plan.warmup_s + plan.window_s)

    async def weigh(self) -> None:
        """Memory, which only a target that has carried nothing yet shows clearly."""
        await self._try("memory", self._memory)

    async def load(self) -> None:
        """CPU and latency."""
        # From few connections to many: the cost of some relays grows with the idle connections that earlier loads left.
        await self._try("1 KB prompts", self._chat_1k)
        await self._try("32 KB prompts", self._chat_32k)
        await self._try("1 MB prompts", self._chat_1m)
        await self._try("streams", self._streams)
        await self._try("streams in step", self._streams_in_step)
        await self._try("brief streams", self._brief_streams)
        await self._try("open-loop requests", self._added_ttft)
        await self._try("open-loop chunks", self._added_chunk_delay)

    async def _try(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        """Take one step; if it fails it leaves a note, and the others go on."""
        try:
            async with _within(self._limit_s):
                await self._pace()
                await step()
        except (LoadError, MeterError) as error:
            self._findings.note(f"{name}: {error}")
            name = f"{name}: {error}"
        print(f"  {self._repeat + 1}/{self._plan.repeats} {self._target.name}: {name}", flush=True)

    async def _chat_1k(self) -> None:
        window = await self._closed_loop(ChatRequest(1_000, 64, stream=False), connections=32)
        self._findings.add(Figure.CPU_REQUEST_1K, window.cpu_ns / window.answers / 1e3)
        self._findings.add(Figure.RATE_1K, window.answers / window.wall_ns * 1e9)
        self._findings.add(Figure.BUSY_1K, window.cpu_ns / window.wall_ns * 100)

    async def _chat_32k(self) -> None:
        window = await self._closed_loop(ChatRequest(32_000, 64, stream=False), connections=32)
        self._findings.add(Figure.CPU_REQUEST_32K, window.cpu_ns / window.answers / 1e3)

    async def _chat_1m(self) -> None:
        window = await self._closed_loop(ChatRequest(1_000_000, 64, stream=False), connections=8)
        self._findings.add(Figure.CPU_REQUEST_1M, window.cpu_ns / window.answers / 1e3)

    async def _streams(self) -> None:
        """Streams whose chunks fall due one by one: every chunk is a wake-up of its own."""
        await self._staggered("streams", DENSE, Figure.CPU_CHUNK)

    async def _brief_streams(self) -> None:
        await self._staggered("brief streams", BRIEF, Figure.CPU_CHUNK_BRIEF)

    async def _staggered(self, name: str, pace: Pace, figure: Figure) -> None:
        await self._pace(itl_ms=pace.itl_ms)
        window = await self._closed_loop(pace.request, STREAMS, stagger_s=pace.length_s)
        self._judge(name, pace, window)
        self._findings.add(figure, window.cpu_ns / window.tokens / 1e3)

    async def _streams_in_step(self) -> None:
        """Streams that start together and tick together, as one engine's batch does; counted in whole rounds."""
        rounds = max(1, round(self._plan.window_s / DENSE.length_s))
        await self._pace(itl_ms=DENSE.itl_ms)
        await self._rounds(1)
        window = await self._rounds(rounds)
        self._judge("streams in step", DENSE, window)
        self._findings.add(Figure.CPU_CHUNK_IN_STEP, window.cpu_ns / window.tokens / 1e3)

    async def _rounds(self, rounds: int) -> Window:
        """All connections, each carrying `rounds` streams, from connecting to the end."""
        limit_s = rounds * DENSE.length_s
        before = self._read()
        async with closed_loop(self._site.address, DENSE.request, STREAMS, limit=STREAMS * rounds) as load:
            try:
                async with asyncio.timeout(limit_s + 30):
                    await load.finished()
            except TimeoutError:
                raise LoadError(f"{rounds} rounds of streams took 30 s longer than {limit_s:g} s") from None
            window = _between(before, self._read(), load.answers, load.tokens)
            if load.failures:
                raise LoadError(f"failures {dict(load.failures)}")
        return window

    def _judge(self, name: str, pace: Pace, window: Window) -> None:
        if missing := shortfall(pace, window, self._load_cores):
            self._findings.note(f"{name}: {missing}")

    def _read(self) -> tuple[CpuReading, CpuReading]:
        """The target, and everything of this measurement, the target included."""
        return read_cpu(self._pid), read_cpu(os.getpid())

    async def _closed_loop(self, request: ChatRequest, connections: int, stagger_s: float = 0.0) -> Window:
        async with closed_loop(self._site.address, request, connections, stagger_s) as load:
            await asyncio.sleep(self._plan.warmup_s)
            before, answers, tokens = self._read(), load.answers, load.tokens
            await asyncio.sleep(self._plan.window_s)
            window = _between(before, self._read(), load.answers - answers, load.tokens - tokens)
        if load.failures or not (window.tokens if request.stream else window.answers):
            raise LoadError(f"{window.answers} answers, failures {dict(load.failures)}")
        return window

    async def _added_ttft(self) -> None:
        """Independent callers, short streamed answers without gaps; the same schedule for both roads."""
        times = poisson_times(TTFT_RATE, self._plan.warmup_s + self._plan.window_s, seed=self._repeat)
        direct, through = await self._both_roads(ChatRequest(1_000, 16, stream=True), times, self._plan.warmup_s)
        self._compare(direct.ttft_ns, through.ttft_ns, Figure.DIRECT_TTFT_P50, Figure.ADDED_TTFT_P50, 0.5)
        self._compare(direct.ttft_ns, through.ttft_ns, Figure.DIRECT_TTFT_P99, Figure.ADDED_TTFT_P99, 0.99)

    async def _added_chunk_delay(self) -> None:
        """Streams start steadily, so that after one stream's length the offered chunk rate is CHUNK_RATE."""
        itl_ms, tokens = 20.0, 100
        await self._pace(itl_ms=itl_ms)
        length_s = tokens * itl_ms / 1e3
        times = jittered_times(CHUNK_RATE / tokens, length_s + self._plan.window_s, self._repeat)
        direct, through = await self._both_roads(ChatRequest(1_000, tokens, stream=True), times, length_s)
        delays = direct.chunk_delay_ns, through.chunk_delay_ns
        if len(delays[1]) < 0.97 * len(delays[0]):
            self._findings.note(
                f"open-loop chunks: carried {len(delays[1])} where the worker alone has {len(delays[0])}"
            )
        self._compare(*delays, Figure.DIRECT_CHUNK_P50, Figure.ADDED_CHUNK_P50, 0.5)
        self._compare(*delays, Figure.DIRECT_CHUNK_P99, Figure.ADDED_CHUNK_P99, 0.99)

    def _compare(
        self, direct_ns: Sequence[int], through_ns: Sequence[int], direct: Figure, added: Figure, q: float
    ) -> None:
        if percentile(direct_ns, 0.99) > DIRECT_P99_MS * 1e6:
            alone = f"p99 of {percentile(direct_ns, 0.99) / 1e6:.0f} ms straight to the worker"
            raise LoadError(f"{alone}: the machine is too busy to tell")
        alone_ns = percentile(direct_ns, q)
        self._findings.add(direct, alone_ns / 1e6)
        self._findings.add(added, (percentile(through_ns, q) - alone_ns) / 1e6)

    async def _both_roads(
        self, request: ChatRequest, times_ns: Sequence[int], warmup_s: float
    ) -> tuple[OpenLoopResult, OpenLoopResult]:
        """The same schedule straight to the worker, then through the target."""
        roads = [
            await open_loop(address, request, times_ns, warmup_s=warmup_s, connections=256, grace_s=10.0)
            for address in (self._site.worker, self._site.address)
        ]
        direct, through = roads
        if direct.failures or direct.unfinished:
            raise LoadError(f"the worker itself did not carry the load: {direct.unfinished} unfinished")
        if through.failures:
            raise LoadError(f"failures {dict(through.failures)}")
        if through.unfinished:
            self._findings.note(f"{through.unfinished} of {through.offered} open-loop requests unfinished after 10 s")
        return direct, through

    async def _memory(self) -> None:
        count, gap_s = min(self._plan.idle_count, self._target.most_idle), self._plan.idle_gap_s
        if count < self._plan.idle_count:
            self._findings.note(f"memory: of {count:,} idle streams")
        await self._pace(itl_ms=gap_s * 1e3)
        before = read_pss_mib(self._pid)
        self._findings.add(Figure.PSS, before)
        async with idle_streams(self._site.address, ChatRequest(1_000, 2, stream=True), count, gap_s * 0.9) as load:
            grown = read_pss_mib(self._pid) - before
            if load.ended:
                raise LoadError(f"{load.ended} of {count} idle streams did not stay open")
            self._findings.add(Figure.IDLE_STREAM, grown * 1024 / count)

    async def _pace(self, ttft_ms: float = 0.0, itl_ms: float = 0.0) -> None:
        async with httpx.AsyncClient(base_url=self._site.worker.url, timeout=5) as client:
            answer = await client.post("/pace", json={"ttft_ms": ttft_ms, "itl_ms": itl_ms})
            answer.raise_for_status()


def shortfall(pace: Pace, window: Window, load_cores: int) -> str | None:
    """What of the load was not carried, in words; None if all of it was.

    Raises:
        LoadError: worker and client, which have `load_cores`, could not keep up.
    """
    carried = window.tokens / window.wall_ns * 1e9
    if carried >= CARRIED * pace.chunks_per_s:
        return None
    said = f"{carried:,.0f} of {pace.chunks_per_s:,.0f} chunks/s carried"
    if window.load_cpu_ns >= BUSY * load_cores * window.wall_ns:
        raise LoadError(f"{said}: worker and client had no more than their cores")
    return f"{said}, the target's CPU {window.cpu_ns / window.wall_ns:.0%} of a core"


def _between(
    before: tuple[CpuReading, CpuReading], after: tuple[CpuReading, CpuReading], answers: int, tokens: int
) -> Window:
    target, everything = (cpu_between(*pair) for pair in zip(before, after, strict=True))
    return Window(target, everything - target, after[0].at_ns - before[0].at_ns, answers, tokens)


@asynccontextmanager
async def _within(limit_s: float) -> AsyncIterator[None]:
    """Bound the block's time, whatever the target does with it. Raises LoadError."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise LoadError(f"not done within {limit_s:g} s") from None


@asynccontextmanager
async def visit(target: Target, plan: Plan, repeat: int, cores: Cores, findings: Findings) -> AsyncIterator[Visit]:
    """Start a worker and the target in front of it, and stop both when the block ends.

    Raises:
        ProcessError: one of them did not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as name:
        site = Site(free_address(), free_address(), free_address(), Path(name))
        worker = [sys.executable, "-m", "loadtest.fake_vllm", "--port", str(site.worker.port)]
        worker_log, target_log = site.directory / "worker.log", site.directory / f"{target.name}.log"
        async with AsyncExitStack() as stack:
            process = await stack.enter_async_context(running(worker, cores.load, worker_log))
            await until_ready(process, site.worker, "/health", worker_log)
            if target.needs_valkey:
                await stack.enter_async_context(running(valkey(site), cores.load, site.directory / "valkey.log"))
            async with running(target.command(site), cores.target, target_log) as process:
                await until_ready(process, site.address, target.ready_path, target_log)
                yield Visit(target, plan, repeat, site, process.pid, findings, load_cores=len(cores.load))


async def bench(targets: Sequence[Target], plan: Plan, cores: Cores) -> dict[str, Findings]:
    """Visit the targets in turn, as often as the plan says: A B C A B C, so that a slow drift of the machine hits all.

    A target that does not start is noted and left out of the later rounds.
    """
    findings = {target.name: Findings() for target in targets}
    remaining = list(targets)
    for repeat in range(plan.repeats):
        for target in list(remaining):
            try:
                async with visit(target, plan, repeat, cores, findings[target.name]) as fresh:
                    await fresh.weigh()
                async with visit(target, plan, repeat, cores, findings[target.name]) as fresh:
                    await fresh.load()
            except ProcessError as error:
                remaining.remove(target)
                findings[target.name].note(f"did not run: {error}")
                print(f"  {target.name} did not run: {error}", flush=True)
    return findings
