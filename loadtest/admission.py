"""What admission costs: CPU of the gateway's process and of the server, and latency, per request.

`python -m loadtest.admission --redis redis://127.0.0.1:6379/15` (a database of its own: it is written to). So
many concurrent loops admit and release; what the loops cost themselves is measured without admission. `limited` is
for a tenant whose requests and tokens are limited, far above what it uses.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from statistics import quantiles

import redis
import uvloop
from prometheus_client import CollectorRegistry

from app import settings
from app.admission.controller import RedisAdmission
from app.admission.local import LocalAdmission
from app.admission.roster import QueuedAdmission
from app.admission.ticket import Ticket
from app.inference import Band, TokenUsage
from app.telemetry.logs import open_log
from app.telemetry.metrics import Metrics
from app.tenant import ANONYMOUS, Limits, Tenant

REQUESTS = 20_000
LOADS = ((1, 64), (32, 64), (32, 16), (128, 16))  # concurrent loops, slots
LIMITED = Tenant("limited", limits=Limits(requests_per_min=10**9, tokens_per_min=10**12))
USAGE = TokenUsage(prompt_tokens=10, completion_tokens=20)


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds per request."""

    gateway_us: float
    server_us: float
    p50_us: float
    p99_us: float

    def row(self, name: str, concurrent: int, slots: int) -> str:
        figures = (self.gateway_us, self.server_us, self.p50_us, self.p99_us)
        return f"| {name} | {concurrent} | {slots} | " + " | ".join(f"{figure:.0f}" for figure in figures) + " |"


async def measure(
    admission: QueuedAdmission | None, concurrent: int, server: redis.Redis, tenant: Tenant = ANONYMOUS
) -> Cost:
    left, waits = REQUESTS, []

    async def visit() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            started = time.perf_counter()
            ticket = Ticket("r", Band.DEFAULT, ("w",), model="m", tenant=tenant, prompt_bytes=100)
            if admission is None:
                await asyncio.sleep(0)
            else:
                lease = await admission.admit(ticket)
                await asyncio.sleep(0)
                lease.release(USAGE)
            waits.append(time.perf_counter() - started)

    server_before, before = _cpu_s(server), time.process_time()
    await asyncio.gather(*(visit() for _ in range(concurrent)))
    gateway_s, server_s = time.process_time() - before, _cpu_s(server) - server_before
    cuts = quantiles(waits, n=100)
    return Cost(gateway_s / REQUESTS * 1e6, server_s / REQUESTS * 1e6, cuts[49] * 1e6, cuts[98] * 1e6)


def _cpu_s(server: redis.Redis) -> float:
    used = server.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


async def run(url: str) -> None:
    limits = settings.Admission()
    with redis.Redis.from_url(url) as server:
        print("| admission | concurrent | slots | gateway CPU us | server CPU us | p50 us | p99 us |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for concurrent, slots in LOADS:
            print((await measure(None, concurrent, server)).row("none", concurrent, slots))
            local = LocalAdmission(limits, Metrics(CollectorRegistry()), time.monotonic)
            local.set_slots("w", slots)
            print((await measure(local, concurrent, server)).row("local", concurrent, slots))
            print((await measure(local, concurrent, server, LIMITED)).row("local, limited", concurrent, slots))
            shared = RedisAdmission(
                limits,
                settings.Redis(url=url),
                1,
                Metrics(CollectorRegistry()),
                open_log(settings.Logs()),
                time.monotonic,
            )
            async with shared.running():
                shared.set_slots("w", slots)
                print((await measure(shared, concurrent, server)).row("redis", concurrent, slots))
                print((await measure(shared, concurrent, server, LIMITED)).row("redis, limited", concurrent, slots))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True, help="URL of a Redis or Valkey server that may be written to")
    uvloop.run(run(parser.parse_args().redis))


if __name__ == "__main__":
    main()
