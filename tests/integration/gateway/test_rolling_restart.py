"""Row F40 of the fault matrix: three replicas are restarted one after the other, under load."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.reading import DONE, events
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model, until
from tests.processes import Valkey

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

SLOTS = 6
ASKERS = 4  # of six slots: about 70 %
LOOK_S = 0.2
NOTICE_S = 20 * LOOK_S
QUICK = chat("a b c", stream=True, x_timing={"decode_s": 0.05})
LONG_TOKENS = 8
LONG = chat(stream=True, max_tokens=LONG_TOKENS, ignore_eos=True, x_timing={"decode_s": 1.5 * NOTICE_S / LONG_TOKENS})
"""One that is still open when nobody new is taken any more."""


@dataclass
class Balancer:
    """What a load balancer does: asks every replica whether it is ready, and sends to those that say so, in turn."""

    replicas: list[GatewayProcess]
    ready: list[GatewayProcess] = field(default_factory=list)

    async def look(self) -> None:
        """For ever."""
        async with httpx.AsyncClient(timeout=60) as probe:
            while True:
                self.ready = [replica for replica in self.replicas if await self._is_ready(probe, replica)]
                await asyncio.sleep(LOOK_S)

    async def _is_ready(self, probe: httpx.AsyncClient, replica: GatewayProcess) -> bool:
        try:
            return (await probe.get(f"{replica.url}/readyz")).status_code == 200
        except httpx.TransportError:
            return False


async def read(replica: GatewayProcess, body: dict[str, Any], begun: asyncio.Event) -> None:
    """All of a stream, which must be whole."""
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", replica.url + CHAT, json=body) as answer:
        assert answer.status_code == 200
        begun.set()
        content = await answer.aread()
    assert events(content)[-1].data == DONE


async def test_nobody_notices(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(Valkey(tmp_path))
        worker = await stack.enter_async_context(FakeWorker("m"))
        replicas = []
        for name in ("one", "two", "three"):
            (tmp_path / name).mkdir()
            replica = GatewayProcess(
                tmp_path / name,
                [model("m", worker, max_concurrency=SLOTS)],
                redis={"url": valkey.url},
                drain_notice_s=NOTICE_S,
            )
            replicas.append(await stack.enter_async_context(replica))
            await replica.ready(worker)
        balancer = Balancer(replicas)
        looking = asyncio.create_task(balancer.look())
        served: list[str] = []
        is_over = asyncio.Event()

        async def ask(number: int) -> None:
            turns = itertools.count(number)
            while not is_over.is_set():
                ready = balancer.ready
                if not ready:
                    await asyncio.sleep(LOOK_S)
                    continue
                replica = ready[next(turns) % len(ready)]
                await read(replica, QUICK, asyncio.Event())
                served.append(replica.url)

        askers = [asyncio.create_task(ask(number)) for number in range(ASKERS)]

        async def all_ready() -> bool:
            return len(balancer.ready) == len(replicas)

        for replica in replicas:
            await until(all_ready, "all replicas are ready", 60)
            begun = asyncio.Event()
            reading = asyncio.create_task(read(replica, LONG, begun))
            await asyncio.wait_for(begun.wait(), 60)
            replica.process.terminate()
            assert await asyncio.to_thread(replica.process.wait, 60) == 0
            await reading
            await replica.__aexit__()
            await replica.__aenter__()
            await replica.ready(worker)
        await until(all_ready, "all replicas are ready", 60)
        is_over.set()
        await asyncio.gather(*askers)
        looking.cancel()
        assert len(served) > 3 * ASKERS
        assert set(served) == {replica.url for replica in replicas}
