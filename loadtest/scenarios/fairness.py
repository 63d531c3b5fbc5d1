"""Fairness: ten tenants with equal weights, one of which asks for ten times its share; then all for twice theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtest.pacing import NS
from loadtest.report import table
from loadtest.scenarios import summary
from loadtest.scenarios.calls import Call, Callers
from loadtest.scenarios.demand import Sizes, Stream, asks
from loadtest.scenarios.fleet import Fleet, FleetPlan, fleet
from loadtest.scenarios.goals import Goal
from loadtest.scenarios.overload import Capacity, OverloadPlan, measured_capacity, play
from loadtest.scenarios.truth import Sight, look, truth

HOG = "hog"
MODEST = tuple(f"tenant-{number}" for number in range(1, 10))
TENANTS = (HOG, *MODEST)
HOG_SHARES, MODEST_SHARES, EQUAL_SHARES = 10.0, 0.8, 2.0
SETTLE_S = 60.0


@dataclass(frozen=True)
class FairnessPlan:
    """Seconds of each phase; a share is a tenth of the measured capacity."""

    fleet: FleetPlan = field(default_factory=FleetPlan)
    sizes: Sizes = field(default_factory=Sizes)
    capacity_s: float = 15.0
    warmup_s: float = 4.0
    load_s: float = 40.0
    equal_s: float = 20.0
    patience_s: float = 10.0
    seed: int = 1

    @classmethod
    def quick(cls) -> FairnessPlan:
        return cls(FleetPlan(engines=2), capacity_s=4, warmup_s=2, load_s=6, equal_s=6)


@dataclass
class Phase:
    """What one mix of tenants showed, and when it was measured, CLOCK_MONOTONIC ns."""

    calls: list[Call]
    begin_ns: int
    end_ns: int

    @property
    def measured(self) -> list[Call]:
        return summary.due_between(self.calls, self.begin_ns, self.end_ns)

    def of(self, tenant: str) -> list[Call]:
        return [call for call in self.measured if call.ask.tenant == tenant]

    def tokens_per_s(self, tenant: str) -> float:
        """Counted by when answers end."""
        return summary.tokens_per_s(
            (call for call in self.calls if call.ask.tenant == tenant), self.begin_ns, self.end_ns
        )


@dataclass
class Found:
    """Everything that was seen."""

    plan: FairnessPlan
    capacity: Capacity
    quiet: Phase
    loud: Phase
    equal: Phase
    sight: Sight


async def measure(plan: FairnessPlan) -> Found:
    """Run all phases. Raises ProcessError, LaunchError, or TimeoutError for calls that never end."""
    async with fleet(plan.fleet) as house:
        with Callers() as callers:
            probing = OverloadPlan(plan.fleet, plan.sizes, capacity_s=plan.capacity_s, seed=plan.seed)
            capacity = await measured_capacity(house, callers, probing)
            share = capacity.requests_per_s / len(TENANTS)
            modest = [_stream(tenant, MODEST_SHARES * share, plan) for tenant in MODEST]
            quiet = await _phase("quiet", modest, plan.load_s, house, callers, plan)
            loud = await _phase(
                "loud", [*modest, _stream(HOG, HOG_SHARES * share, plan)], plan.load_s, house, callers, plan
            )
            alike = [_stream(tenant, EQUAL_SHARES * share, plan) for tenant in TENANTS]
            equal = await _phase("equal", alike, plan.equal_s, house, callers, plan)
            return Found(plan, capacity, quiet, loud, equal, await look(house))


def _stream(tenant: str, rate: float, plan: FairnessPlan) -> Stream:
    return Stream(rate, tenants=(tenant,), patience_s=plan.patience_s)


async def _phase(
    label: str, streams: Sequence[Stream], seconds: float, house: Fleet, callers: Callers, plan: FairnessPlan
) -> Phase:
    asked = asks(label, streams, plan.warmup_s + seconds, plan.sizes, plan.seed)
    calls = await play(house, callers, asked, plan.seed)
    await callers.settled(SETTLE_S)
    begin_ns = calls[0].due_ns - round(asked[0].due_s * NS)
    print(f"  {label}: {dict(summary.endings(calls))}", flush=True)
    measured_ns = begin_ns + round(plan.warmup_s * NS)
    return Phase(calls, measured_ns, measured_ns + round(seconds * NS))


def goals(found: Found) -> list[Goal]:
    """What issue 3 promises of fairness."""
    worst = min(_share(found.loud.of(tenant)) for tenant in MODEST)
    equal = [found.equal.tokens_per_s(tenant) for tenant in TENANTS]
    everything = [*found.quiet.calls, *found.loud.calls, *found.equal.calls]
    return [
        Goal("one at 10 ×: of its demand the worst served of the nine gets", "≥", 95, 100 * worst, " %", 1),
        Goal("… the nine's duration p99, × quiet", "≤", 2, _ratio(found), digits=2),
        Goal("equal demand: Jain's index of tokens", "≥", 0.98, summary.jain(equal), digits=4),
        *truth(everything, found.sight, found.plan.fleet.slots),
    ]


def nine(phase: Phase) -> list[Call]:
    return [call for call in phase.measured if call.ask.tenant != HOG]


def _ratio(found: Found) -> float | None:
    """The nine's 99th percentile beside the hog, as a multiple of their own without it."""
    loud, quiet = (summary.p(summary.durations_s(nine(phase)), 0.99) for phase in (found.loud, found.quiet))
    return loud / quiet if loud and quiet else None


def tenants_table(found: Found) -> str:
    """The nine together, their worst, and the hog; then all alike."""
    rows = [
        _row("quiet: the nine", nine(found.quiet)),
        _row("one at 10 ×: the nine", nine(found.loud)),
        _row("… the worst served of them", min((found.loud.of(tenant) for tenant in MODEST), key=_share)),
        _row("… the one", found.loud.of(HOG)),
        _row("all at 2 ×", found.equal.measured),
    ]
    header = ["", "asked", "served", "refused", "in vain", "TTFT p50 [ms]", "TTFT p99 [ms]", "duration p99 [ms]"]
    shares = ", ".join(f"{found.equal.tokens_per_s(tenant):.0f}" for tenant in TENANTS)
    return table(header, rows) + f"\nTokens per second of each of the ten under equal demand: {shares}.\n"


def _share(calls: Sequence[Call]) -> float:
    return summary.served_share(calls) or 0.0


def _row(name: str, calls: Sequence[Call]) -> list[str]:
    ends, ttfts, durations = summary.endings(calls), summary.ttfts_s(calls), summary.durations_s(calls)
    refused = sum(ends[code] for code in summary.REFUSED_AT_ONCE)
    times = (summary.p(ttfts, 0.5), summary.p(ttfts, 0.99), summary.p(durations, 0.99))
    counts = (str(len(calls)), f"{_share(calls):.1%}", str(refused), str(ends[summary.WAITED_IN_VAIN]))
    return [name, *counts, *("–" if value is None else f"{1e3 * value:.0f}" for value in times)]


METHOD = """\
The engines and requests of *Overload*, {gateways} gateway(s), capacity {rate:.1f} requests/s. Ten tenants of equal
weight in one band; a share is a tenth of the capacity. Quiet: nine at 0.8 of it, alone ({load:g} s). Then one more asks
for ten shares ({load:g} s). Then all ten ask for two ({equal:g} s). Everybody waits {patience:g} s for a slot.
"""


def method(found: Found) -> str:
    plan = found.plan
    return METHOD.format(
        gateways=plan.fleet.gateways,
        rate=found.capacity.requests_per_s,
        load=plan.load_s,
        equal=plan.equal_s,
        patience=plan.patience_s,
    )
