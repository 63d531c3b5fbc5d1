"""`python -m loadtest adaptive`: slots that find themselves against the best static limit, on one real vLLM worker.

The limits take turns on the same worker, because a machine has good and bad minutes: what is compared is what each
brought in the same rounds.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

from app.launcher.machine import inspect_machine
from app.launcher.processes import DEFAULT_MAX_NUM_SEQS
from app.workers.vllm_metrics import EngineLoad, parse_engine_load
from loadtest.client import CHAT_PATH, Address
from loadtest.processes import ProcessError, free_address, running, until_workers_ready
from loadtest.report import circumstances, table
from loadtest.vllm_worker import MODEL, READY_S, VARIANT, until_proven, vllm_worker

AUTO = "auto"
GOAL = 0.95
LOOK_S = 0.25
REQUEST_S = 300.0

Limit = int | str


@dataclass(frozen=True)
class AdaptivePlan:
    """One measurement. `clients` ask again as soon as they are answered; `limits` are the static ones.

    Before the first round `auto` has `converge_s` seconds to find its limit; later turns begin with `settle_s`.
    """

    limits: tuple[int, ...] = (DEFAULT_MAX_NUM_SEQS // 4, DEFAULT_MAX_NUM_SEQS // 2, DEFAULT_MAX_NUM_SEQS, 16)
    rounds: int = 3
    converge_s: float = 60.0
    settle_s: float = 4.0
    window_s: float = 20.0
    clients: int = 4 * DEFAULT_MAX_NUM_SEQS
    answer_tokens: int = 40
    kv_mib: int = 128


@dataclass
class Brought:
    """What one limit showed: tokens per second of each round, and each reading of `vllm:num_requests_waiting`."""

    tokens_per_s: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_s)


Found = Mapping[Limit, Brought]


async def measure(plan: AdaptivePlan) -> Found:
    """Run all rounds. Raises ProcessError when the worker or a gateway does not start."""
    limits: tuple[Limit, ...] = (AUTO, *plan.limits)
    found = {limit: Brought() for limit in limits}
    machine, worker = inspect_machine(), free_address()
    async with AsyncExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="sluice-adaptive-")))
        await held.enter_async_context(vllm_worker(directory, worker, machine.cores[0], plan.kv_mib, machine, MODEL))
        await until_proven(worker, MODEL)
        http = await held.enter_async_context(httpx.AsyncClient(timeout=REQUEST_S))
        doors = {limit: await held.enter_async_context(_gateway(directory, limit, worker, http)) for limit in limits}
        async with _asked_by(doors[AUTO], plan):
            await asyncio.sleep(plan.converge_s)
        for round_ in range(plan.rounds):
            # Who goes first changes, so that a drift of the machine hits all.
            first = round_ % len(limits)
            for limit in (*limits[first:], *limits[:first]):
                await _turn(limit, doors[limit], worker, plan, http, found[limit])
    return found


async def _turn(
    limit: Limit, door: Address, worker: Address, plan: AdaptivePlan, http: httpx.AsyncClient, brought: Brought
) -> None:
    async with _asked_by(door, plan):
        await asyncio.sleep(plan.settle_s)
        first = last = await _read(worker, http)
        while last.at - first.at < plan.window_s:
            await asyncio.sleep(LOOK_S)
            last = await _read(worker, http)
            brought.waiting.append(last.waiting)
        slots = await _slots(door, http)
    brought.tokens_per_s.append((last.generated - first.generated) / (last.at - first.at))
    brought.slots.append(slots)
    print(f"  {limit}: {slots} slots, {brought.tokens_per_s[-1]:.1f} tokens/s", flush=True)


@asynccontextmanager
async def _asked_by(door: Address, plan: AdaptivePlan) -> AsyncIterator[None]:
    """While the block runs, every client asks again when it was answered; at its end they leave."""
    async with httpx.AsyncClient(timeout=REQUEST_S, limits=httpx.Limits(max_connections=plan.clients)) as http:
        clients = [asyncio.create_task(_ask(door, number, plan, http)) for number in range(plan.clients)]
        try:
            yield
        finally:
            for client in clients:
                client.cancel()
            ended = await asyncio.gather(*clients, return_exceptions=True)
    failed = [error for error in ended if not isinstance(error, asyncio.CancelledError)]
    if failed:
        raise ProcessError(f"{len(failed)} of {plan.clients} clients failed: {failed[0]!r}")


async def _ask(door: Address, number: int, plan: AdaptivePlan, http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": f"Tell a story about {number} bears."}]
    body = {"model": MODEL, "messages": messages, "max_tokens": plan.answer_tokens, "ignore_eos": True}
    while True:
        (await http.post(door.url + CHAT_PATH, json=body)).raise_for_status()


async def _read(worker: Address, http: httpx.AsyncClient) -> EngineLoad:
    load = parse_engine_load((await http.get(f"{worker.url}/metrics")).text, time.monotonic())
    if load is None:
        raise ProcessError("the worker's metrics page does not say what its engine does")
    return load


async def _slots(door: Address, http: httpx.AsyncClient) -> int:
    page = (await http.get(f"{door.url}/metrics")).raise_for_status().text
    lines = (line for line in page.splitlines() if line.startswith("sluice_slots_capacity"))
    return round(sum(float(line.rpartition(" ")[2]) for line in lines))


@asynccontextmanager
async def _gateway(directory: Path, limit: Limit, worker: Address, http: httpx.AsyncClient) -> AsyncIterator[Address]:
    """A gateway of its own, with its own ledger, for each limit: `auto` keeps what it has found between its turns."""
    address = free_address()
    listed = [{"url": worker.url, "served_model": MODEL, "max_concurrency": limit, "max_num_seqs": 64}]
    config = {
        "listen": {"host": address.host, "port": address.port},
        "models": [{"name": MODEL, "variants": [{"name": VARIANT, "workers": listed}]}],
        "admission": {"queue_timeout_s": REQUEST_S},
        "health": {"probe_interval_s": 1.0},
        "drain_notice_s": 0,
    }
    file = directory / f"{limit}.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [sys.executable, "-m", "app", "gateway", "--config", str(file)]
    async with running(argv, os.sched_getaffinity(0), directory / f"{limit}.log"):
        await until_workers_ready(http, address, READY_S)
        yield address


def figures(found: Found) -> str:
    """One row for each limit, then the verdict."""
    rows = [
        [
            f"`{limit}`",
            " ".join(f"{slots}" for slots in brought.slots),
            f"{brought.median:.1f} ({' '.join(f'{rate:.1f}' for rate in brought.tokens_per_s)})",
            f"{max(brought.waiting)}",
            f"{sum(count <= 1 for count in brought.waiting) / len(brought.waiting):.1%}",
        ]
        for limit, brought in found.items()
    ]
    ratios = round_ratios(found)
    verdict = (
        f"`auto` ÷ best static limit of the same round: median {statistics.median(ratios):.3f} "
        f"({' '.join(f'{ratio:.3f}' for ratio in ratios)}); goal {GOAL:g}\n"
    )
    head = [
        "`max_concurrency`",
        "slots",
        "tokens/s, median (rounds)",
        "most waiting in vLLM",
        "readings with at most 1",
    ]
    return table(head, rows) + "\n" + verdict


def round_ratios(found: Found) -> list[float]:
    """For each round, the throughput of `auto` by that of the static limit with the best median."""
    statics = [brought for limit, brought in found.items() if limit != AUTO]
    best = max(statics, key=lambda brought: brought.median)
    return [own / other for own, other in zip(found[AUTO].tokens_per_s, best.tokens_per_s, strict=True)]


def section(found: Found, plan: AdaptivePlan, versions: Mapping[str, str]) -> str:
    """The results as a section of RESULTS.md."""
    where = circumstances(versions)
    listed = "".join(f"- {name}: {version}\n" for name, version in versions.items())
    return f"""\
# Slots that find themselves, on one real vLLM worker

Commit {where.commit}, {where.date}. {where.processor}, Linux {where.kernel}, Python {where.python}; load average at the
end {where.load_average:.2f}.

{figures(found)}
## How it was measured

One vLLM worker (dense SmolLM2-135M, one core, {plan.kv_mib} MiB of KV cache, {DEFAULT_MAX_NUM_SEQS} sequences);
{plan.clients} clients that ask again when answered, {plan.answer_tokens} tokens each. A gateway for each limit, in
turn on the same worker, {plan.rounds} rounds of {plan.window_s:g} s after {plan.settle_s:g} s; `auto` had
{plan.converge_s:g} s to begin with. Tokens/s: vLLM's `generation_tokens`. Waiting: `vllm:num_requests_waiting`, four
readings a second.

{listed}"""
