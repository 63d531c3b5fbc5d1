"""Churn: very many requests, a third of which are left by their clients, on workers and gateways that are killed.

So many callers as there are slots, twice: half of them wait in the queue at any time. Who leaves mid-way is told by
the engines' own word when its request is dispatched. In the end nothing of all that may be left anywhere.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.client import Address
from loadtest.report import table
from loadtest.scenarios import summary
from loadtest.scenarios.calls import Call, Callers
from loadtest.scenarios.demand import Ask, Sizes, endless
from loadtest.scenarios.engine import EngineShape
from loadtest.scenarios.fates import SHARES, Fate, Fates
from loadtest.scenarios.fleet import Fleet, FleetPlan, Process, fleet
from loadtest.scenarios.goals import Goal
from loadtest.scenarios.truth import Sight, look

KILLED_SHARE = 0.02
"""Of all requests, in a worker when it is killed."""
QUEUE_LEAVE_S = 0.05
"""Within this time of asking, those leave who are to leave while they are queued."""
TIDY_S = 25.0
"""A dead replica's slots are free within 20 s."""
IDLE_S = 6.0
"""Longer than a gateway keeps idle connections."""
KILL_PAUSE_S = 0.1
REPORT_EVERY = 10_000
STARVED_S = 120.0
"""Nobody answered for so long: something is stuck."""


def _quick_engines() -> FleetPlan:
    shape = EngineShape(max_num_seqs=16, step_s=0.008, step_s_per_sequence=0.0001, step_s_per_prompt_token=0.00005)
    # Workers come and go all the time here; their slow start is another test's matter.
    return FleetPlan(engines=4, gateways=2, shape=shape, slots=16, settings={"health": {"slow_start_s": 0.5}})


@dataclass(frozen=True)
class ChurnPlan:
    """How many requests, of what size."""

    requests: int = 100_000
    fleet: FleetPlan = field(default_factory=_quick_engines)
    sizes: Sizes = field(
        default_factory=lambda: Sizes(prompt_median=20, prompt_bounds=(8, 40), output_median=8, output_bounds=(4, 24))
    )
    seed: int = 1

    @property
    def callers(self) -> int:
        return 2 * self.fleet.engines * self.fleet.slots


@dataclass(frozen=True, slots=True)
class Burden:
    """What a gateway's process holds of the machine."""

    files: int
    rss_kib: int

    @classmethod
    def of(cls, pid: int) -> Burden:
        """Read from /proc (proc_pid_status(5))."""
        place = Path(f"/proc/{pid}")
        fields = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
        return cls(len(list((place / "fd").iterdir())), int(fields["VmRSS"].split()[0]))


@dataclass
class Found:
    """Everything that was seen. `burdens` are of the gateway that lives through all: idle before, half-way, idle after.

    `killed` are the requests that were in a worker when it died, `on_killed_gateway` those of the gateway that died.
    `tidy_s` is how long it took until nothing was left, None for too long.
    """

    plan: ChurnPlan
    endings: Counter[str]
    met: Counter[Fate]
    left_queued: set[str]
    killed: int
    worker_deaths: int
    on_killed_gateway: int
    burdens: tuple[Burden, Burden, Burden]
    took_s: float
    tidy_s: float | None
    sight: Sight
    in_engines: int
    in_flight: float

    @property
    def asked(self) -> int:
        """Those that have ended."""
        return sum(self.endings.values())

    @property
    def unserved(self) -> int:
        """Those whose clients stayed, and that were not answered whole."""
        return self.asked - self.endings["served"] - self.endings["cancelled"]

    @property
    def excused(self) -> int:
        return self.killed + self.on_killed_gateway

    @property
    def dispatched_in_vain(self) -> float:
        """Per cent of those who left while queued: their grant and their leaving crossed each other."""
        return 100 * len(self.left_queued & self.sight.arrived_ns.keys()) / max(1, len(self.left_queued))

    @property
    def more_than_twice(self) -> int:
        return sum(count > 2 for count in self.sight.arrivals.values())


class Churn:
    """Asks, leaves and kills until all requests have been asked."""

    def __init__(self, plan: ChurnPlan, house: Fleet, callers: Callers) -> None:
        self._plan = plan
        self._house = house
        self._callers = callers
        self._chance = random.Random(f"{plan.seed} churn")
        self._source: Iterator[Ask] = endless("c", plan.sizes, plan.seed)
        self._fates = Fates(plan.seed)
        self._leaving: dict[str, tuple[Call, Fate]] = {}
        self._progress = asyncio.Event()
        self.endings: Counter[str] = Counter()
        self.left_queued: set[str] = set()
        self.asked = 0
        callers.on_end = self._ended
        callers.on_progress = self._got_token
        house.witness.on_arrival = self._dispatched

    @property
    def met(self) -> Counter[Fate]:
        return self._fates.met

    async def run_until(self, asked: int) -> None:
        """Keep all callers busy until so many have been asked. Raises TimeoutError when nothing moves any more."""
        while self._callers.under_way < self._plan.callers and self.asked < self._plan.requests:
            self._ask()
        while self.asked < asked:
            self._progress.clear()
            async with asyncio.timeout(STARVED_S):
                await self._progress.wait()

    def _ask(self) -> None:
        ask, fate = next(self._source), self._fates.draw()
        self.asked += 1
        call = self._callers.place(ask, self._door(), time.monotonic_ns())
        if fate is not Fate.STAYS:
            self._leaving[ask.name] = (call, fate)
        if fate is Fate.QUEUED:
            delay_s = self._chance.random() * QUEUE_LEAVE_S
            asyncio.get_running_loop().call_later(delay_s, self._leave, ask.name, Fate.QUEUED)

    def _door(self) -> Address:
        return self._chance.choice(self._house.doors)

    def _dispatched(self, name: str, worker: str) -> None:
        _, fate = self._leaving.get(name, (None, Fate.STAYS))
        if fate is Fate.QUEUED:
            del self._leaving[name]
            self._fates.missed(fate)
        elif fate is Fate.DISPATCHED:
            self._leave(name, fate)

    def _got_token(self, call: Call) -> None:
        name = call.ask.name
        _, fate = self._leaving.get(name, (None, Fate.STAYS))
        if fate is Fate.STREAMING and call.tokens >= call.ask.output_tokens // 2:
            self._leave(name, fate)
        elif fate is Fate.DISPATCHED:
            del self._leaving[name]
            self._fates.missed(fate)

    def _leave(self, name: str, fate: Fate) -> None:
        call, drawn = self._leaving.get(name, (None, Fate.STAYS))
        if call is None or drawn is not fate:
            return
        del self._leaving[name]
        if self._callers.cancel(call):
            self._fates.met[fate] += 1
            if fate is Fate.QUEUED:
                self.left_queued.add(name)
        else:
            self._fates.missed(fate)

    def _ended(self, call: Call) -> None:
        left = self._leaving.pop(call.ask.name, None)
        if left is not None:
            self._fates.missed(left[1])
        self.endings.update(summary.endings([call]))
        self._progress.set()
        if sum(self.endings.values()) % REPORT_EVERY == 0:
            print(f"  {self.asked:,} asked; {dict(self.endings.most_common(4))}", flush=True)
        # Not at once: an end may be told from inside the call that would be its own successor's.
        asyncio.get_running_loop().call_soon(self._ask_again)

    def _ask_again(self) -> None:
        """Several may have ended since, and each wants a successor: no more than the plan has."""
        if self.asked < self._plan.requests:
            self._ask()


async def measure(plan: ChurnPlan) -> Found:
    """Run it all. Raises ProcessError, LaunchError, or TimeoutError when nothing moves any more."""
    async with fleet(plan.fleet) as house:
        survivor, begin = house.gateways[0], time.monotonic()
        before = Burden.of(survivor.pid)
        with Callers() as callers:
            churn = Churn(plan, house, callers)
            async with _killing_workers(churn, house, plan):
                await churn.run_until(plan.requests // 2)
                half = Burden.of(survivor.pid)
                lost = await _replace_gateway(house, callers, house.gateways[-1])
                await churn.run_until(plan.requests)
                await callers.settled(STARVED_S)
        took_s = time.monotonic() - begin
        tidy_s = await _until_tidy(house)
        await asyncio.sleep(IDLE_S)
        witness = house.witness
        return Found(
            plan,
            churn.endings,
            churn.met,
            churn.left_queued,
            witness.killed,
            witness.deaths,
            lost,
            (before, half, Burden.of(survivor.pid)),
            took_s,
            tidy_s,
            await look(house),
            witness.held,
            await house.in_flight(),
        )


@asynccontextmanager
async def _killing_workers(churn: Churn, house: Fleet, plan: ChurnPlan) -> AsyncIterator[None]:
    """Engines die while the block runs; all of them live afterwards."""
    enough = asyncio.Event()
    task = asyncio.create_task(_kill_workers(churn, house, plan, enough))
    try:
        yield
    finally:
        enough.set()
        await task


async def _kill_workers(churn: Churn, house: Fleet, plan: ChurnPlan, enough: asyncio.Event) -> None:
    """Kill one engine after another, so that at any time the share of requests that died in one is as planned."""
    turns = itertools.cycle(house.engines)
    while not enough.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(enough.wait(), KILL_PAUSE_S)
        if house.witness.killed >= KILLED_SHARE * churn.asked:
            continue
        engine = next(turns)
        if house.witness.held_by(engine.address) >= plan.fleet.slots // 2:  # it has not just come back
            await engine.kill()
            await engine.start()


async def _replace_gateway(house: Fleet, callers: Callers, gateway: Process) -> int:
    """kill -9 with streams, queue and leases; then a new one at another place. How many requests it had."""
    lost = callers.under_way_at(gateway.address)
    print(f"  kill -9 of a gateway with {lost} requests", flush=True)
    await house.kill_gateway(gateway)
    await house.add_gateway()
    return lost


async def _until_tidy(house: Fleet) -> float | None:
    """How long until nothing is held or waits anywhere; None if that takes longer than TIDY_S."""
    begin = time.monotonic()
    while time.monotonic() - begin < TIDY_S:
        left = sum((await house.ledger()).values()) + house.witness.held
        if not left:
            return time.monotonic() - begin
        await asyncio.sleep(0.1)
    return None


def goals(found: Found) -> list[Goal]:
    """What issue 3 promises after all that, and the parts of goal L5 that can be seen from outside."""
    (before, half, after), asked = found.burdens, found.asked
    shares = [
        Goal(f"{fate.value}, of all", "≥", 95 * share, 100 * found.met[fate] / asked, " %", 1)
        for fate, share in SHARES.items()
    ]
    return [
        *shares,
        Goal("in a worker when it was killed, of all", "≥", 95 * KILLED_SHARE, 100 * found.killed / asked, " %", 1),
        Goal("requests without an end", "=", 0, found.plan.requests - asked, is_hard=True),
        Goal("stayed, and broken or refused without a kill", "≤", 0, found.unserved - found.excused),
        Goal("left while queued, of whom grants crossed the leaving", "≤", 2, found.dispatched_in_vain, " %", 2),
        Goal("dispatched more than twice", "=", 0, found.more_than_twice, is_hard=True),
        Goal("leases, tickets, slots and waits left at the end", "=", 0, sum(found.sight.left.values()), is_hard=True),
        Goal("requests left in engines", "=", 0, found.in_engines, is_hard=True),
        Goal("requests in flight by the gateways' own gauge", "=", 0, found.in_flight, is_hard=True),
        Goal("seconds until nothing was left", "≤", 20, found.tidy_s, " s", 1, is_hard=True),
        Goal("files of the surviving gateway, more than before", "≤", 10, after.files - before.files),
        Goal("its memory (RSS) at the end, × half-way", "≤", 1.05, after.rss_kib / half.rss_kib, digits=3),
    ]


def endings_table(found: Found) -> str:
    """How all requests ended, for their clients."""
    rows = [[ending, f"{count:,}", f"{count / found.asked:.2%}"] for ending, count in found.endings.most_common()]
    return table(["ending", "requests", "of all"], rows)


METHOD = """\
{requests:,} requests by {callers} callers who ask again as soon as they are answered or have left, through {gateways}
gateways, on {engines} modelled engines with {slots} slots each: half of all wait in the queue at any time. Clients
leave by closing the connection: within {leave:g} ms of asking while their request is queued; as soon as an engine has
it; after half of its tokens. Engines are killed (kill -9) and started again one after another, {deaths} times, with
{killed:,} requests in them; half-way one of the gateways is killed with {lost:,} and another started elsewhere. It took
{took:.0f} s, {rate:.0f} requests/s. Memory half-way {half:.1f} MiB, at the end {end:.1f} MiB.
"""


def method(found: Found) -> str:
    plan, (_, half, after) = found.plan, found.burdens
    return METHOD.format(
        requests=plan.requests,
        callers=plan.callers,
        gateways=plan.fleet.gateways,
        engines=plan.fleet.engines,
        slots=plan.fleet.slots,
        leave=1e3 * QUEUE_LEAVE_S,
        deaths=found.worker_deaths,
        killed=found.killed,
        lost=found.on_killed_gateway,
        took=found.took_s,
        rate=found.asked / found.took_s,
        half=half.rss_kib / 1024,
        end=after.rss_kib / 1024,
    )
