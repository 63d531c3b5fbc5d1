"""`x-sluice-queue-events`: a stream that waits tells where it stands, and ends as honestly as any other."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.reading import events
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, MESSAGES, RESPONSES, chat
from tests.integration.gateway.conftest import House
from tests.integration.gateway.running import GatewayProcess, model
from tests.integration.gateway.wire import Wire, connected, dechunked
from tests.processes import Valkey

pytestmark = pytest.mark.asyncio(loop_scope="session")

ASKED = {"content-type": "application/json", "x-sluice-queue-events": "1"}
COMMENT = re.compile(rb": sluice-queue position=(\d+) of=(\d+) wait_ms=(\d+)\n\n")


@asynccontextmanager
async def held(gateway: GatewayProcess, worker: FakeWorker) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """The only slot is taken, until the worker resumes."""
    worker.hold()
    holder = asyncio.create_task(gateway.http.post(CHAT, json=chat(model=worker.model)))
    try:
        await worker.wait_for(open=1)
        yield holder
    finally:
        worker.resume()
        await asyncio.gather(holder, return_exceptions=True)


async def ask(wire: Wire, headers: dict[str, str] = ASKED, path: str = CHAT, **fields: Any) -> None:
    await wire.post(path, {**chat(model="narrow"), "stream": True, "max_tokens": 3, **fields}, headers)


async def standing(wire: Wire, position: int, of: int) -> bytes:
    """Everything up to the comment with this standing."""
    return await wire.until(b"position=%d of=%d wait_ms=" % (position, of))


async def test_who_waits_hears_where_it_stands_until_its_answer_comes(house: House) -> None:
    async with connected(house.gateway.url) as first, connected(house.gateway.url) as second:
        async with held(house.gateway, house.narrow):
            await ask(first)
            head = await standing(first, 1, 1)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"content-type: text/event-stream" in head
            assert b"x-sluice-model: narrow" in head
            await ask(second)
            await standing(second, 2, 2)
            await standing(first, 1, 2)
            first.close()
            await standing(second, 1, 1)
        rest = await second.until(b"\r\n0\r\n\r\n")
    assert re.search(rb": sluice-queue granted queue_ms=[\d.]+ model=narrow variant=v\n\n", rest)
    granted = rest[rest.index(b": sluice-queue granted") :]
    assert granted.count(b"data: ") == rest.count(b"data: ") > 3
    assert b"data: [DONE]\n\n" in granted


async def test_who_need_not_wait_has_an_ordinary_answer(house: House) -> None:
    body = chat(model="narrow", stream=True, max_tokens=3)
    plain = await house.gateway.http.post(CHAT, json=body)
    asked = await house.gateway.http.post(CHAT, json=body, headers=ASKED)
    assert asked.headers.keys() == plain.headers.keys()
    assert b": sluice" not in asked.content
    assert [event.data for event in events(asked.content)][-1] == "[DONE]"


@pytest.mark.parametrize(
    ("headers", "stream"), [({"content-type": "application/json"}, True), ({**ASKED}, False)], ids=["unasked", "whole"]
)
async def test_without_the_header_or_a_stream_nothing_is_said(
    house: House, headers: dict[str, str], stream: bool
) -> None:
    async with connected(house.gateway.url) as wire, connected(house.gateway.url) as after:
        async with held(house.gateway, house.narrow):
            await ask(wire, headers, stream=stream)
            await house.gateway.metric("sluice_queue_depth", 1)
            await ask(after)
            await standing(after, 2, 2)
        head = await wire.until(b"\r\n\r\n")
        assert b"x-sluice-queue-ms: " in head
        await after.until(b"\r\n0\r\n\r\n")


async def test_a_client_that_leaves_while_it_waits_is_gone_within_a_second(house: House) -> None:
    seen = house.narrow.counts.seen
    async with held(house.gateway, house.narrow):
        async with connected(house.gateway.url) as wire:
            await ask(wire)
            await standing(wire, 1, 1)
            wire.close()
            await house.gateway.metric("sluice_queue_depth", 0)
    assert house.narrow.counts.seen == seen + 1


@pytest.mark.parametrize(
    ("path", "fields", "event"),
    [
        (CHAT, {}, b'\n\ndata: {"error":'),
        (RESPONSES, {"input": "hi", "messages": None, "max_tokens": None}, b"event: error\ndata: "),
        (MESSAGES, {}, b"event: error\ndata: "),
    ],
    ids=["chat", "responses", "messages"],
)
async def test_a_wait_in_vain_ends_in_an_error_event_and_an_unclean_close(
    tmp_path: Path, path: str, fields: dict[str, Any], event: bytes
) -> None:
    async with FakeWorker("narrow") as worker:
        models, patience = [model("narrow", worker, max_concurrency=1)], {"queue_timeout_s": 2}
        async with GatewayProcess(tmp_path, models, admission=patience) as gateway:
            await gateway.ready(worker)
            async with held(gateway, worker), connected(gateway.url) as wire:
                body = {**chat(model="narrow"), "stream": True, "max_tokens": 3, **fields}
                await wire.post(path, {name: value for name, value in body.items() if value is not None}, ASKED)
                head, _, content = (await wire.rest()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            told, is_whole = dechunked(content)
            assert not is_whole
            assert COMMENT.match(told)
            assert event in told
            assert b'"queue_timeout"' in told
            await gateway.metric("sluice_requests_total", 1, outcome="expired", code="queue_timeout")


async def test_a_worker_that_refuses_after_the_head_is_told_in_the_stream(house: House) -> None:
    async with connected(house.gateway.url) as wire:
        async with held(house.gateway, house.narrow):
            await ask(wire, x_fault="fast_500")
            await standing(wire, 1, 1)
        content = await wire.rest()
    (error,) = re.findall(rb"data: (\{.*\})\n\n", content)
    assert json.loads(error)["error"]["type"] == "server_error"
    assert not content.endswith(b"0\r\n\r\n")


async def test_positions_are_those_of_all_replicas(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with FakeWorker("narrow") as worker:
        models = [model("narrow", worker, max_concurrency=1)]
        with Valkey(tmp_path_factory.mktemp("valkey")) as valkey:
            redis = {"url": valkey.url}
            async with (
                GatewayProcess(tmp_path_factory.mktemp("one"), models, redis=redis) as one,
                GatewayProcess(tmp_path_factory.mktemp("two"), models, redis=redis) as two,
            ):
                await one.ready(worker)
                await two.ready(worker)
                async with connected(one.url) as first, connected(two.url) as second:
                    async with held(one, worker):
                        await ask(first)
                        await standing(first, 1, 1)
                        await ask(second)
                        await standing(second, 2, 2)
                        await standing(first, 1, 2)
                    await first.until(b"[DONE]")
                    await second.until(b"[DONE]")
