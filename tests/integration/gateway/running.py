"""A real gateway process for tests: configured, started, watched through its own HTTP, stopped."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, Self

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from app.tenancy.keys import Pepper, Scope
from app.tenancy.registrar import Registrar
from app.tenancy.stores import FileKeys
from tests.fakes.worker import FakeWorker
from tests.ports import free_port
from tests.processes import Process

PATIENCE_S = 30.0
"""How long what must come may take: a machine may stand still for seconds, and only failures wait."""
POLL_S = 0.01

Settings = Mapping[str, Any]


class Listening(Protocol):
    """A worker, fake or real, at a port of 127.0.0.1."""

    @property
    def port(self) -> int: ...

    @property
    def url(self) -> str: ...


async def until(holds: Callable[[], Awaitable[bool]], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Ask again and again until it holds, for what only a scrape or a probe can tell. Raises TimeoutError."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await holds():
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise TimeoutError(f"not within {timeout_s} s: {what}") from None


def model(name: str, *workers: FakeWorker, **worker_settings: Any) -> dict[str, Any]:
    """A model's part of the configuration: one variant `v` that `workers` serve."""
    listed = [{"url": worker.url, "served_model": worker.model, **worker_settings} for worker in workers]
    return {"name": name, "variants": [{"name": "v", "workers": listed}]}


class Scrape:
    """One reading of `/metrics`."""

    def __init__(self, page: str) -> None:
        self._lines = page.splitlines()

    def samples(self, name: str = "") -> list[Sample]:
        """All samples whose names begin like this. Only these are parsed: a whole page takes tens of milliseconds."""
        wanted = "\n".join(line for line in self._lines if line.startswith(name) and not line.startswith("#"))
        return [sample for family in text_string_to_metric_families(wanted + "\n") for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """All samples of `name` whose labels include these, added up; 0 when there are none."""
        found = [sample for sample in self.samples(name) if sample.name == name]
        return sum(sample.value for sample in found if labels.items() <= sample.labels.items())


class GatewayProcess:
    """`sluice gateway` on free ports of 127.0.0.1, as a child process; `http` asks its public listener.

    With `admin` it has a second listener, and `operators` asks that one; otherwise both are the same. `http` shows
    `key`, `operators` shows `admin_key`.
    """

    def __init__(
        self,
        directory: Path,
        models: Sequence[Settings],
        *,
        admin: bool = False,
        key: str = "",
        admin_key: str = "",
        wrapper: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self._wrapper = wrapper
        self._key, self._admin_key = key, admin_key
        self.port = free_port()
        self.admin_port = free_port() if admin else self.port
        listeners: dict[str, Any] = {"listen": {"port": self.port, **settings.pop("listen", {})}}
        if admin:
            listeners["admin"] = {"port": self.admin_port}
        if "redis" in settings:  # a server that stands still for a while has not gone
            settings["redis"] = {"call_timeout_s": PATIENCE_S, **settings["redis"]}
        defaults = {"drain_notice_s": 0, "logs": {"requests": "all"}, "health": {"probe_interval_s": 0.2}}
        self._settings = {**defaults, **settings, **listeners, "models": list(models)}
        self.config = directory / "gateway.yaml"
        self.configure()
        self._process: Process | None = None

    def configure(self, **settings: Any) -> None:
        """Write the configuration, with these settings changed, in one step: a running gateway finds it."""
        written = self.config.with_suffix(".new")
        written.write_text(yaml.safe_dump({**self._settings, **settings}), encoding="utf-8")
        written.replace(self.config)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def process(self) -> Process:
        """The running process. Raises RuntimeError before the start."""
        if self._process is None:
            raise RuntimeError("this gateway was not started")
        return self._process

    async def __aenter__(self) -> Self:
        self.http = httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S, headers=_bearer(self._key))
        operators = f"http://127.0.0.1:{self.admin_port}"
        self.operators = httpx.AsyncClient(base_url=operators, timeout=PATIENCE_S, headers=_bearer(self._admin_key))
        self._process = start_gateway("--config", str(self.config), wrapper=self._wrapper)
        try:
            await asyncio.to_thread(self._process.wait_for_line, "Application startup complete")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        await self.operators.aclose()
        await asyncio.to_thread(self.process.stop)

    async def workers(self) -> dict[str, dict[str, str]]:
        """What `/readyz` says of each worker, by `host:port`."""
        report: dict[str, dict[str, str]] = (await self.http.get("/readyz")).json()["workers"]
        return report

    async def state_of(self, worker: Listening) -> str:
        return (await self.workers())[f"127.0.0.1:{worker.port}"]["state"]

    async def ready(self, *workers: Listening, timeout_s: float = PATIENCE_S) -> None:
        """Wait until these workers are ready."""

        async def are_ready() -> bool:
            report = await self.workers()
            return all(report.get(f"127.0.0.1:{worker.port}", {}).get("state") == "ready" for worker in workers)

        await until(are_ready, f"ready: {[worker.url for worker in workers]}", timeout_s)

    async def scrape(self) -> Scrape:
        answer = await self.operators.get("/metrics")
        return Scrape(answer.raise_for_status().text)

    async def metric(self, name: str, expected: float, timeout_s: float = PATIENCE_S, **labels: str) -> None:
        """Wait until the samples of a metric add up to `expected`."""

        async def has_value() -> bool:
            return (await self.scrape()).sum(name, **labels) == expected

        await until(has_value, f"{name}{labels} == {expected}", timeout_s)

    async def idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until nothing is held or waits: every slot free, the queue empty, no request in flight."""

        async def is_idle() -> bool:
            scrape = await self.scrape()
            held = ("sluice_slots_held", "sluice_queue_depth", "sluice_requests_in_flight")
            return all(scrape.sum(name) == 0 for name in held)

        await until(is_idle, "no slot held, no ticket waiting, no request in flight", timeout_s)


async def issue_keys(
    file: Path, *tenants: str, admin: str = "", secret: str = "", lifetime_s: float | None = None
) -> dict[str, str]:
    """New keys in `file`, by tenant; `admin` is the tenant whose key is an admin's."""
    registrar = Registrar(FileKeys(file), Pepper(secret.encode()), time.time)
    lifetime = None if lifetime_s is None else timedelta(seconds=lifetime_s)
    keys = {tenant: (await registrar.create(tenant, lifetime=lifetime)).text for tenant in tenants}
    if admin:
        keys[admin] = (await registrar.create(admin, scope=Scope.ADMIN)).text
    return keys


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def start_gateway(*arguments: str, wrapper: Sequence[str] = ()) -> Process:
    """`python -m app gateway …`, run by `wrapper`, without settings from this process' environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    return Process([*wrapper, sys.executable, "-m", "app", "gateway", *arguments], environment)
