"""A gateway to attack, another whose deadlines are short, and what must hold after every bad input."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tests.fakes.worker import FakeWorker
from tests.hostile.case import GOOD, Case, post
from tests.hostile.raw import exchange
from tests.integration.gateway.running import GatewayProcess, model, until

LIMITS: dict[str, Any] = {
    "header_timeout_s": 5.0,
    "body_timeout_s": 10.0,
    "body_grace_s": 5.0,
    "body_bytes": 8 * 1024 * 1024,
}
HASTY: dict[str, Any] = {**LIMITS, "header_timeout_s": 0.5, "body_timeout_s": 1.0, "body_grace_s": 0.5}
"""For what is never whole: in others a machine that stands still must not look like a client that does."""


class Fortress:
    """The gateway, its worker, and the file descriptors it had when nobody asked for anything."""

    def __init__(self, gateway: GatewayProcess, worker: FakeWorker) -> None:
        self.gateway = gateway
        self.worker = worker
        self._process = psutil.Process(gateway.process.pid)
        self._idle_fds = 0

    async def settle(self) -> None:
        await self._check_useful()
        await self.gateway.idle()
        # One for a probe of the worker, one for a scrape: they come and go by themselves.
        self._idle_fds = self._process.num_fds() + 2

    async def holds(self) -> None:
        """What must be true after every case."""
        await self._check_useful()

        async def nothing_leaked() -> bool:
            return self._process.num_fds() <= self._idle_fds

        await until(nothing_leaked, "no connection left open")
        await self.gateway.idle()

    async def _check_useful(self) -> None:
        assert self.gateway.process.returncode is None
        (answer,) = await exchange(self.gateway.url, post(GOOD))
        assert answer.status == 200

    async def refuses(self, case: Case) -> None:
        """Send it, compare every answer, and see that the gateway is as before."""
        got = await exchange(self.gateway.url, case.sent)
        assert tuple(answer.status for answer in got) == case.statuses
        if case.code:
            error = got[-1].error
            assert error["code"] == case.code
            if case.param is not None:
                assert error["param"] == case.param
        await self.holds()


@asynccontextmanager
async def standing(directory: Path, limits: dict[str, Any]) -> AsyncIterator[Fortress]:
    async with FakeWorker("m") as worker, GatewayProcess(directory, [model("m", worker)], limits=limits) as gateway:
        await gateway.ready(worker)
        place = Fortress(gateway, worker)
        await place.settle()
        yield place


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fortress(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fortress]:
    async with standing(tmp_path_factory.mktemp("fortress"), LIMITS) as place:
        yield place


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def hasty(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fortress]:
    """Waits for nobody."""
    async with standing(tmp_path_factory.mktemp("hasty"), HASTY) as place:
        yield place
