"""Row F54 of the fault matrix: processes of a gateway that die."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest
import pytest_asyncio

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROCESSES = 2


class Family:
    """A gateway of several processes, and its worker."""

    def __init__(self, gateway: GatewayProcess, worker: FakeWorker) -> None:
        self.gateway = gateway
        self.worker = worker

    def serving(self) -> list[psutil.Process]:
        """Those that hold the listener, but for the parent. multiprocessing has helpers of its own among them."""
        children = psutil.Process(self.gateway.process.pid).children()
        return [child for child in children if "spawn_main" in command_of(child)]

    async def kill_one(self) -> None:
        """Kill one, and wait until another has taken its place."""
        before = {child.pid for child in self.serving()}
        victim = self.serving()[0]
        victim.send_signal(signal.SIGKILL)

        async def has_successor() -> bool:
            now = {child.pid for child in self.serving()}
            return len(now) == PROCESSES and victim.pid not in now and bool(now - before)

        await until(has_successor, "another process in its place", 60)

    async def readiness(self) -> tuple[int, str]:
        """As a probe sees it, on a connection of its own."""
        async with httpx.AsyncClient(base_url=self.gateway.url, timeout=60) as probe:
            answer = await probe.get("/readyz")
            return answer.status_code, answer.json()["status"]


def command_of(process: psutil.Process) -> str:
    """Nothing for one that has died."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@pytest_asyncio.fixture(loop_scope="session")
async def family(tmp_path: Path) -> AsyncIterator[Family]:
    async with FakeWorker("m") as worker:
        async with GatewayProcess(tmp_path, [model("m", worker)], listen={"processes": PROCESSES}) as gateway:
            await gateway.ready(worker)
            yield Family(gateway, worker)


async def test_one_that_dies_is_replaced_and_the_others_serve_on(family: Family) -> None:
    await family.kill_one()
    async with httpx.AsyncClient(base_url=family.gateway.url, timeout=60) as client:
        assert (await client.post(CHAT, json=chat())).status_code == 200
    assert "died with -9; another starts in 0.00 s" in family.gateway.process.output


async def test_a_replica_whose_processes_keep_dying_asks_for_no_more_work(family: Family) -> None:
    for _ in range(4):
        assert (await family.readiness())[1] != "ailing"
        await family.kill_one()

    async def is_ailing() -> bool:
        """On a machine so slow that five deaths do not fit into a minute it takes some more."""
        await family.kill_one()
        return await family.readiness() == (503, "ailing")

    await until(is_ailing, "readiness says ailing", 120)
    async with httpx.AsyncClient(base_url=family.gateway.url, timeout=60) as client:
        assert (await client.post(CHAT, json=chat())).status_code == 200
