"""SIGTERM: what runs is finished, nothing new is taken, and the exit is clean."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.fakes.reading import DONE, events
from tests.fakes.worker import FakeWorker
from tests.integration.admission.fleet import Dump
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model, until
from tests.integration.gateway.wire import connected, dechunked
from tests.processes import Valkey

pytestmark = pytest.mark.asyncio(loop_scope="session")


@asynccontextmanager
async def running(directory: Path, **settings: Any) -> AsyncIterator[tuple[GatewayProcess, FakeWorker]]:
    async with FakeWorker("m") as worker:
        async with GatewayProcess(directory, [model("m", worker, max_concurrency=1)], **settings) as gateway:
            await gateway.ready(worker)
            yield gateway, worker
        await worker.wait_for(connections=0)


async def ended(gateway: GatewayProcess, timeout_s: float = 60.0) -> int:
    """The exit code, once the process has ended."""
    return await asyncio.to_thread(gateway.process.wait, timeout_s)


def told(gateway: GatewayProcess) -> dict[str, int]:
    """How many requests its processes have told of, by the step of their end."""
    lines = [json.loads(line) for line in gateway.process.output.splitlines() if '"requests"' in line]
    counts = Counter[str]()
    for line in lines:
        counts[line["event"]] += line["requests"]
    return dict(counts)


async def refuses(gateway: GatewayProcess) -> None:
    """Wait until nobody listens any more."""

    async def is_closed() -> bool:
        try:
            async with connected(gateway.url):
                return False
        except (ConnectionRefusedError, ConnectionResetError):  # reset: it closed while this one was in its backlog
            return True

    await until(is_closed, "the port is closed")


@pytest.mark.parametrize("processes", [1, 2])
async def test_with_nothing_to_finish_it_ends_at_once(tmp_path: Path, processes: int) -> None:
    """A client that keeps an idle connection is nothing to wait for."""
    async with running(tmp_path, listen={"processes": processes}) as (gateway, _):
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as idle:
            assert (await idle.get("/healthz")).status_code == 200
            children = psutil.Process(gateway.process.pid).children()
            begun = time.monotonic()
            gateway.process.signal(signal.SIGINT)
            assert await ended(gateway) == 0
            assert time.monotonic() - begun < 30  # without a client to wait for
        _, left = await asyncio.to_thread(psutil.wait_procs, children, 20)
        assert left == []
        assert "Traceback" not in gateway.process.output


@pytest.mark.parametrize("processes", [1, 2])
async def test_open_and_waiting_requests_are_finished(tmp_path: Path, processes: int) -> None:
    """One slot in each process: with one process, one of these waits for the other."""
    async with running(tmp_path, listen={"processes": processes}) as (gateway, worker):
        worker.hold()
        async with connected(gateway.url) as stream, connected(gateway.url) as whole:
            await stream.post(CHAT, chat("a b c", stream=True))
            await worker.wait_for(open=1)
            await whole.post(CHAT, chat("a b c"))
            await gateway.metric("sluice_requests_in_flight", 2)
            gateway.process.terminate()
            await refuses(gateway)
            worker.resume()
            _, headers, answer = await whole.answer()
            assert b'"object":"chat.completion"' in answer
            assert headers["connection"] == "close"
            await stream.until(b"\r\n\r\n")
            content, in_order = dechunked(await stream.rest())
            assert in_order
            assert events(content)[-1].data == DONE
        assert await ended(gateway) == 0
        assert "Traceback" not in gateway.process.output
        assert told(gateway) == {"draining": 2}


async def test_it_says_so_and_serves_on_until_load_balancers_have_noticed(tmp_path: Path) -> None:
    async with (
        running(tmp_path, drain_notice_s=60) as (gateway, _),
        httpx.AsyncClient(base_url=gateway.url, timeout=30) as kept,
    ):
        assert "connection" not in (await kept.get("/readyz")).headers
        gateway.process.terminate()

        async def is_quiet() -> bool:
            answer = await gateway.http.get("/readyz")
            return answer.status_code == 503 and answer.json()["status"] == "draining"

        await until(is_quiet, "readiness says draining")
        assert (await gateway.http.get("/health")).status_code == 503
        async with connected(gateway.url) as new:
            await new.post(CHAT, chat("a b c"))
            status, headers, _ = await new.answer()
            assert status == 200
            assert headers["connection"] == "close"
        answer = await kept.post(CHAT, json=chat("a b c"))
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        gateway.process.terminate()
        assert await ended(gateway) == 0


async def test_who_waits_for_too_long_is_turned_away(tmp_path: Path) -> None:
    """What holds a slot is finished, and who only waits for one can still be served by another replica."""
    async with running(tmp_path, drain_queue_s=0.5) as (gateway, worker):
        worker.hold()
        async with connected(gateway.url) as first, connected(gateway.url) as second:
            await first.post(CHAT, chat("a b c"))
            await worker.wait_for(running=1)
            await second.post(CHAT, chat("a b c"))
            await gateway.metric("sluice_queue_depth", 1)
            gateway.process.terminate()
            status, headers, body = await second.answer()
            assert status == 503
            assert json.loads(body)["error"]["code"] == "draining"
            assert headers["retry-after"]
            assert headers["connection"] == "close"
            worker.resume()
            assert (await first.answer())[0] == 200
        assert await ended(gateway) == 0


async def test_who_is_told_of_its_wait_is_told_once_that_it_is_over(tmp_path: Path) -> None:
    """The head of its answer has been sent: what would have been a status is one error event."""
    async with running(tmp_path, drain_queue_s=0.5) as (gateway, worker):
        worker.hold()
        async with connected(gateway.url) as first, connected(gateway.url) as second:
            await first.post(CHAT, chat("a b c"))
            await worker.wait_for(running=1)
            headers = {"content-type": "application/json", "x-sluice-queue-events": "1"}
            await second.post(CHAT, chat("a b c", stream=True), headers)
            await second.until(b"position=1 of=1")
            gateway.process.terminate()
            assert (await second.rest()).count(b'"draining"') == 1
            worker.resume()
            assert (await first.answer())[0] == 200
        assert await ended(gateway) == 0


async def test_a_stream_that_outlasts_the_drain_limit_is_broken_honestly(tmp_path: Path) -> None:
    async with running(tmp_path, drain_timeout_s=1) as (gateway, worker), connected(gateway.url) as wire:
        await wire.post(CHAT, chat("a b c", stream=True, x_fault="hang_after:2"))
        await wire.until(b"\r\n\r\n")
        for _ in range(2):
            await wire.until(b"\n\n")
        begun = time.monotonic()
        gateway.process.terminate()
        rest = await wire.rest()
        assert b"[DONE]" not in rest
        assert not rest.endswith(b"0\r\n\r\n")
        assert json.loads(rest[rest.index(b"data: ") + 6 : rest.rindex(b"\n\n")])["error"]["code"] == "draining"
        assert await ended(gateway) == 0
        assert time.monotonic() - begun > 0.9
        assert told(gateway) == {"draining": 1, "drain time over": 1}
        assert '"code":"draining"' in gateway.process.output.replace(" ", "")
        await worker.wait_for(open=0)


async def test_a_stream_that_is_cut_behind_its_last_event_ends_in_order(tmp_path: Path) -> None:
    """The client has all of it: what is still awaited, the end of the worker's body, is the gateway's own affair."""
    async with running(tmp_path) as (gateway, worker), connected(gateway.url) as wire:
        worker.hold()
        await wire.post(CHAT, chat("a b c", stream=True, x_fault="hang_at_end"))
        await worker.wait_for(running=1)
        gateway.process.terminate()
        await refuses(gateway)
        worker.resume()
        await wire.until(b"[DONE]\n\n\r\n")
        gateway.process.terminate()
        assert await wire.rest() == b"0\r\n\r\n"
        assert await ended(gateway) == 0
        assert '"outcome":"completed"' in gateway.process.output.replace(" ", "")
        await worker.wait_for(open=0)


async def test_an_answer_that_has_not_begun_by_the_limit_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, drain_timeout_s=0.5) as (gateway, worker), connected(gateway.url) as wire:
        worker.hold()
        await wire.post(CHAT, chat("a b c"))
        await worker.wait_for(running=1)
        gateway.process.terminate()
        status, _, body = await wire.answer()
        assert status == 503
        assert json.loads(body)["error"]["code"] == "draining"
        assert await ended(gateway) == 0
        await worker.wait_for(open=0)


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_second_signal_ends_it_at_once(tmp_path: Path, processes: int) -> None:
    """At once, and still in order: the client is told, and its slot is free before its lease ends."""
    with Valkey(tmp_path) as valkey:
        settings = {"listen": {"processes": processes}, "redis": {"url": valkey.url}}
        async with running(tmp_path, **settings) as (gateway, worker):
            worker.hold()
            async with connected(gateway.url) as wire:
                await wire.post(CHAT, chat(stream=True))
                await worker.wait_for(running=1)
                assert len(Dump(valkey.url).leases) == 1
                gateway.process.signal(signal.SIGINT)
                await refuses(gateway)
                begun = time.monotonic()
                gateway.process.signal(signal.SIGINT)
                status, _, body = await wire.answer()
                assert status == 503
                assert json.loads(body)["error"]["code"] == "draining"
                assert await ended(gateway) == 0
                assert time.monotonic() - begun < 25  # waiting requests get 30 s of a drain
                assert not Dump(valkey.url).leases
                await worker.wait_for(open=0)
