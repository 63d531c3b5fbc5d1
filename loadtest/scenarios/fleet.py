"""The house under load: a Valkey, engines and gateways, each a process of its own, on free ports of 127.0.0.1."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import redis.asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.launcher.processes import valkey
from app.launcher.serving import find_valkey
from loadtest.client import Address
from loadtest.cpu import usable_cores
from loadtest.processes import ProcessError, free_address, running, until_workers_ready
from loadtest.scenarios.engine import EngineShape
from loadtest.scenarios.witness import Witness

READY_S = 30.0


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What is started. `slots` of each worker are what the gateways may hold there; settings are a gateway's own.

    `outside` are workers of the model `m` that run already.
    """

    engines: int = 4
    gateways: int = 1
    shape: EngineShape = field(default_factory=EngineShape)
    slots: int = 8
    settings: Mapping[str, object] | None = None
    outside: tuple[Address, ...] = ()


class Process:
    """A process that may be killed and started again at the same place."""

    def __init__(self, argv: Sequence[str], log: Path, address: Address) -> None:
        self._argv = argv
        self._log = log
        self._life: AsyncExitStack | None = None
        self._child: asyncio.subprocess.Process | None = None
        self.address = address

    @property
    def pid(self) -> int:
        if self._child is None:
            raise ProcessError("it does not run")
        return self._child.pid

    async def start(self) -> None:
        """Raises ProcessError."""
        self._life = AsyncExitStack()
        self._child = await self._life.enter_async_context(running(self._argv, usable_cores(), self._log))

    async def kill(self) -> None:
        """kill -9, and gone when this returns."""
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()
            await self.stop()

    async def stop(self) -> None:
        if self._life is not None:
            await self._life.aclose()
        self._life = self._child = None


class Fleet:
    """What runs. `gateways` are those alive."""

    def __init__(self, plan: FleetPlan, directory: Path, witness: Witness) -> None:
        self.plan = plan
        self.witness = witness
        self.engines: list[Process] = []
        self.gateways: list[Process] = []
        self._directory = directory
        self._socket = directory / "valkey.sock"
        self._processes: list[Process] = []
        self._started = 0

    @property
    def doors(self) -> list[Address]:
        return [gateway.address for gateway in self.gateways]

    @property
    def worker_addresses(self) -> list[Address]:
        return [*self.plan.outside, *(engine.address for engine in self.engines)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything up and proven; everything gone afterwards. Raises ProcessError or LaunchError."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._stop_all)
            spec = valkey(find_valkey(), self._socket, self._directory / "valkey.log", os.environ)
            await stack.enter_async_context(running(spec.arguments, usable_cores(), spec.log, spec.environment))
            await asyncio.gather(self._until_valkey(), *(self._add_engine() for _ in range(self.plan.engines)))
            await asyncio.gather(*(self.add_gateway() for _ in range(self.plan.gateways)))
            yield

    async def _until_valkey(self) -> None:
        try:
            async with asyncio.timeout(READY_S), self.redis() as client:
                while True:
                    with suppress(redis.exceptions.RedisError):
                        await client.ping()
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise ProcessError(f"Valkey did not answer within {READY_S:g} s") from None

    def redis(self) -> redis.asyncio.Redis:
        """A client of the ledger's server, to be entered."""
        return redis.asyncio.Redis(unix_socket_path=str(self._socket))

    async def _add_engine(self) -> None:
        address = free_address()
        shape = json.dumps(asdict(self.plan.shape))
        argv = [sys.executable, "-m", "loadtest.scenarios.modelled_vllm", "--port", str(address.port)]
        argv += ["--witness", str(self.witness.port), "--shape", shape]
        engine = Process(argv, self._directory / f"engine-{address.port}.log", address)
        self.engines.append(engine)
        self._processes.append(engine)
        await engine.start()

    async def add_gateway(self) -> Process:
        """One more replica, which has proven all workers when this returns."""
        address = free_address()
        self._started += 1
        file = self._directory / f"gateway-{self._started}.yaml"
        file.write_text(yaml.safe_dump(self._settings(address)))
        argv = [sys.executable, "-m", "app", "gateway", "--config", str(file)]
        gateway = Process(argv, file.with_suffix(".log"), address)
        await gateway.start()
        self._processes.append(gateway)
        async with httpx.AsyncClient(timeout=5) as client:
            await until_workers_ready(client, address, READY_S)
        self.gateways.append(gateway)
        return gateway

    async def kill_gateway(self, gateway: Process) -> None:
        """kill -9. From now on nobody asks there."""
        self.gateways.remove(gateway)
        await gateway.kill()

    def _settings(self, address: Address) -> dict[str, object]:
        workers = [
            {"url": engine.url, "served_model": "m", "max_concurrency": self.plan.slots}
            for engine in self.worker_addresses
        ]
        mine: dict[str, object] = {
            "listen": {"host": address.host, "port": address.port},
            "redis": {"url": f"unix://{self._socket}?db=0"},
            "models": [{"name": "m", "variants": [{"name": "modelled", "workers": workers}]}],
            "logs": {"requests": "none"},
            "admission": {"trust_tenant_header": True, "replicas": self.plan.gateways},
        }
        for part, values in (self.plan.settings or {}).items():
            before = mine.get(part, {})
            assert isinstance(values, dict)
            assert isinstance(before, dict)
            mine[part] = {**before, **values}
        return mine

    async def _stop_all(self) -> None:
        await asyncio.gather(*(process.stop() for process in self._processes))

    async def ledger(self) -> dict[str, int]:
        """What Redis itself holds: leases and waiting tickets, counted from the keys that `scripts/queue.lua` names."""
        async with self.redis() as client:
            leases = tickets = 0
            async for key in client.scan_iter(match="*:held:*", count=1000):
                leases += await client.zcard(key)
            async for key in client.scan_iter(match="*:tickets", count=1000):
                tickets += await client.hlen(key)
        return {"leases": leases, "tickets": tickets}

    async def queue_view(self) -> dict[str, int]:
        """What the gateway tells its operator: slots held and tickets that wait."""
        async with httpx.AsyncClient(timeout=5) as client:
            view = (await client.get(f"{self.gateways[0].address.url}/admin/queue")).raise_for_status().json()
        return {
            "slots held": sum(worker["slots_held"] for worker in view["workers"]),
            "waiting": sum(flow["depth"] for flow in view["flows"]),
        }

    async def in_flight(self) -> float:
        """Requests under way by the gateways' own gauges."""
        async with httpx.AsyncClient(timeout=5) as client:
            pages = [(await client.get(f"{door.url}/metrics")).raise_for_status().text for door in self.doors]
        families = [family for page in pages for family in text_string_to_metric_families(page)]
        samples = [sample for family in families for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == "sluice_requests_in_flight")


@asynccontextmanager
async def fleet(plan: FleetPlan) -> AsyncIterator[Fleet]:
    """A running fleet, and the witness of what reaches its engines."""
    with tempfile.TemporaryDirectory(prefix="sluice-scenario-") as name:
        witness = Witness()
        async with witness.listening():
            made = Fleet(plan, Path(name), witness)
            async with made.running():
                yield made
