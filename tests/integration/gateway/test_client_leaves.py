"""A client that leaves, in whatever way and at whatever stage, frees the worker and the slot soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, MESSAGES, chat
from tests.integration.gateway.conftest import House
from tests.integration.gateway.wire import Wire, connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

WITHIN_S = 20.0  # the promise is a second; a busy machine stalls for several
LEAVING: dict[str, Callable[[Wire], None]] = {
    "closes": Wire.close,
    "resets": Wire.reset,
    "half-closes": Wire.half_close,
}
way = pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING.keys())


class Ending:
    """Counts before a client leaves, and the check that it left no trace but one cancelled request."""

    def __init__(self, house: House, worker: FakeWorker, cancelled: float) -> None:
        self._house = house
        self._worker = worker
        self._cancelled = cancelled
        self._aborted = worker.counts.aborted

    @classmethod
    async def expected(cls, house: House, worker: FakeWorker) -> Ending:
        scrape = await house.gateway.scrape()
        return cls(house, worker, scrape.sum("sluice_requests_total", outcome="cancelled"))

    async def seen(self) -> None:
        await self._worker.wait_for(WITHIN_S, open=0, running=0, aborted=self._aborted + 1)
        await self.counted()

    async def counted(self) -> None:
        await self._house.gateway.idle(WITHIN_S)
        scrape = await self._house.gateway.scrape()
        assert scrape.sum("sluice_requests_total", outcome="cancelled") == self._cancelled + 1
        assert scrape.sum("sluice_requests_total", code="client_gone", outcome="cancelled") == self._cancelled + 1


@way
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_byte(house: House, stream: bool, leave: Callable[[Wire], None]) -> None:
    ending = await Ending.expected(house, house.narrow)
    async with connected(house.gateway.url) as wire:
        await wire.post(CHAT, chat(model="narrow", stream=stream, x_fault="hang_before"))
        await house.narrow.wait_for(running=1)
        leave(wire)
        await ending.seen()


@pytest.mark.parametrize("stream", [False, True])
async def test_after_the_workers_headers_and_before_its_first_token(house: House, stream: bool) -> None:
    ending = await Ending.expected(house, house.narrow)
    house.narrow.hold()
    async with connected(house.gateway.url) as wire:
        await wire.post(CHAT, chat(model="narrow", stream=stream))
        await house.narrow.wait_for(running=1)
        wire.close()
        await ending.seen()


@way
@pytest.mark.parametrize(("path", "marks"), [(CHAT, 3), (MESSAGES, 3)])
async def test_in_the_middle_of_a_stream(house: House, path: str, marks: int, leave: Callable[[Wire], None]) -> None:
    ending = await Ending.expected(house, house.narrow)
    body = chat("a b c d e f", model="narrow", stream=True, max_tokens=9, x_fault=f"hang_after:{marks}")
    async with connected(house.gateway.url) as wire:
        await wire.post(path, body)
        for _ in range(marks):
            await wire.until(b"\n\n")
        leave(wire)
        await ending.seen()


async def test_in_the_middle_of_a_whole_answer(house: House) -> None:
    ending = await Ending.expected(house, house.narrow)
    async with connected(house.gateway.url) as wire:
        await wire.post(CHAT, chat(model="narrow", x_fault="hang_after:10"))
        await house.narrow.wait_for(open=1, running=0)
        wire.close()
        await ending.seen()


@way
@pytest.mark.parametrize("stream", [False, True])
async def test_while_it_waits_in_the_queue(house: House, stream: bool, leave: Callable[[Wire], None]) -> None:
    house.narrow.hold()
    async with connected(house.gateway.url) as holder, connected(house.gateway.url) as wire:
        await holder.post(CHAT, chat(model="narrow", nonce="holder"))
        await house.narrow.wait_for(running=1)
        seen = house.narrow.counts.seen
        cancelled = (await house.gateway.scrape()).sum("sluice_requests_total", outcome="cancelled")
        await wire.post(CHAT, chat(model="narrow", nonce="waits", stream=stream))
        await house.gateway.metric("sluice_queue_depth", 1)
        leave(wire)
        await house.gateway.metric("sluice_queue_depth", 0, WITHIN_S)
        await house.gateway.metric("sluice_requests_in_flight", 1, WITHIN_S)
        house.narrow.resume()
        status, _, answer = await holder.answer()
        assert (status, b"holder-0" in answer) == (200, True)
        assert house.narrow.counts.seen == seen, "a request that nobody waits for was dispatched"
        await house.gateway.metric("sluice_requests_total", cancelled + 1, outcome="cancelled")


async def test_the_slot_goes_to_who_is_next(house: House) -> None:
    house.narrow.inject("hang_before", times=1)
    async with connected(house.gateway.url) as leaving, connected(house.gateway.url) as waiting:
        await leaving.post(CHAT, chat(model="narrow"))
        await house.narrow.wait_for(running=1)
        await waiting.post(CHAT, chat(model="narrow", nonce="next"))
        await house.gateway.metric("sluice_queue_depth", 1)
        leaving.close()
        status, headers, answer = await waiting.answer()
        assert (status, b"next-0" in answer) == (200, True)
        assert float(headers["x-sluice-queue-ms"]) > 0


async def test_many_at_once_leave_nothing_behind(house: House) -> None:
    house.worker.hold()
    aborted = house.worker.counts.aborted
    wires: list[Any] = []
    for number in range(50):
        connection = connected(house.gateway.url)
        wires.append((connection, await connection.__aenter__()))
        await wires[-1][1].post(CHAT, chat(stream=number % 2 == 0))
    await house.worker.wait_for(open=50)
    for connection, _ in wires:
        await connection.__aexit__(None, None, None)
    await house.worker.wait_for(WITHIN_S, open=0, aborted=aborted + 50)
    await house.gateway.idle(WITHIN_S)


async def test_a_client_that_leaves_after_the_answer_did_not_leave(house: House) -> None:
    before = (await house.gateway.scrape()).sum("sluice_requests_total", outcome="cancelled")
    for stream in (False, True):
        async with connected(house.gateway.url) as wire:
            await wire.post(CHAT, chat(stream=stream))
            await wire.until(b"[DONE]\n\n" if stream else b'"metrics":null}')
    await house.gateway.idle()
    assert (await house.gateway.scrape()).sum("sluice_requests_total", outcome="cancelled") == before


async def test_a_client_that_leaves_while_it_sends_its_body_costs_nothing(house: House) -> None:
    seen = house.worker.counts.seen
    async with connected(house.gateway.url) as wire:
        await wire.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 500\r\n\r\n{"model":'
        )
    await house.gateway.idle()
    assert house.worker.counts.seen == seen
    assert "internal error" not in house.gateway.process.output
