"""`python -m loadtest prefix`: what routing by prefix gains, on two real vLLM workers on the CPU.

The policies take turns on the same two workers, each with a gateway of its own that starts anew every round and with
the round's conversations under a mark of its own, so that none profits from what another left in a cache.
"""

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.launcher.machine import inspect_machine
from loadtest.client import CHAT_PATH, Address
from loadtest.conversations import Conversation, Workload, conversations
from loadtest.processes import ProcessError, free_address, running, until_workers_ready
from loadtest.report import circumstances, table
from loadtest.samples import percentile
from loadtest.vllm_worker import MODEL, READY_S, VARIANT, until_proven, vllm_worker

POLICIES = ("prefix", "least_loaded", "round_robin")
WORKERS = 2
REQUEST_S = 120.0
QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"


@dataclass(frozen=True)
class PrefixPlan:
    """One measurement.

    Attributes:
        concurrency: requests in flight at once.
        kv_mib: each worker's KV cache.
    """

    load: Workload = field(default_factory=Workload)
    rounds: int = 3
    concurrency: int = 4
    kv_mib: int = 128


@dataclass
class Seen:
    """What one policy showed, over all rounds.

    Attributes:
        ttft_s: first generated text after the request was sent: one list for each round, of all its answers.
        queried: prompt tokens that the workers looked up, by their own count; one entry for each round.
        hit: prompt tokens that they had, one entry for each round.
        spread: for each round, the share of the looked-up tokens on the busier worker.
    """

    ttft_s: list[list[float]] = field(default_factory=list)
    queried: list[float] = field(default_factory=list)
    hit: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    failures: int = 0

    @property
    def all_ttft_s(self) -> list[float]:
        return [ttft_s for round_ in self.ttft_s for ttft_s in round_]

    @property
    def hit_rate(self) -> float:
        return sum(self.hit) / sum(self.queried)


async def measure(plan: PrefixPlan) -> dict[str, Seen]:
    """Run all rounds. Raises ProcessError when a worker or a gateway does not start."""
    seen = {policy: Seen() for policy in POLICIES}
    with tempfile.TemporaryDirectory(prefix="sluice-prefix-") as name:
        directory = Path(name)
        async with _two_workers(directory, plan) as workers, httpx.AsyncClient(timeout=REQUEST_S) as client:
            for round_ in range(plan.rounds):
                # Who goes first changes, so that a drift of the machine hits all.
                for policy in (*POLICIES[round_ % 3 :], *POLICIES[: round_ % 3]):
                    async with _gateway(directory, policy, workers, client) as gateway:
                        await _round(plan, round_, policy, gateway, workers, client, seen[policy])
                    _tell(round_, policy, seen[policy])
    return seen


def _tell(round_: int, policy: str, seen: Seen) -> None:
    rate = seen.hit[-1] / seen.queried[-1]
    print(
        f"  round {round_ + 1} {policy}: {rate:.0%} of {seen.queried[-1]:.0f} prompt tokens cached, "
        f"{seen.spread[-1]:.0%} of them asked of one worker, TTFT p50 {percentile(seen.ttft_s[-1], 0.5):.2f} s",
        flush=True,
    )


async def _round(
    plan: PrefixPlan,
    round_: int,
    policy: str,
    gateway: Address,
    workers: Sequence[Address],
    client: httpx.AsyncClient,
    seen: Seen,
) -> None:
    """All conversations to their end, `concurrency` requests at a time, each turn in an order drawn by lot."""
    talks = conversations(plan.load, round_, mark=f"{policy} {round_} {time.time_ns()}")
    order = random.Random(round_)
    seen.ttft_s.append([])
    before = [await _counters(client, worker) for worker in workers]
    for _ in range(plan.load.turns):
        waiting = deque(order.sample(talks, len(talks)))
        await asyncio.gather(
            *(_users(waiting, gateway, client, plan.load.answer_tokens, seen) for _ in range(plan.concurrency))
        )
    after = [await _counters(client, worker) for worker in workers]
    queried, hit = (
        [end[name] - start[name] for start, end in zip(before, after, strict=True)] for name in (QUERIES, HITS)
    )
    seen.queried.append(sum(queried))
    seen.hit.append(sum(hit))
    seen.spread.append(max(queried) / sum(queried))


async def _users(
    waiting: deque[Conversation], gateway: Address, client: httpx.AsyncClient, answer_tokens: int, seen: Seen
) -> None:
    """Take the next conversation, have one turn of it, and so on until none is left."""
    while waiting:
        talk = waiting.popleft()
        try:
            ttft_s, answer = await _turn(client, gateway, talk.ask(MODEL, answer_tokens))
        except (httpx.HTTPError, ValueError) as error:
            seen.failures += 1
            print(f"  failed: {error!r}", flush=True)
            continue
        seen.ttft_s[-1].append(ttft_s)
        talk.hear(answer)


async def _turn(client: httpx.AsyncClient, gateway: Address, body: Mapping[str, object]) -> tuple[float, str]:
    """Seconds to the first generated text, and the whole of it. Raises httpx.HTTPError or ValueError."""
    sent, first, text = time.perf_counter(), 0.0, ""
    async with client.stream("POST", gateway.url + CHAT_PATH, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
            piece = choices[0].get("delta", {}).get("content")
            if piece:
                first = first or time.perf_counter() - sent
                text += piece
    if not text:
        raise ValueError("an answer without text")
    return first, text


async def _counters(client: httpx.AsyncClient, worker: Address) -> dict[str, float]:
    page = (await client.get(f"{worker.url}/metrics")).raise_for_status().text
    found = dict.fromkeys((QUERIES, HITS), 0.0)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name in found:
                found[sample.name] += sample.value
    return found


@asynccontextmanager
async def _two_workers(directory: Path, plan: PrefixPlan) -> AsyncIterator[tuple[Address, ...]]:
    """Two workers of the dense variant, one core each, each proven by a token."""
    addresses = free_address(), free_address()
    machine = inspect_machine()
    cores = machine.cores[:WORKERS]
    if len(cores) < WORKERS:
        raise ProcessError("two workers need two cores")
    first, second = (
        vllm_worker(directory, address, core, plan.kv_mib, machine)
        for address, core in zip(addresses, cores, strict=True)
    )
    async with first, second:
        await asyncio.gather(*(until_proven(address) for address in addresses))
        yield addresses


@asynccontextmanager
async def _gateway(
    directory: Path, policy: str, workers: Sequence[Address], client: httpx.AsyncClient
) -> AsyncIterator[Address]:
    address = free_address()
    listed = [{"url": worker.url, "served_model": MODEL, "max_concurrency": 8} for worker in workers]
    config = {
        "listen": {"host": address.host, "port": address.port},
        "models": [{"name": MODEL, "variants": [{"name": VARIANT, "workers": listed}]}],
        "routing": {"policy": policy},
        "drain_notice_s": 0,
    }
    file = directory / f"{policy}.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [sys.executable, "-m", "app", "gateway", "--config", str(file)]
    async with running(argv, os.sched_getaffinity(0), directory / f"{policy}.log"):
        await until_workers_ready(client, address, READY_S)
        yield address


def section(seen: Mapping[str, Seen], plan: PrefixPlan, versions: Mapping[str, str]) -> str:
    """The results as a section of RESULTS.md."""
    where, load = circumstances(versions), plan.load
    listed = "".join(f"- {name}: {version}\n" for name, version in versions.items())
    return f"""\
# What routing by prefix gains: {load.conversations} conversations, {plan.kv_mib} MiB of cache per worker

Commit {where.commit}, {where.date}. {where.processor}, Linux {where.kernel}, Python {where.python}; load average at the
end {where.load_average:.2f}. Read ratios: the machine was shared.

{figures(seen)}
## How it was measured

Two vLLM workers (dense SmolLM2-135M, float32, one core and {plan.kv_mib} MiB of KV cache each, blocks of 32 tokens),
one gateway process. {load.conversations} conversations of {load.turns} turns with {load.systems} shared system prompts
({load.system_words} words; a question has {load.question_words} words, an answer {load.answer_tokens} tokens, greedy),
{plan.concurrency} requests in flight, each turn of all conversations in an order drawn by lot before the next.
{plan.rounds} rounds of {load.requests} requests for each policy, the policies in turn on the same workers, each round
with a fresh gateway and with prompts that no cache has seen. Hit rate: vLLM's `prefix_cache_hits` ÷
`prefix_cache_queries`, in prompt tokens, over both workers; the rounds in brackets. TTFT: from sent to first generated
text, at the client.

{listed}"""


def figures(seen: Mapping[str, Seen]) -> str:
    """One column for each policy, then the ratios to round robin."""
    rates = {
        policy: [hit / asked for hit, asked in zip(one.hit, one.queried, strict=True)] for policy, one in seen.items()
    }
    base = seen["round_robin"]
    rows = [
        ["prefix-cache hit rate", *(f"{one.hit_rate:.1%} ({_span(rates[name])})" for name, one in seen.items())],
        ["TTFT p50 [s]", *(f"{percentile(one.all_ttft_s, 0.5):.2f} ({_halves(one)})" for one in seen.values())],
        ["TTFT p95 [s]", *(f"{percentile(one.all_ttft_s, 0.95):.2f}" for one in seen.values())],
        ["TTFT p50, × round robin", *(f"{_ratio(one, base, 0.5):.2f}" for one in seen.values())],
        ["TTFT p95, × round robin", *(f"{_ratio(one, base, 0.95):.2f}" for one in seen.values())],
        ["prompt tokens computed", *(f"{sum(one.queried) - sum(one.hit):,.0f}" for one in seen.values())],
        ["prompt tokens on the busier worker", *(f"{_span(one.spread)}" for one in seen.values())],
        ["answers, failures", *(f"{len(one.all_ttft_s)}, {one.failures}" for one in seen.values())],
    ]
    return table(["", *(f"`{policy}`" for policy in seen)], rows)


def _span(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.0%}" for share in shares)


def _halves(one: Seen) -> str:
    return " ".join(f"{percentile(round_, 0.5):.2f}" for round_ in one.ttft_s)


def _ratio(one: Seen, base: Seen, q: float) -> float:
    return percentile(one.all_ttft_s, q) / percentile(base.all_ttft_s, q)
