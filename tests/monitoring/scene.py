"""A gateway that goes through everything its dashboards can show, and a Prometheus that watches it.

Three tenants, three bands and a batch on two variants of one model; a rush that makes a queue, limits that refuse,
clients that leave, a worker that dies and comes back, a Valkey that is gone for a while. All of it takes `span_s`, and
is in the same proportions however long that is. Workers are test doubles.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.fakes.engine import Timing
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, issue_keys, until
from tests.monitoring.conftest import Binaries
from tests.monitoring.prometheus import Prometheus
from tests.processes import Valkey

MODEL = "smollm2"
SLOTS = 8
QUICK = Timing(prefill_s=0.06, prefill_s_per_token=0.0004, decode_s=0.03, decode_s_per_running=0.001)
SLOW = QUICK.slowed(1.8)
TENANTS: list[dict[str, Any]] = [
    {"name": "shop", "weight": 3},
    {"name": "lab", "weight": 1},
    {"name": "trial", "weight": 1, "limits": {"requests_per_min": 30, "concurrent": 2}},
]
SYSTEM = "You answer the questions of those who buy and mend bicycles, in words that a child understands. " * 6
BATCH_LINES = 160
CALM_PER_S, RUSH_PER_S = 3.5, 11.0
"""Arrivals. The workers can serve about five a second."""
GREED = 6
AT_ONCE = 400
"""Requests that the clients have open at most."""
BEGINS, RUSH, CRASH, OUTAGE = 0.0, (0.2, 0.36), (0.7, 0.76), (0.85, 0.9)
"""Shares of the span: when the batch begins, and from when to when the others last."""


@dataclass
class Scene:
    """What plays. `clients` speak to the gateway, by tenant; `crashing` is the worker that dies."""

    prometheus: Prometheus
    gateway: GatewayProcess
    clients: dict[str, httpx.AsyncClient]
    crashing: FakeWorker
    valkey: Valkey

    async def play(self, span_s: float) -> None:
        """From the first request until the last one has ended."""
        async with asyncio.TaskGroup() as acts:
            acts.create_task(self._traffic(span_s))
            acts.create_task(self._batch(BEGINS * span_s))
            acts.create_task(self._greed(RUSH[0] * span_s))
            acts.create_task(between(span_s, CRASH, self._crash, self.crashing.start))
            acts.create_task(between(span_s, OUTAGE, self._off(self.valkey.kill), self._off(self.valkey.start)))

    async def _traffic(self, span_s: float) -> None:
        """Arrivals in random gaps, and nobody waits for anybody. The first ones are of each kind."""
        chance = random.Random(7)  # noqa: S311 - the same arrivals in every run
        loop = asyncio.get_running_loop()
        began, open_requests, each = loop.time(), asyncio.Semaphore(AT_ONCE), list(ASKED)
        async with asyncio.TaskGroup() as group:
            while (share := (loop.time() - began) / span_s) < 1:
                is_rush = RUSH[0] <= share < RUSH[1]
                await asyncio.sleep(chance.expovariate(RUSH_PER_S if is_rush else CALM_PER_S))
                if not open_requests.locked():
                    ask = each.pop(0) if each else chance.choices(ASKED, WEIGHTS)[0]
                    group.create_task(self._one(ask, chance, open_requests))

    async def _one(self, ask: Ask, chance: random.Random, open_requests: asyncio.Semaphore) -> None:
        async with open_requests:
            (tenant,) = chance.choices(("shop", "lab", "trial"), (6, 4, 1))
            # A client sees what any client would: refusals, streams that break off.
            with suppress(httpx.HTTPError):
                await ask(self.clients[tenant], chance)

    async def _batch(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        body = chat("mend it", model=MODEL, max_tokens=60, ignore_eos=True)
        lines = (
            json.dumps({"custom_id": f"{number}", "method": "POST", "url": CHAT, "body": body})
            for number in range(BATCH_LINES)
        )
        client = self.clients["lab"]
        upload = {"file": ("lines.jsonl", "\n".join(lines).encode())}
        file = await client.post("/v1/files", data={"purpose": "batch"}, files=upload)
        wanted = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        (await client.post("/v1/batches", json=wanted)).raise_for_status()

    async def _greed(self, delay_s: float) -> None:
        """More at once than its tenant may."""
        await asyncio.sleep(delay_s)
        client = self.clients["trial"]
        await asyncio.gather(*(client.post(CHAT, json=question(random.Random(0))) for _ in range(GREED)))  # noqa: S311

    async def _crash(self) -> None:
        self.crashing.crash()
        await self.crashing.stop()

    @staticmethod
    def _off(call: Callable[[], None]) -> Callable[[], Awaitable[None]]:
        return lambda: asyncio.to_thread(call)


async def between(
    span_s: float,
    shares: tuple[float, float],
    begin: Callable[[], Awaitable[None]],
    end: Callable[[], Awaitable[None]],
) -> None:
    await asyncio.sleep(span_s * shares[0])
    await begin()
    try:
        await asyncio.sleep(span_s * (shares[1] - shares[0]))
    finally:
        await end()


Ask = Callable[[httpx.AsyncClient, random.Random], Awaitable[None]]


def question(chance: random.Random, **fields: Any) -> dict[str, Any]:
    """One of a few conversations, so that prefixes are met again; some tens of tokens long when answered."""
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Bicycle {chance.randrange(12)} has a flat tyre and a loose chain."},
    ]
    length = {"max_tokens": chance.randrange(20, 100), "ignore_eos": True}
    return {"model": MODEL, "messages": messages, "stream": True, **length, **fields}


def asks(**fields: Any) -> Ask:
    async def ask(client: httpx.AsyncClient, chance: random.Random) -> None:
        await client.post(CHAT, json=question(chance, **fields))

    return ask


async def hurried(client: httpx.AsyncClient, chance: random.Random) -> None:
    """Gives up waiting for a slot."""
    await client.post(CHAT, json=question(chance), headers={"x-sluice-timeout-ms": "700"})


async def leaving(client: httpx.AsyncClient, chance: random.Random) -> None:
    """Reads a little of its stream, and goes."""
    async with client.stream("POST", CHAT, json=question(chance)) as answer:
        async for _ in answer.aiter_bytes():
            if chance.random() < 0.1:
                return


async def strange(client: httpx.AsyncClient, _: random.Random) -> None:
    """Has a key that nobody knows, and then speaks something that is not HTTP."""
    await client.get("/v1/models", headers={"authorization": "Bearer of bad news"})
    _reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(b"HELO gateway\r\n\r\n")
    await writer.drain()
    writer.close()
    await writer.wait_closed()


ASKED: tuple[Ask, ...] = (
    asks(),
    asks(stream=False),
    asks(service_tier="priority"),
    asks(service_tier="flex"),
    asks(model=f"{MODEL}:dense"),
    asks(model="unheard-of"),
    asks(x_fault="fast_500"),
    asks(x_fault="die_after:5"),
    hurried,
    leaving,
    strange,
)
WEIGHTS = (40, 10, 20, 15, 6, 2, 1, 1, 4, 3, 1)


@asynccontextmanager
async def staged(binaries: Binaries, directory: Path, interval_s: int = 1) -> AsyncIterator[Scene]:
    """The scene before it begins: every worker ready, Prometheus scraping every `interval_s`, and once already."""
    async with AsyncExitStack() as opened:
        quick = [await opened.enter_async_context(_worker("w8a8", QUICK)) for _ in range(2)]
        slow = await opened.enter_async_context(_worker("dense", SLOW))
        valkey = opened.enter_context(Valkey(directory))
        keys = await issue_keys(directory / "keys", *(tenant["name"] for tenant in TENANTS), admin="operators")
        gateway = GatewayProcess(
            directory,
            [_model(w8a8=quick, dense=[slow])],
            admin=True,
            key=keys["lab"],
            admin_key=keys["operators"],
            tenants=TENANTS,
            redis={"url": valkey.url},
            auth={"enabled": True, "key_files": [str(directory / "keys")]},
            batches={"directory": str(directory / "batches")},
        )
        await opened.enter_async_context(gateway)
        await gateway.ready(*quick, slow)
        targets = {
            "sluice": [f"127.0.0.1:{gateway.admin_port}"],
            "vllm": [f"127.0.0.1:{worker.port}" for worker in (*quick, slow)],
        }
        prometheus = Prometheus(binaries, directory, targets, admin_key=keys["operators"], interval_s=interval_s)
        opened.push_async_callback(prometheus.http.aclose)
        opened.callback(prometheus.process.stop)
        await asyncio.to_thread(prometheus.process.wait_for_line, "Server is ready")

        async def is_scraped() -> bool:
            return bool(await prometheus.query('up{job="sluice"} == 1'))

        # What happens before the first scrape is no increase.
        await until(is_scraped, "Prometheus has seen the gateway")
        clients = {name: await opened.enter_async_context(_client(gateway.url, key)) for name, key in keys.items()}
        yield Scene(prometheus, gateway, clients, quick[1], valkey)


def _worker(variant: str, timing: Timing) -> FakeWorker:
    return FakeWorker(f"{MODEL}-{variant}", timing=timing, max_num_seqs=SLOTS, prompt_tokens_details=True)


def _model(**variants: list[FakeWorker]) -> dict[str, Any]:
    listed = [
        {
            "name": name,
            "workers": [{"url": one.url, "served_model": one.model, "max_concurrency": SLOTS} for one in workers],
        }
        for name, workers in variants.items()
    ]
    return {"name": MODEL, "resume": True, "variants": listed}


def _client(url: str, key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=AT_ONCE)
    return httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120, limits=limits)
