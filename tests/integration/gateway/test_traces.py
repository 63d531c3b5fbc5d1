"""One trace for each request, at a collector that decodes it, and what a worker and the log are told of it."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.fakes.reading import DONE, events
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.collector import Collector, Span, Trace
from tests.integration.gateway.running import GatewayProcess, model, start_gateway, until
from tests.integration.gateway.wire import JSON, connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROUNDING_NS = 10
THEIR_TRACE, THEIR_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
THEIRS = {"traceparent": f"00-{THEIR_TRACE}-{THEIR_SPAN}-01", "tracestate": "a=b"}
NAMED = "x-client-request-id"


class House:
    """A traced gateway: `m` has one worker, `narrow` one with a single slot, `pair` two, and `steady` two whose streams
    are resumed. The tenant `limited` has one request a minute.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self.worker = FakeWorker("m")
        self.narrow = FakeWorker("narrow")
        self.pair = (FakeWorker("pair"), FakeWorker("pair"))
        self.steady = (FakeWorker("steady"), FakeWorker("steady"))
        self.gateway: GatewayProcess

    @property
    def workers(self) -> tuple[FakeWorker, ...]:
        return (self.worker, self.narrow, *self.pair, *self.steady)

    @property
    def models(self) -> list[dict[str, Any]]:
        return [
            model("m", self.worker),
            model("narrow", self.narrow, max_concurrency=1),
            model("pair", *self.pair),
            {**model("steady", *self.steady), "resume": True},
        ]

    async def ask(self, *, name: str = "", timeout_ms: int = 0, **fields: Any) -> httpx.Response:
        headers = {NAMED: name} if name else {}
        headers |= {"x-sluice-timeout-ms": str(timeout_ms)} if timeout_ms else {}
        return await self.gateway.http.post(CHAT, json=chat(**fields), headers=headers)

    async def trace_of(self, answer: httpx.Response) -> Trace:
        return await self.collector.trace(answer.headers["x-request-id"])

    async def line(self, name: str) -> dict[str, Any]:
        """The log's line of the request that its client calls so."""
        found = await asyncio.to_thread(self.gateway.process.wait_for_line, f'"client_request_id": "{name}"')
        line: dict[str, Any] = json.loads(found)
        return line


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def _shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    directory = tmp_path_factory.mktemp("traces")
    (directory / "headers").write_text("x-scope: tests\n\nauthorization: Bearer of-the-collector\n")
    async with AsyncExitStack() as stack:
        house = House(await stack.enter_async_context(Collector()))
        for worker in house.workers:
            await stack.enter_async_context(worker)
        house.gateway = await stack.enter_async_context(
            GatewayProcess(
                directory,
                house.models,
                tracing={
                    "endpoint": house.collector.url,
                    "export_interval_s": 0.05,
                    "headers_file": str(directory / "headers"),
                },
                admission={"trust_tenant_header": True, "no_worker_timeout_s": 0.3},
                relay={"failures_until_ejected": 100},
                tenants=[{"name": "limited", "limits": {"requests_per_min": 1}}],
                batches={"directory": str(directory / "batches"), "tick_s": 0.05},
            )
        )
        yield house


@pytest_asyncio.fixture(loop_scope="session")
async def house(_shared: House) -> AsyncIterator[House]:
    await _shared.gateway.ready(*_shared.workers)
    yield _shared
    for worker in _shared.workers:
        worker.heal()
        worker.resume()
    await _shared.gateway.idle()


def add_up(whole: Span, parts: list[Span]) -> None:
    """The parts are the whole, without a gap between them."""
    assert parts[0].began_ns == pytest.approx(whole.began_ns, abs=ROUNDING_NS)
    assert parts[-1].ended_ns == pytest.approx(whole.ended_ns, abs=ROUNDING_NS)
    for part, following in pairwise(parts):
        assert part.ended_ns == pytest.approx(following.began_ns, abs=ROUNDING_NS)
    assert all(part.took_ns >= 0 for part in parts)


def names(spans: list[Span]) -> list[str]:
    return [span.name for span in spans]


def sent_to(worker: FakeWorker) -> tuple[str, str, str]:
    """Trace, span and flags that the latest request brought to a worker."""
    version, *fields = worker.requests[-1].headers["traceparent"].split("-")
    assert version == "00"
    trace_id, span_id, flags = fields
    return trace_id, span_id, flags


async def test_a_stream_is_a_trace_whose_stages_add_up(house: House) -> None:
    before_ns = time.time_ns()
    answer = await house.ask(stream=True, max_tokens=5, stream_options={"include_usage": True})
    after_ns = time.time_ns()
    assert answer.status_code == 200, answer.text
    usage = [event for event in events(answer.content) if event.data != DONE][-1].json["usage"]
    trace = await house.trace_of(answer)
    server, attempt = trace.server, trace.one("attempt")
    assert names(trace.stages) == ["receive", "route", "queue", "attempt"]
    assert names(trace.below(attempt)) == ["first byte", "stream"]
    add_up(server, trace.stages)
    add_up(attempt, trace.below(attempt))
    assert before_ns <= server.began_ns <= server.ended_ns <= after_ns + 1e9
    assert (server.name, attempt.kind, server.parent_id, server.links) == ("chat m", "client", "", ())
    assert (
        server.facts.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "m",
            "gen_ai.request.max_tokens": 5,
            "gen_ai.request.stream": True,
            "gen_ai.response.model": "m:v",
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "http.response.status_code": 200,
            "sluice.outcome": "completed",
            "sluice.tenant": "anonymous",
        }.items()
    )
    (first_token,) = server.events
    ttft_s = server.facts["gen_ai.latency.time_to_first_token"]
    assert first_token.at_ns - server.began_ns == pytest.approx(ttft_s * 1e9, abs=ROUNDING_NS)
    assert server.facts["gen_ai.response.time_to_first_chunk"] <= ttft_s <= server.took_ns / 1e9
    assert attempt.facts["sluice.worker"] == f"127.0.0.1:{house.worker.port}"
    assert not any(span.failed for span in trace.spans)
    assert house.collector.headers["authorization"] == "Bearer of-the-collector"


async def test_a_workers_spans_join_at_the_attempt(house: House) -> None:
    answer = await house.ask()
    trace = await house.trace_of(answer)
    assert sent_to(house.worker) == (trace.server.trace_id, trace.one("attempt").span_id, "01")
    assert "tracestate" not in house.worker.requests[-1].headers
    assert names(trace.below(trace.one("attempt"))) == ["first byte"]


async def test_a_wait_is_the_queue_stage(house: House) -> None:
    house.narrow.hold()
    first = asyncio.create_task(house.ask(model="narrow"))
    await house.narrow.wait_for(open=1)
    waiting = asyncio.create_task(house.ask(model="narrow"))
    await house.gateway.metric("sluice_queue_depth", 1)
    house.narrow.resume()
    await first
    trace = await house.trace_of(await waiting)
    waited_s = trace.server.facts["gen_ai.latency.time_in_queue"]
    assert trace.one("queue").took_ns / 1e9 == pytest.approx(waited_s, rel=0.5, abs=0.01)
    assert waited_s > 0
    add_up(trace.server, trace.stages)


async def taker(house: House, workers: tuple[FakeWorker, ...], **fields: Any) -> FakeWorker:
    """Which of them is sent this: the one that has the prompt in its cache, once one has."""
    seen = [worker.counts.seen for worker in workers]
    assert (await house.ask(**fields)).status_code == 200
    (took,) = [worker for worker, before in zip(workers, seen, strict=True) if worker.counts.seen > before]
    return took


async def test_a_redispatch_is_two_attempts_and_an_event(house: House) -> None:
    text = "one prompt for the same worker " * 20
    first = await taker(house, house.pair, content=text, model="pair")
    first.inject("fast_500", times=1)
    trace = await house.trace_of(await house.ask(content=text, model="pair"))
    assert names(trace.stages) == ["receive", "route", "queue", "attempt", "queue", "attempt"]
    add_up(trace.server, trace.stages)
    failed, second = (span for span in trace.stages if span.name == "attempt")
    assert failed.failed
    assert failed.facts["http.request.resend_count"] == 0
    assert second.facts["http.request.resend_count"] == 1
    assert failed.facts["sluice.worker"] != second.facts["sluice.worker"]
    assert [event.name for event in trace.server.events] == ["sluice.redispatch"]
    assert trace.server.events[0].facts == {"sluice.fault": failed.facts["error.type"]}


async def test_a_resume_is_an_event_and_another_attempt(house: House) -> None:
    asked: dict[str, Any] = {"content": " ".join(["word"] * 60), "model": "steady", "stream": True, "temperature": 0}
    worker = await taker(house, house.steady, **asked)
    worker.inject("die_after:6", times=1)
    answer = await house.ask(**asked)
    trace = await house.trace_of(answer)
    assert names(trace.stages) == ["receive", "route", "queue", "attempt", "queue", "attempt"]
    add_up(trace.server, trace.stages)
    first, second = (span for span in trace.stages if span.name == "attempt")
    assert (first.failed, first.facts["error.type"]) == (True, "worker_lost")
    told = [event for event in trace.server.events if event.name != "sluice.first_token"]
    assert [event.name for event in told] == ["sluice.stream_broken", "sluice.resume"]
    assert told[0].facts == {"sluice.code": "worker_lost"}
    told_workers = [worker.requests[-1].headers["traceparent"] for worker in house.steady]
    assert {span.span_id for span in (first, second)} == {value.split("-")[2] for value in told_workers}


async def refused_unread(house: House, name: str) -> None:
    content = {"content-type": "application/json", NAMED: name}
    assert (await house.gateway.http.post(CHAT, content=b'{"model"', headers=content)).status_code == 400


async def unknown(house: House, name: str) -> None:
    assert (await house.ask(name=name, model="nobody-knows-it")).status_code == 404


async def worker_refuses(house: House, name: str) -> None:
    assert (await house.ask(name=name, logprobs=True, top_logprobs=10_000)).status_code == 400


async def served(house: House, name: str) -> None:
    assert (await house.ask(name=name)).status_code == 200


async def limited(house: House, name: str) -> None:
    headers = {NAMED: name, "x-sluice-tenant": "limited"}
    while True:  # until the first of a minute has been had
        answer = await house.gateway.http.post(CHAT, json=chat(), headers={**headers, NAMED: f"{name}-not"})
        if answer.status_code == 429:
            break
    assert (await house.gateway.http.post(CHAT, json=chat(), headers=headers)).status_code == 429


async def queue_timeout(house: House, name: str) -> None:
    house.narrow.hold()
    first = asyncio.create_task(house.ask(model="narrow"))
    await house.narrow.wait_for(open=1)
    assert (await house.ask(name=name, model="narrow", timeout_ms=300)).status_code == 503
    house.narrow.resume()
    await first


async def worker_lost(house: House, name: str) -> None:
    assert (await house.ask(name=name, x_fault="die_before_byte")).status_code >= 500


async def broken_stream(house: House, name: str) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await house.ask(name=name, stream=True, x_fault="die_after:2")


async def client_leaves(house: House, name: str) -> None:
    body = chat(x_fault="hang_before")
    async with connected(house.gateway.url) as wire:
        await wire.post(CHAT, body, {**JSON, NAMED: name})
        await house.worker.wait_for(open=1)


ENDS: dict[str, tuple[Callable[[House, str], Any], str, set[str], bool]] = {
    "served": (served, "completed", {""}, False),
    "unreadable": (refused_unread, "rejected", {"invalid_json"}, False),
    "unknown model": (unknown, "rejected", {"model_not_found"}, False),
    "refused by the worker": (worker_refuses, "rejected", {"invalid_value", "worker_refused"}, False),
    "limited": (limited, "rejected", {"rate_limit_exceeded"}, False),
    "waited too long": (queue_timeout, "expired", {"queue_timeout"}, True),
    "worker lost": (worker_lost, "rejected failed", {"worker_lost", "no_healthy_worker"}, True),
    "stream broken": (broken_stream, "failed", {"worker_lost"}, True),
    "client gone": (client_leaves, "cancelled", {"client_gone"}, False),
}


@pytest.mark.parametrize("end", ENDS)
async def test_log_line_metric_and_span_agree(house: House, end: str) -> None:
    happen, outcomes, codes, is_failure = ENDS[end]
    name = f"named-{secrets.token_hex(8)}"
    await happen(house, name)
    line = await house.line(name)
    span = await house.collector.server_span(line["request_id"])
    assert line["outcome"] in outcomes.split()
    assert line["code"] in codes
    assert (span.facts["sluice.outcome"], span.facts.get("sluice.code", "")) == (line["outcome"], line["code"])
    assert span.trace_id == line["trace_id"]
    assert span.took_ns / 1e9 == pytest.approx(line["duration_s"], abs=1e-6)
    assert span.failed == is_failure
    assert span.facts.get("error.type", "") == (line["code"] if is_failure else "")
    add_up(span, house.collector.of(span.trace_id).stages)

    async def is_counted() -> bool:
        lines = [json.loads(text) for text in house.gateway.process.output.splitlines() if '"request"' in text]
        alike = sum(
            (other["outcome"], other["code"], other["model"]) == (line["outcome"], line["code"], line["model"])
            for other in lines
            if other["event"] == "request"
        )
        labels = {name: line[name] for name in ("outcome", "code", "model")}
        return (await house.gateway.scrape()).sum("sluice_requests_total", **labels) == alike

    await until(is_counted, "as many requests counted as logged")


async def test_a_strangers_trace_is_linked_to(house: House) -> None:
    answer = await house.gateway.http.post(CHAT, json=chat(), headers=THEIRS)
    trace = await house.trace_of(answer)
    assert trace.server.trace_id != THEIR_TRACE
    assert trace.server.links == ((THEIR_TRACE, THEIR_SPAN),)
    assert sent_to(house.worker)[0] == trace.server.trace_id
    assert "tracestate" not in house.worker.requests[-1].headers


async def test_each_line_of_a_batch_is_a_trace_that_links_to_the_batch(house: House) -> None:
    lines = b"".join(
        json.dumps({"custom_id": f"{at}", "method": "POST", "url": CHAT, "body": chat()}).encode() + b"\n"
        for at in range(3)
    )
    http = house.gateway.http
    file = await http.post("/v1/files", files={"file": ("in.jsonl", lines)}, data={"purpose": "batch"})
    asked = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
    batch_id = (await http.post("/v1/batches", json=asked)).json()["id"]

    def found() -> list[Span]:
        return [span for span in house.collector.spans if span.facts.get("sluice.batch_id") == batch_id]

    await house.collector.wait_for(lambda: len(found()) == 3, timeout_s=60)
    assert len({span.trace_id for span in found()}) == 3
    assert len({span.links for span in found()}) == 1
    assert all(len(span.links) == 1 and span.facts["sluice.band"] == "batch" for span in found())


@pytest.mark.parametrize(("flags", "is_recorded"), [("01", True), ("00", False)])
async def test_a_trusted_clients_trace_is_continued(tmp_path: Path, flags: str, is_recorded: bool) -> None:
    async with Collector() as collector, FakeWorker("m") as worker:
        tracing = {"endpoint": collector.url, "export_interval_s": 0.05, "trust_clients": True, "sample_ratio": 1}
        async with GatewayProcess(tmp_path, [model("m", worker)], tracing=tracing) as gateway:
            await gateway.ready(worker)
            given = {**THEIRS, "traceparent": f"00-{THEIR_TRACE}-{THEIR_SPAN}-{flags}"}
            theirs = await gateway.http.post(CHAT, json=chat(), headers=given)
            assert worker.requests[-1].headers["tracestate"] == "a=b"
            assert sent_to(worker)[0::2] == (THEIR_TRACE, flags)
            ours = await collector.trace((await gateway.http.post(CHAT, json=chat())).headers["x-request-id"])
        if is_recorded:
            trace = await collector.trace(theirs.headers["x-request-id"])
            assert (trace.server.trace_id, trace.server.parent_id) == (THEIR_TRACE, THEIR_SPAN)
            assert {span.state for span in trace.spans} == {"a=b"}
        assert ours.server.parent_id == ""
        assert bool(collector.of(THEIR_TRACE).spans) == is_recorded


async def test_what_is_not_sampled_says_so_and_is_not_exported(tmp_path: Path) -> None:
    async with Collector() as collector, FakeWorker("m") as worker:
        tracing = {"endpoint": collector.url, "export_interval_s": 0.05, "sample_ratio": 0}
        async with GatewayProcess(tmp_path, [model("m", worker)], tracing=tracing) as gateway:
            await gateway.ready(worker)
            await gateway.http.post(CHAT, json=chat(), headers=THEIRS)
            trace_id, _, flags = sent_to(worker)
            assert (trace_id != THEIR_TRACE, flags) == (True, "00")
        assert collector.exports == 0


@pytest.mark.parametrize("collector", [Collector(is_deaf=True), Collector(status=503), Collector(status=400), None])
async def test_a_collector_that_fails_disturbs_nobody(tmp_path: Path, collector: Collector | None) -> None:
    """Requests are answered, the process ends in time, and with success."""
    async with AsyncExitStack() as stack:
        url = "http://127.0.0.1:9/v1/traces"  # nobody listens there
        if collector is not None:
            url = (await stack.enter_async_context(collector)).url
        worker = await stack.enter_async_context(FakeWorker("m"))
        tracing = {"endpoint": url, "export_interval_s": 0.05, "flush_timeout_s": 0.5, "queue_spans": 512}
        async with GatewayProcess(tmp_path, [model("m", worker)], tracing=tracing) as gateway:
            await gateway.ready(worker)
            for _ in range(120):  # more spans than the queue holds
                assert (await gateway.http.post(CHAT, json=chat())).status_code == 200
            if collector is not None:
                failing = collector
                await failing.wait_for(lambda: failing.exports > 0)
            await gateway.idle()
            began = time.monotonic()
            gateway.process.terminate()
            assert await asyncio.to_thread(gateway.process.wait) == 0
            assert time.monotonic() - began < 30


async def test_spans_are_flushed_at_the_end(tmp_path: Path) -> None:
    async with Collector() as collector, FakeWorker("m") as worker:
        tracing = {"endpoint": collector.url, "export_interval_s": 60, "flush_timeout_s": 20}
        async with GatewayProcess(tmp_path, [model("m", worker)], tracing=tracing) as gateway:
            await gateway.ready(worker)
            answer = await gateway.http.post(CHAT, json=chat())
            assert collector.exports == 0
            gateway.process.terminate()
            assert (await collector.trace(answer.headers["x-request-id"])).server.facts["sluice.outcome"] == "completed"
            assert await asyncio.to_thread(gateway.process.wait) == 0


async def test_wrong_settings_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("no header at all")
    config = tmp_path / "gateway.yaml"
    config.write_text(f"listen: {{port: 0}}\ntracing: {{headers_file: {tmp_path / 'headers'}}}\n")
    process = start_gateway("--config", str(config))
    try:
        assert await asyncio.to_thread(process.wait, 60) == 2
    finally:
        process.kill()
    assert [line for line in process.output.splitlines() if line.startswith("error: ")] == [
        f"error: {tmp_path / 'headers'}: expected lines `name: value`"
    ]
