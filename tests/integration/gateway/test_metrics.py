"""What `/metrics` says after requests whose every token is known, also when several processes counted them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import psutil
import pytest
import pytest_asyncio

from tests.fakes.reading import events
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.conftest import House
from tests.integration.gateway.running import PATIENCE_S, GatewayProcess, Scrape, model, until
from tests.integration.gateway.watching import DEADLINE_S, watching
from tests.integration.gateway.wire import Wire, connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

HISTOGRAMS = [
    "sluice_time_to_first_token_seconds",
    "sluice_queue_wait_seconds",
    "sluice_upstream_first_byte_seconds",
    "sluice_gateway_overhead_seconds",
    "sluice_inter_token_latency_seconds",
    "sluice_time_per_output_token_seconds",
    "sluice_request_duration_seconds",
]


class Difference:
    """What one model's series grew by between two readings."""

    def __init__(self, before: Scrape, after: Scrape, name: str) -> None:
        self._before = before
        self._after = after
        self._model = name

    def of(self, name: str, **labels: str) -> float:
        labels = {"model": self._model, **labels}
        return self._after.sum(name, **labels) - self._before.sum(name, **labels)

    def count(self, name: str, **labels: str) -> float:
        return self.of(f"{name}_count", **labels)


async def test_tokens_and_stages_are_counted_as_the_worker_counted_them(house: House) -> None:
    before = await house.gateway.scrape()
    prompt_tokens = completion_tokens = 0
    for number in range(6):
        body = chat("one two three", model="metered", nonce=f"n{number}", max_tokens=5)
        stream = number >= 2
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = await house.gateway.http.post(CHAT, json=body)
        usage = answer.json()["usage"] if not stream else _usage_of(answer)
        prompt_tokens += usage["prompt_tokens"]
        completion_tokens += usage["completion_tokens"]
    await house.gateway.idle()
    grown = Difference(before, await house.gateway.scrape(), "metered")
    assert grown.of("sluice_prompt_tokens_total", variant="v", band="default") == prompt_tokens
    assert grown.of("sluice_generation_tokens_total", variant="v", band="default") == completion_tokens == 30
    assert grown.of("sluice_requests_total", outcome="completed", code="", band="default", variant="v") == 6
    assert grown.count("sluice_request_duration_seconds", outcome="completed") == 6
    assert grown.count("sluice_queue_wait_seconds") == 6
    assert grown.count("sluice_gateway_overhead_seconds") == 6
    assert grown.count("sluice_upstream_first_byte_seconds") == 6
    assert grown.count("sluice_time_to_first_token_seconds") == 4  # of the streams alone is it known
    assert grown.count("sluice_inter_token_latency_seconds") == 4 * (5 - 1)
    assert grown.count("sluice_time_per_output_token_seconds") == 4


def _usage_of(answer: httpx.Response) -> dict[str, int]:
    usage: dict[str, int] = events(answer.content)[-2].json["usage"]
    return usage


async def test_usage_that_the_client_did_not_ask_for_is_counted_too(house: House) -> None:
    before = await house.gateway.scrape()
    await house.gateway.http.post(CHAT, json=chat(model="metered", nonce="n", max_tokens=7, stream=True))
    await house.gateway.idle()
    grown = Difference(before, await house.gateway.scrape(), "metered")
    assert grown.of("sluice_generation_tokens_total") == 7


async def broken_after(house: House, events: int) -> None:
    """Ask for a stream that breaks after so many events; the first carries the role, each other one token."""
    body = chat(model="metered", nonce="n", max_tokens=9, stream=True, x_fault=f"die_after:{events}")
    async with connected(house.gateway.url) as wire:
        await wire.post(CHAT, body)
        await wire.until(b"worker_lost")
    await house.gateway.idle()


@pytest.mark.parametrize(("events", "tokens"), [(1, 0), (2, 1), (5, 4)])
async def test_the_first_token_is_not_the_role_and_a_break_counts_what_was_sent(
    house: House, events: int, tokens: int
) -> None:
    before = await house.gateway.scrape()
    await broken_after(house, events)
    grown = Difference(before, await house.gateway.scrape(), "metered")
    assert grown.count("sluice_upstream_first_byte_seconds") == 1
    assert grown.count("sluice_time_to_first_token_seconds") == min(tokens, 1)
    assert grown.count("sluice_inter_token_latency_seconds") == max(tokens - 1, 0)
    assert grown.of("sluice_generation_tokens_total") == tokens


async def test_every_request_ends_in_one_outcome(house: House) -> None:
    before = await house.gateway.scrape()
    metered = house.gateway.http.post
    await metered(CHAT, json=chat(model="metered"))
    await metered(CHAT, json=chat(model="metered", x_fault="fast_500"))
    await broken_after(house, 3)
    await metered(CHAT, json=chat(model="metered", max_tokens=99_999))
    async with connected(house.gateway.url) as wire:
        await wire.post(CHAT, chat(model="metered", stream=True, x_fault="hang_after:2"))
        await wire.until(b"\n\n")
        wire.close()
    await house.gateway.idle()
    grown = Difference(before, await house.gateway.scrape(), "metered")
    ends = [("completed", ""), ("failed", "worker_lost"), ("rejected", "invalid_value"), ("cancelled", "client_gone")]
    assert [grown.of("sluice_requests_total", outcome=outcome, code=code) for outcome, code in ends] == [1, 2, 1, 1]
    assert grown.of("sluice_requests_total") == grown.count("sluice_request_duration_seconds") == 5


async def test_no_label_comes_from_a_client(house: House) -> None:
    await house.gateway.http.post(CHAT, json=chat(model="canary-7f3a"))
    await house.gateway.http.post("/v1/canary-7f3a", json={})
    answer = await house.gateway.http.get("/metrics", headers={"x-request-id": "canary-7f3a"})
    assert "canary-7f3a" not in answer.text
    scrape = Scrape(answer.text)
    assert scrape.sum("sluice_requests_total", outcome="rejected", code="model_not_found") >= 1
    names = {sample.labels["model"] for sample in scrape.samples() if "model" in sample.labels}
    assert names <= {"", "m", "metered", "narrow", "strict", "pair", "embed", "score"}


async def test_series_are_declared_as_documented(house: House) -> None:
    answer = await house.gateway.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in HISTOGRAMS:
        assert f"# TYPE {name} histogram" in answer.text
    states = Scrape(answer.text)
    for worker in house.workers:
        name = f"127.0.0.1:{worker.port}"
        assert states.sum("sluice_worker_state", worker=name) == 1
        assert states.sum("sluice_worker_state", worker=name, state="ready") == 1


# two processes


class Twins:
    """A gateway of two processes in front of one worker."""

    def __init__(self) -> None:
        self.worker = FakeWorker("m")
        self.gateway: GatewayProcess

    def processes(self) -> dict[int, set[int]]:
        """By process that listens, the clients' ports of its open connections."""
        children = psutil.Process(self.gateway.process.pid).children()
        return {child.pid: ports for child in children if (ports := _ports(child, self.gateway.port)) is not None}

    def owner(self, wire: Wire) -> int:
        """The process that serves this connection."""
        return next(pid for pid, ports in self.processes().items() if wire.port in ports)


def _ports(process: psutil.Process, port: int) -> set[int] | None:
    """The peers' ports of a process that listens on `port`; None when it does not listen."""
    try:
        peers = [peer for peer in process.net_connections("tcp") if peer.laddr.port == port]
    except psutil.Error:
        return None
    listens = any(peer.status == psutil.CONN_LISTEN for peer in peers)
    return {peer.raddr.port for peer in peers if peer.status == psutil.CONN_ESTABLISHED} if listens else None


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def twins(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Twins]:
    twins = Twins()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(twins.worker)
        gateway = GatewayProcess(tmp_path_factory.mktemp("twins"), [model("m", twins.worker)], listen={"processes": 2})
        twins.gateway = await stack.enter_async_context(gateway)
        await both_ready(twins)
        yield twins


async def both_ready(twins: Twins) -> None:
    """Wait until each process has said that the worker is ready."""

    async def are_ready() -> bool:
        return twins.gateway.process.output.count('"state": "ready"') >= 2

    await until(are_ready, "two processes ready", 60)


async def to_both(stack: AsyncExitStack, twins: Twins) -> list[Wire]:
    """One connection to each process: new ones are opened until both have taken one."""
    by_process: dict[int, Wire] = {}
    async with asyncio.timeout(PATIENCE_S):
        while len(by_process) < 2:
            wire = await stack.enter_async_context(connected(twins.gateway.url))
            await wire.post(CHAT, chat())
            await wire.answer()
            by_process.setdefault(twins.owner(wire), wire)
    await twins.gateway.idle()
    return list(by_process.values())


async def test_sums_over_two_processes_are_right_whoever_is_asked(twins: Twins) -> None:
    async with AsyncExitStack() as stack:
        wires = await to_both(stack, twins)
        before = await twins.gateway.scrape()
        for number, wire in enumerate(wires * 5):
            await wire.post(CHAT, chat(nonce=f"n{number}", max_tokens=4))
            status, _, _ = await wire.answer()
            assert status == 200
        await twins.gateway.idle()
        for _ in range(10):
            async with httpx.AsyncClient(
                base_url=twins.gateway.url, timeout=30
            ) as scraper:  # a new connection: any process
                after = Scrape((await scraper.get("/metrics")).text)
            grown = Difference(before, after, "m")
            assert grown.of("sluice_requests_total", outcome="completed") == 10
            assert grown.of("sluice_generation_tokens_total") == 40
            assert grown.count("sluice_request_duration_seconds") == 10


async def test_gauges_of_two_processes_add_up_and_return_to_zero(twins: Twins) -> None:
    async with AsyncExitStack() as stack:
        wires = await to_both(stack, twins)
        twins.worker.hold()
        for wire in wires:
            await wire.post(CHAT, chat())
        await twins.worker.wait_for(open=2)
        await twins.gateway.metric("sluice_requests_in_flight", 2)
        await twins.gateway.metric("sluice_slots_held", 2)
        assert (await twins.gateway.scrape()).sum("sluice_worker_state", state="ready") == 1
    twins.worker.resume()
    await twins.worker.wait_for(open=0)
    await twins.gateway.idle()


async def test_a_process_that_dies_takes_its_gauges_with_it(twins: Twins) -> None:
    async with AsyncExitStack() as stack:
        wires = await to_both(stack, twins)
        victim = twins.owner(wires[0])
        before = await twins.gateway.scrape()
        twins.worker.hold()
        await wires[0].post(CHAT, chat())
        await twins.worker.wait_for(open=1)
        await twins.gateway.metric("sluice_requests_in_flight", 1)
        psutil.Process(victim).kill()
        await twins.worker.wait_for(open=0)
    twins.worker.resume()

    async def is_replaced() -> bool:
        return len(twins.processes()) == 2 and victim not in twins.processes()

    await until(is_replaced, "a new process", 60)
    await twins.gateway.metric("sluice_requests_in_flight", 0)
    after = await twins.gateway.scrape()
    assert after.sum("sluice_requests_total") == before.sum("sluice_requests_total")


async def test_the_console_of_either_process_shows_what_both_did(twins: Twins) -> None:
    bad = {"model": "m", "messages": "none"}
    async with AsyncExitStack() as stack:
        wires = await to_both(stack, twins)
        for wire in wires * 2:
            await wire.post(CHAT, bad)
            assert (await wire.answer())[0] == 400
    async with httpx.AsyncClient(base_url=twins.gateway.url, timeout=30) as http:
        for _ in range(4):
            async with watching(http) as viewer, asyncio.timeout(DEADLINE_S):
                await viewer.snapshot()
                seen = await viewer.snapshot()  # the other process tells once a second
                while sum(row["count"] for row in seen["refusals"] if row["code"] == "invalid_value") != 4:
                    seen = await viewer.snapshot()
                assert seen["processes"] == 2
