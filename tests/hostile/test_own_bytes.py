"""S22, S23: no byte of one request reaches another, whatever is cancelled when. Each request has a nonce of its own,
which the worker says back; every answer, also of those that leave in the middle, is searched for others'."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model
from tests.integration.gateway.wire import READ_TIMEOUT_S, Wire, connected
from tests.processes import Valkey

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

REQUESTS = int(os.environ.get("SLUICE_NONCE_REQUESTS", "10000"))
AT_ONCE = 64
NONCE = re.compile(rb"n[0-9a-f]{12}z")


@dataclass
class Seen:
    """What all clients saw. `left` went before their answer was whole."""

    whole: int = 0
    left: int = 0
    foreign: list[str] = field(default_factory=list)


class Client:
    """Asks again and again, over connections that it keeps, and leaves every fourth time at a moment of its own."""

    def __init__(self, gateway: GatewayProcess, chance: random.Random, seen: Seen) -> None:
        self._gateway = gateway
        self._chance = chance
        self._seen = seen

    async def ask(self, count: int) -> None:
        while count > 0:
            async with connected(self._gateway.url) as wire:
                while count > 0:
                    count -= 1
                    if not await self._ask_once(wire):
                        break

    async def _ask_once(self, wire: Wire) -> bool:
        """Whether the connection is still good."""
        chance = self._chance
        nonce = f"n{chance.getrandbits(48):012x}z"
        stream = chance.random() < 0.5
        # Some wait at the worker, so that there are moments to leave at: queued, before and after the first byte.
        pace: dict[str, Any] = {"x_timing": {"decode_s": 0.002}} if chance.random() < 0.3 else {}
        await wire.post(CHAT, chat(nonce, nonce=nonce, stream=stream, max_tokens=chance.randint(1, 8), **pace))
        told = bytearray()
        leaves = chance.random() < 0.25
        try:
            async with asyncio.timeout(chance.random() * 0.03 if leaves else READ_TIMEOUT_S):
                await self._read(wire, told, stream=stream)
        except TimeoutError:
            if not leaves:
                raise
            if chance.random() < 0.5:
                wire.reset()
            self._seen.left += 1
        else:
            self._seen.whole += 1
            assert nonce.encode() in told, bytes(told)
        self._seen.foreign += [found.decode() for found in NONCE.findall(bytes(told)) if found != nonce.encode()]
        return not leaves

    async def _read(self, wire: Wire, told: bytearray, *, stream: bool) -> None:
        head = await wire.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        if stream:
            while not told.endswith(b"0\r\n\r\n"):
                told += await wire.until(b"\r\n")
        else:
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
            told += await wire.exactly(length)


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["alone", "with Valkey"])
async def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayProcess]:
    directory = tmp_path_factory.mktemp("nonces")
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(FakeWorker("m")) for _ in range(2)]
        # Workers and clients share one busy event loop here: nobody is to be left, or given up on, for being slow.
        settings: dict[str, Any] = {
            "logs": {"requests": "none"},
            "health": {"probe_timeout_s": 30, "progress_timeout_s": 600},
            "admission": {"queue_timeout_s": 120, "no_worker_timeout_s": 60},
        }
        if request.param != "alone":
            settings["redis"] = {"url": stack.enter_context(Valkey(directory)).url}
        gateway = GatewayProcess(directory, [model("m", *workers, max_concurrency=16)], **settings)
        await stack.enter_async_context(gateway)
        await gateway.ready(*workers)
        yield gateway
        assert NONCE.search(gateway.process.output.encode()) is None


async def test_no_byte_of_one_request_reaches_another(gateway: GatewayProcess) -> None:
    seen, began = Seen(), time.monotonic()
    seed = random.SystemRandom().getrandbits(32)
    clients = [Client(gateway, random.Random(f"{seed}-{at}"), seen) for at in range(AT_ONCE)]  # noqa: S311
    await asyncio.gather(*(client.ask(REQUESTS // AT_ONCE) for client in clients))
    print(f"seed {seed}: {seen.whole} whole, {seen.left} left, {time.monotonic() - began:.0f} s")
    assert seen.foreign == []
    assert seen.whole + seen.left == REQUESTS // AT_ONCE * AT_ONCE
    assert seen.left > REQUESTS // 50
    await gateway.idle()
