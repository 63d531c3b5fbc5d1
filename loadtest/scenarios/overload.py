"""Overload: two, five, ten times as many requests as the engines can serve, from callers who do not wait for answers.

The paying band asks for a fifth of the capacity however many others come. Everybody's patience is the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from loadtest.cpu import CpuReading, cpu_between, read_cpu
from loadtest.pacing import NS
from loadtest.report import table
from loadtest.scenarios import summary
from loadtest.scenarios.calls import Call, Callers
from loadtest.scenarios.demand import Ask, Sizes, Stream, asks, endless
from loadtest.scenarios.fleet import Fleet, FleetPlan, fleet
from loadtest.scenarios.goals import Goal
from loadtest.scenarios.truth import Sight, look, truth

PRIORITY_SHARE = 0.2
"""Of the capacity, at every multiple."""
FLEX_SHARE = 0.2
"""Of what is left."""
QUIET_SHARE = 0.3
GOODPUT = {2: 95, 5: 92, 10: 90}
NORMAL_AGAIN_S = 5.0
SETTLE_S = 30.0
CALLERS_PER_SLOT = 2


@dataclass(frozen=True)
class OverloadPlan:
    """Seconds of each phase; `multiples` are of the measured capacity."""

    fleet: FleetPlan = field(default_factory=FleetPlan)
    sizes: Sizes = field(default_factory=Sizes)
    multiples: tuple[int, ...] = (2, 5, 10)
    capacity_s: float = 15.0
    quiet_s: float = 15.0
    warmup_s: float = 4.0
    load_s: float = 25.0
    after_s: float = 15.0
    patience_s: float = 3.0
    seed: int = 1

    @classmethod
    def quick(cls) -> OverloadPlan:
        return cls(FleetPlan(engines=2), multiples=(2,), capacity_s=4, quiet_s=4, warmup_s=3, load_s=6, after_s=8)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engines can do when nobody has to wait for work: found by asking them directly."""

    tokens_per_s: float
    requests_per_s: float


@dataclass
class Wave:
    """What one multiple showed. Spans are CLOCK_MONOTONIC ns: the load, its measured part, and the time after."""

    multiple: int
    calls: list[Call]
    after: list[Call]
    begin_ns: int
    end_ns: int
    gateway_cores: float
    client_cores: float
    most_waiting: int

    @property
    def measured(self) -> list[Call]:
        return summary.due_between(self.calls, self.begin_ns, self.end_ns)


@dataclass
class Found:
    """Everything that was seen."""

    plan: OverloadPlan
    capacity: Capacity
    quiet: list[Call]
    waves: list[Wave]
    sight: Sight


async def measure(plan: OverloadPlan) -> Found:
    """Run all phases. Raises ProcessError, LaunchError, or TimeoutError for calls that never end."""
    async with fleet(plan.fleet) as house:
        with Callers() as callers:
            capacity = await measured_capacity(house, callers, plan)
            quiet = await _quiet(house, callers, plan, capacity)
            waves = [await _wave(house, callers, plan, capacity, multiple) for multiple in plan.multiples]
            return Found(plan, capacity, quiet, waves, await look(house))


async def measured_capacity(house: Fleet, callers: Callers, plan: OverloadPlan) -> Capacity:
    """A closed loop straight to the engines, with twice as many callers as they have seats."""
    seats = plan.fleet.shape.max_num_seqs
    begin_ns = time.monotonic_ns() + round(0.25 * plan.capacity_s * NS)
    end_ns = time.monotonic_ns() + round(plan.capacity_s * NS)
    source = endless("capacity", plan.sizes, plan.seed)
    calls = await callers.saturate(source, house.worker_addresses, CALLERS_PER_SLOT * seats, plan.capacity_s)
    ended = [call for call in calls if call.is_served and begin_ns <= call.ended_ns < end_ns]
    house.witness.forget_peaks()
    tokens_per_s, rate = summary.tokens_per_s(calls, begin_ns, end_ns), len(ended) * NS / (end_ns - begin_ns)
    print(f"  capacity: {rate:.1f} requests/s, {tokens_per_s:.0f} tokens/s", flush=True)
    return Capacity(tokens_per_s, rate)


async def play(house: Fleet, callers: Callers, asked: Sequence[Ask], seed: int) -> list[Call]:
    """Place all, each at a gateway drawn by lot."""
    doors, chance = house.doors, random.Random(f"{seed} doors")
    return await callers.play(asked, lambda ask: chance.choice(doors))


async def _quiet(house: Fleet, callers: Callers, plan: OverloadPlan, capacity: Capacity) -> list[Call]:
    light = [Stream(QUIET_SHARE * capacity.requests_per_s, patience_s=plan.patience_s)]
    calls = await play(house, callers, asks("quiet", light, plan.quiet_s, plan.sizes, plan.seed), plan.seed)
    await callers.settled(SETTLE_S)
    return calls


def streams(plan: OverloadPlan, capacity: Capacity, multiple: int) -> list[Stream]:
    """Who asks how often."""
    priority = PRIORITY_SHARE * capacity.requests_per_s
    others = multiple * capacity.requests_per_s - priority
    return [
        Stream(priority, "priority", patience_s=plan.patience_s),
        Stream((1 - FLEX_SHARE) * others, "default", patience_s=plan.patience_s),
        Stream(FLEX_SHARE * others, "flex", patience_s=plan.patience_s),
    ]


async def _wave(house: Fleet, callers: Callers, plan: OverloadPlan, capacity: Capacity, multiple: int) -> Wave:
    """The load, and then a light one in which things are to be normal again."""
    length_s = plan.warmup_s + plan.load_s
    heavy = asks(f"x{multiple}", streams(plan, capacity, multiple), length_s, plan.sizes, plan.seed)
    light = [Stream(QUIET_SHARE * capacity.requests_per_s, patience_s=plan.patience_s)]
    after = asks(f"x{multiple}-after", light, plan.after_s, plan.sizes, plan.seed)
    after = [replace(ask, due_s=ask.due_s + length_s) for ask in after]
    meter = CpuMeter(house)
    begin_ns = time.monotonic_ns()
    calls = await play(house, callers, [*heavy, *after], plan.seed)
    gateway_cores, client_cores = meter.read()
    await callers.settled(SETTLE_S)
    wave = Wave(
        multiple,
        calls[: len(heavy)],
        calls[len(heavy) :],
        begin_ns + round(plan.warmup_s * NS),
        begin_ns + round(length_s * NS),
        gateway_cores,
        client_cores,
        house.witness.most_waiting,
    )
    print(f"  {multiple} ×: {dict(summary.endings(wave.measured))}", flush=True)
    return wave


class CpuMeter:
    """CPU of the busiest gateway and of this process, in cores, from now until `read`."""

    def __init__(self, house: Fleet) -> None:
        self._before: dict[int, CpuReading] = {gateway.pid: read_cpu(gateway.pid) for gateway in house.gateways}
        self._own_s, self._wall_s = time.process_time(), time.monotonic()

    def read(self) -> tuple[float, float]:
        wall_s = time.monotonic() - self._wall_s
        spent = [cpu_between(before, read_cpu(pid)) / NS for pid, before in self._before.items()]
        return max(spent) / wall_s, (time.process_time() - self._own_s) / wall_s


def goals(found: Found) -> list[Goal]:
    """What issue 3 promises of overload."""
    usual = summary.p(summary.ttfts_s(found.quiet), 0.99)
    judged: list[Goal] = []
    for wave in found.waves:
        judged += _goals_of(wave, found, usual)
    everything = [call for wave in found.waves for call in [*wave.calls, *wave.after]]
    return [*judged, *truth([*found.quiet, *everything], found.sight, found.plan.fleet.slots)]


def _goals_of(wave: Wave, found: Found, usual_s: float | None) -> list[Goal]:
    name, calls = f"{wave.multiple} ×", wave.measured
    goodput = summary.tokens_per_s(wave.calls, wave.begin_ns, wave.end_ns) / found.capacity.tokens_per_s
    refused = summary.p(summary.refusals_s(calls), 0.99)
    later = [call for call in wave.after if call.due_ns >= wave.end_ns + NORMAL_AGAIN_S * NS]
    again = summary.p(summary.ttfts_s(later), 0.99)
    judged = [
        Goal(f"{name}: goodput, of capacity", "≥", GOODPUT.get(wave.multiple, 90), 100 * goodput, " %", 1),
        Goal(f"{name}: refusals answered, p99", "≤", 50, _ms(refused), " ms", 1),
        Goal(
            f"{name}: TTFT p99 from {NORMAL_AGAIN_S:g} s after the load on, × quiet",
            "≤",
            2,
            again / usual_s if again and usual_s else None,
            digits=2,
        ),
        Goal(f"{name}: later than that, not served", "=", 0, sum(not call.is_served for call in later)),
    ]
    if wave.multiple == 2:
        priority = summary.of_band(calls, "priority")
        share = summary.served_share(priority)
        wait = summary.p(summary.waits_s(priority, found.sight.arrived_ns), 0.99)
        judged += [
            Goal(f"{name}: priority served", "≥", 99.9, None if share is None else 100 * share, " %", 1),
            Goal(f"{name}: priority's wait for a slot, p99", "≤", 250, _ms(wait), " ms"),
        ]
    return judged


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


_BAND_HEADER = ["load", "band", "asked", "served", "refused", "in vain"]
_BAND_HEADER += ["wait p50 [ms]", "wait p99 [ms]", "TTFT p50 [ms]", "TTFT p99 [ms]"]


def bands_table(found: Found) -> str:
    """Per multiple and band: what was asked, what became of it, how long it took."""
    bands = [(wave, band) for wave in found.waves for band in ("priority", "default", "flex")]
    rows = [_band_row("quiet", "default", found.quiet, found)]
    rows += [_band_row(f"{wave.multiple} ×", band, summary.of_band(wave.measured, band), found) for wave, band in bands]
    return table(_BAND_HEADER, rows)


def _band_row(load: str, band: str, calls: list[Call], found: Found) -> list[str]:
    ends = summary.endings(calls)
    waits, ttfts = summary.waits_s(calls, found.sight.arrived_ns), summary.ttfts_s(calls)
    refused = sum(ends[code] for code in summary.REFUSED_AT_ONCE)
    counts = (len(calls), ends["served"], refused, ends[summary.WAITED_IN_VAIN])
    times = (summary.p(waits, 0.5), summary.p(waits, 0.99), summary.p(ttfts, 0.5), summary.p(ttfts, 0.99))
    return [load, band, *map(str, counts), *("–" if value is None else f"{1e3 * value:.0f}" for value in times)]


def cost_table(found: Found) -> str:
    """Whether the queue was measured or the machine."""
    rows = [
        [f"{wave.multiple} ×", f"{wave.gateway_cores:.0%}", f"{wave.client_cores:.0%}", str(wave.most_waiting)]
        for wave in found.waves
    ]
    return table(["load", "a gateway's CPU [of a core]", "the client's", "most that waited inside an engine"], rows)


METHOD = """\
{engines} modelled engines (`loadtest/scenarios/engine.py`: {seqs} sequences, {step:g} ms a step, {more:g} ms more for
each sequence in it and {prompt:g} ms for each prompt token), {slots} slots each, {gateways} gateway(s), one Valkey.
Prompts have some {prompts} tokens, answers some {outputs}, log-normal. Poisson arrivals at scheduled times; latencies
count from them. Capacity: a closed loop straight to the same engines, twice as many callers as seats, just before:
{rate:.1f} requests/s, {tokens:.0f} tokens/s. `priority` asks for {priority:.0%} of it at every multiple; of the rest
{flex:.0%} are `flex`. Everybody waits {patience:g} s for a slot (`x-sluice-timeout-ms`). Quiet, and after the load:
{quiet:.0%} of the capacity. Goodput: tokens of whole answers. Waits: from due until an engine had the request, by the
engine's own clock. Refused: told at once; in vain: told when the patience was over.
"""


def method(found: Found) -> str:
    plan, shape = found.plan, found.plan.fleet.shape
    return METHOD.format(
        engines=plan.fleet.engines,
        seqs=shape.max_num_seqs,
        step=1e3 * shape.step_s,
        more=1e3 * shape.step_s_per_sequence,
        prompt=1e3 * shape.step_s_per_prompt_token,
        slots=plan.fleet.slots,
        gateways=plan.fleet.gateways,
        prompts=plan.sizes.prompt_median,
        outputs=plan.sizes.output_median,
        rate=found.capacity.requests_per_s,
        tokens=found.capacity.tokens_per_s,
        priority=PRIORITY_SHARE,
        flex=FLEX_SHARE,
        patience=plan.patience_s,
        quiet=QUIET_SHARE,
    )
