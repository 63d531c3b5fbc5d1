"""A client that does not read costs little memory, holds nobody else up, and is cut off at the limit."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import AsyncExitStack
from typing import Any

import httpx
import psutil
import pytest

from tests.fakes.reading import DONE, events
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.conftest import SHORT, House, ShortTempered
from tests.integration.gateway.running import GatewayProcess, Scrape, until
from tests.integration.gateway.wire import Wire, connected, dechunked

pytestmark = pytest.mark.asyncio(loop_scope="session")

STALLED = 10
RECEIVE_BUFFER = 4096
MIB = 1024 * 1024
STILL_READINGS = 20
# One token of 60 kB, said over and over: 24 MB an answer, of which only the kernel's buffers and ours can be taken.
TORRENT = chat("x" * 60_000, stream=True, ignore_eos=True, max_tokens=400)


async def stands_still(worker: FakeWorker) -> None:
    """Wait until the worker has not said anything for a while: whatever buffers there are, they are full."""
    readings: deque[float] = deque(maxlen=STILL_READINGS)
    async with httpx.AsyncClient(base_url=worker.url, timeout=30) as client:

        async def is_still() -> bool:
            page = Scrape((await client.get("/metrics")).text)
            readings.append(page.sum("vllm:generation_tokens_total"))
            return len(readings) == STILL_READINGS and len(set(readings)) == 1

        await until(is_still, "the worker stands still")


async def test_what_is_buffered_for_a_client_that_does_not_read_is_bounded(house: House) -> None:
    process = psutil.Process(house.gateway.process.pid)
    before = process.memory_info().rss
    async with AsyncExitStack() as stack:
        for _ in range(STALLED):
            wire = await stack.enter_async_context(connected(house.gateway.url, RECEIVE_BUFFER))
            await wire.post(CHAT, TORRENT)
            await wire.until(b"\r\n\r\n")
        await stands_still(house.worker)
        assert house.worker.counts.open == STALLED, "the worker could send a whole answer to who does not read"
        assert process.memory_info().rss - before < STALLED * MIB
        answer = await house.gateway.http.post(CHAT, json=chat(nonce="other", stream=True))
        assert events(answer.content)[-1].data == DONE
    await house.worker.wait_for(open=0)


async def test_a_client_that_reads_slowly_gets_everything(house: House) -> None:
    body = chat("y" * 20_000, stream=True, ignore_eos=True, max_tokens=100)
    async with connected(house.gateway.url, RECEIVE_BUFFER) as wire:
        await wire.post(CHAT, body)
        await wire.until(b"\r\n\r\n")
        received = await wire.until(b"0\r\n\r\n")
    content, in_order = dechunked(received)
    assert in_order
    assert content.count(b"y" * 20_000) == 100


async def test_a_client_that_stalls_is_cut_off_and_its_slot_is_free(short: ShortTempered) -> None:
    limit = SHORT["relay"]["client_stall_timeout_s"]
    aborted = short.worker.counts.aborted
    before, begun = await short.gateway.scrape(), time.monotonic()
    async with connected(short.gateway.url, RECEIVE_BUFFER) as wire:
        await wire.post(CHAT, TORRENT)
        await wire.until(b"\r\n\r\n")
        await short.worker.wait_for(open=0, aborted=aborted + 1)
        assert time.monotonic() - begun > limit
        await short.gateway.idle()
        assert not is_connected(short.gateway, wire), "the stalled connection outlives its request"
    stalled: dict[str, Any] = {"outcome": "client_stalled", "code": "client_stalled"}
    counted = before.sum("sluice_requests_total", **stalled)
    await short.gateway.metric("sluice_requests_total", counted + 1, **stalled)
    cancelled = before.sum("sluice_requests_total", outcome="cancelled")
    assert (await short.gateway.scrape()).sum("sluice_requests_total", outcome="cancelled") == cancelled
    line = await asyncio.to_thread(short.gateway.process.wait_for_line, '"outcome": ?"client_stalled"')
    assert '"code": "client_stalled"' in line or '"code":"client_stalled"' in line


def is_connected(gateway: GatewayProcess, wire: Wire) -> bool:
    """Whether the gateway still holds its end of this connection."""
    held = psutil.Process(gateway.process.pid).net_connections("tcp")
    return any(peer.status == psutil.CONN_ESTABLISHED and peer.raddr.port == wire.port for peer in held)
