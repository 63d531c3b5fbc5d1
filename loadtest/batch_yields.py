"""What a batch costs interactive requests, and how much of what they leave over it uses (row L10).

Windows without and with a batch alternate in one run, over the same arrivals, so that a busy machine disturbs both.
The fake worker's speed does not depend on its load: seen is what lines take by slots and by the gateway's CPU. With the
modelled engine (`scenarios/engine.py`) also what they take inside: a step is longer the more there are.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import httpx

from loadtest.client import ChatRequest
from loadtest.loads import OpenLoopResult, open_loop
from loadtest.pacing import NS, poisson_times
from loadtest.scenarios.engine import EngineShape
from loadtest.victims import Victim, fake_worker, gateway, modelled_worker, started

READY_S = 60.0
SAMPLE_S = 0.25
RAMP_S = 3.0
CONNECTIONS = 128
LINES = 50_000
ENDED = "sluice_batch_lines_ended_total"
PREEMPTIONS = "sluice_batch_preemptions_total"
WAIT = "sluice_queue_wait_seconds"
INTERACTIVE = 'band="default"'


@dataclass(frozen=True)
class YieldPlan:
    """`rate` of interactive requests a second, by independent callers; each streams `tokens`."""

    pairs: int = 3
    window_s: float = 20.0
    rate: float = 12.0
    slots: int = 32
    tokens: int = 16
    line_tokens: int = 16
    ttft_ms: float = 50.0
    itl_ms: float = 20.0
    is_modelled: bool = False


@dataclass(slots=True)
class Yielded:
    """TTFT p99 in ms of each window, and the share of idle slots that lines held."""

    without_ms: list[float] = field(default_factory=list)
    with_ms: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    lines_per_s: list[float] = field(default_factory=list)
    requests: int = 0
    preemptions: float = 0
    waited_ms: list[float] = field(default_factory=list)
    failures: int = 0

    @property
    def ratio(self) -> float:
        return mean(self.with_ms) / mean(self.without_ms)


async def measure(plan: YieldPlan, place: Path) -> Yielded:
    worker = _engine(plan, place)
    model = {"name": "m", "variants": [{"name": "v", "workers": [_worker(worker, plan)]}]}
    # Connections of the load are opened before they are used.
    limits = {"header_timeout_s": 300}
    config = {
        "models": [model],
        "limits": limits,
        "batches": {"directory": str(place / "kept")},
        "logs": {"requests": "none"},
    }
    front = gateway(place, 0, config)
    found = Yielded()
    async with started(worker, front), httpx.AsyncClient(base_url=front.address.url, timeout=60) as http:
        await _ready(http)
        asked = await _upload(http, plan)
        for number in range(plan.pairs):
            await _window(front, plan, number, found.without_ms, found)
            batch = (await http.post("/v1/batches", json=asked)).raise_for_status().json()
            await asyncio.sleep(RAMP_S)
            sampling = asyncio.create_task(_sample(http, plan, found))
            lines, preemptions = await _read(http, ENDED), await _read(http, PREEMPTIONS)
            waited_s, waits = (
                await _read(http, f"{WAIT}_sum", INTERACTIVE),
                await _read(http, f"{WAIT}_count", INTERACTIVE),
            )
            await _window(front, plan, number, found.with_ms, found)
            found.lines_per_s.append((await _read(http, ENDED) - lines) / plan.window_s)
            found.preemptions += await _read(http, PREEMPTIONS) - preemptions
            waited_s = await _read(http, f"{WAIT}_sum", INTERACTIVE) - waited_s
            found.waited_ms.append(1000 * waited_s / (await _read(http, f"{WAIT}_count", INTERACTIVE) - waits))
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
            (await http.post(f"/v1/batches/{batch['id']}/cancel")).raise_for_status()
            while (await http.get(f"/v1/batches/{batch['id']}")).json()["status"] != "cancelled":
                await asyncio.sleep(SAMPLE_S)
    return found


async def _window(front: Victim, plan: YieldPlan, number: int, into: list[float], found: Yielded) -> None:
    request = ChatRequest(prompt_bytes=200, tokens=plan.tokens, stream=True)
    times = poisson_times(plan.rate, plan.window_s, seed=number)
    result: OpenLoopResult = await open_loop(
        front.address, request, times, warmup_s=0, connections=CONNECTIONS, grace_s=10
    )
    found.failures += result.failures.total() + result.unfinished
    found.requests += len(times) if into is found.with_ms else 0
    into.append(_p99(result.ttft_ns) / NS * 1000)
    print(f"  {'with' if into is found.with_ms else 'without'}: TTFT p99 {into[-1]:.1f} ms", flush=True)


async def _sample(http: httpx.AsyncClient, plan: YieldPlan, found: Yielded) -> None:
    """Of the slots that interactive requests do not hold, how many lines do."""
    while True:
        page = (await http.get("/metrics")).text
        held = _gauge(page, "sluice_slots_held")
        lines = min(held, _gauge(page, "sluice_batch_lines_in_flight"))
        idle = plan.slots - (held - lines)
        if idle > 0:
            found.used.append(lines / idle)
        await asyncio.sleep(SAMPLE_S)


async def _read(http: httpx.AsyncClient, name: str, label: str = "") -> float:
    return _gauge((await http.get("/metrics")).text, name, label)


def _gauge(page: str, name: str, label: str = "") -> float:
    lines = (line for line in page.splitlines() if line.startswith((f"{name}{{", f"{name} ")) and label in line)
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def _p99(values: Sequence[int]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else 0.0


async def _ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            try:
                if (await http.get("/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)


async def _upload(http: httpx.AsyncClient, plan: YieldPlan) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": plan.line_tokens}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    data = b"".join(json.dumps({"custom_id": str(i), **line}).encode() + b"\n" for i in range(LINES))
    file = await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in", data)})
    file_id = file.raise_for_status().json()["id"]
    return {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}


def _engine(plan: YieldPlan, place: Path) -> Victim:
    if plan.is_modelled:
        return modelled_worker(place, 0, EngineShape(max_num_seqs=plan.slots, kv_tokens=512 * plan.slots))
    return fake_worker(place, 0, "--ttft-ms", str(plan.ttft_ms), "--itl-ms", str(plan.itl_ms))


def _worker(worker: Victim, plan: YieldPlan) -> dict[str, Any]:
    return {"url": worker.address.url, "served_model": "m", "max_concurrency": plan.slots}


def figures(found: Yielded) -> str:
    return (
        f"interactive TTFT p99 {mean(found.without_ms):.1f} ms without, {mean(found.with_ms):.1f} ms with a batch: "
        f"{found.ratio:.2f} times; lines held {mean(found.used):.0%} of the slots that were idle, "
        f"{mean(found.lines_per_s):.0f} lines/s; {found.preemptions:.0f} of them made room for {found.requests} "
        f"requests, which waited {mean(found.waited_ms):.1f} ms in the mean; {found.failures} failures"
    )
