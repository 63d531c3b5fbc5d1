"""What the relay promises, held against real vLLM: going on elsewhere, honest ends, and aborts that arrive.

Two workers of the dense variant in float32, where greedy decoding is the same on both, on a core each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from app.workers.vllm_metrics import parse_engine_load
from tests.contract.real_worker import RealWorker, started_worker
from tests.e2e.cut import Scissors, Wire
from tests.fakes.reading import DONE, Event, events
from tests.integration.gateway.running import GatewayProcess, Scrape, until
from tests.integration.gateway.wire import connected

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.asyncio(loop_scope="session")]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USAGE = {"include_usage": True}
QUESTION = "Tell me about rivers, mountains and the sea."
# Every emoji takes three tokens, of which the first two are no text.
EMOJI = "Say: 🙂🎉 漢字 é. Repeat it exactly."
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "characters of several tokens": (CHAT, {"messages": [{"role": "user", "content": EMOJI}], "max_tokens": 14}),
    "held back for a stop string": (
        CHAT,
        {
            "messages": [{"role": "user", "content": "Count from one to ten in words."}],
            "max_tokens": 20,
            "stop": ["never said", "\n4"],
        },
    ),
    "no limit but its own end": (CHAT, {"messages": [{"role": "user", "content": "What is the capital of France?"}]}),
    "completion": (COMPLETIONS, {"prompt": "The sea 🌊🌊 is", "max_tokens": 12, "stop": "zzzz"}),
}


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[RealWorker, RealWorker]]:
    with ExitStack() as stack:
        starting = [stack.enter_context(started_worker("m", core=core, dtype="float32")) for core in (0, 1)]
        first, second = (worker.proven() for worker in starting)
        yield first, second


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("relay")


@asynccontextmanager
async def gateway_before(directory: Path, *urls: str, resume: bool) -> AsyncIterator[GatewayProcess]:
    """A gateway with one model, `m`, that the workers at `urls` serve."""
    listed = [{"url": url, "served_model": "m", "max_concurrency": 4} for url in urls]
    models = [{"name": "m", "resume": resume, "variants": [{"name": "dense", "workers": listed}]}]
    # Streams are cut here again and again, and wires fall silent, on workers that have to stay.
    health = {"probe_interval_s": 0.2, "probe_misses": 100, "progress_timeout_s": 600}
    async with GatewayProcess(directory, models, relay={"failures_until_ejected": 100}, health=health) as gateway:

        async def all_ready() -> bool:
            return all(worker["state"] == "ready" for worker in (await gateway.workers()).values())

        await until(all_ready, "all workers ready", timeout_s=120)
        yield gateway


class Cuttable:
    """A gateway in front of two wires to one worker: what breaks on one goes on on the other."""

    def __init__(self, gateway: GatewayProcess, worker: RealWorker, scissors: Scissors) -> None:
        self.gateway = gateway
        self.worker = worker
        self.scissors = scissors


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cuttable(workers: tuple[RealWorker, RealWorker], directory: Path) -> AsyncIterator[Cuttable]:
    scissors = Scissors()
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(Wire(workers[0].port, scissors)) for _ in range(2)]
        urls = [wire.url for wire in wires]
        gateway = await stack.enter_async_context(gateway_before(directory, *urls, resume=True))
        yield Cuttable(gateway, workers[0], scissors)


async def ask(url: str, path: str, body: dict[str, Any]) -> list[Event]:
    body = {"model": "m", "temperature": 0, "stream": True, "stream_options": USAGE, **body}
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        answer = await http.post(path, json=body, headers={"x-request-id": "same"})
    assert answer.status_code == 200
    return events(answer.content)


def told(stream: list[Event]) -> dict[str, Any]:
    """What a client learns from a whole stream, less the time of day and what a cache spared."""
    assert stream[-1].data == DONE
    *chunks, usage = [event.json for event in stream[:-1]]
    assert len({(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    texts = [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]
    counts = {name: usage["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    ends = [(choice["finish_reason"], choice["stop_reason"]) for choice in choices if choice["finish_reason"]]
    return {"text": "".join(texts), "usage": counts, "ends": ends, "object": chunks[0]["object"]}


@pytest.mark.parametrize("name", BODIES)
async def test_cut_after_any_event_the_answer_is_the_same(cuttable: Cuttable, name: str) -> None:
    path, body = BODIES[name]
    whole = await ask(cuttable.worker.url, path, {**body, "return_token_ids": True})
    expected = told(whole)
    assert expected["text"]
    before = (await cuttable.gateway.scrape()).sum("sluice_resumes_total", outcome="resumed")
    first = 2 if path == CHAT else 1
    struck = 0
    for cut in range(first, len(whole) - 2):  # up to the last event before the one that finishes
        cuttable.scissors.after = cut
        assert told(await ask(cuttable.gateway.url, path, body)) == expected, f"cut after {cut} events"
        struck += not cuttable.scissors.after  # a busy worker may join events, and then has fewer of them
    cuttable.scissors.after = 0
    assert struck > len(whole) // 2
    await cuttable.gateway.metric("sluice_resumes_total", before + struck, outcome="resumed")
    assert (await cuttable.gateway.scrape()).sum("sluice_resumes_total", outcome="failed") == 0


async def running(worker: RealWorker) -> int:
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as http:
        load = parse_engine_load((await http.get("/metrics")).text)
    assert load is not None
    return load.running


def runs(worker: RealWorker, count: int) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return await running(worker) == count

    return holds


async def answered(worker: RealWorker) -> float:
    """How many requests the engine has carried to their end."""
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as http:
        scrape = Scrape((await http.get("/metrics")).text)
    return scrape.sum("vllm:request_success_total", finished_reason="length")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_engine(cuttable: Cuttable, stream: bool) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1500, "ignore_eos": True}
    before = await answered(cuttable.worker)
    async with connected(cuttable.gateway.url) as leaving:
        await leaving.post(CHAT, {**body, "stream": stream})
        await until(runs(cuttable.worker, 1), "the engine runs it")
        if stream:
            await leaving.until(b"data:")
        # From here on the gateway hears nothing of the worker: a token on a connection that nobody wants any more would
        # tell it what it has to find out by itself.
        cuttable.scissors.flows.clear()
    try:
        left = time.monotonic()
        await until(runs(cuttable.worker, 0), "the engine stopped", timeout_s=120)
        print(f"stream={stream}: num_requests_running is 0 after {time.monotonic() - left:.3f} s")
    finally:
        cuttable.scissors.flows.set()
    # Whatever time a busy machine takes: it was stopped, and did not come to the end.
    assert await answered(cuttable.worker) == before
    await cuttable.gateway.idle()


LASTING: dict[str, Any] = {
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    # Many more than a machine that stands still for seconds could let come between the ninth event and the kill.
    "max_tokens": 400,
    "stream_options": USAGE,
}


async def until_killed(gateway: GatewayProcess, workers: list[RealWorker]) -> tuple[list[Any], RealWorker]:
    """Read a stream by the official client and kill -9 the worker that serves it after eight chunks of text."""
    read: list[Any] = []
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        answer = await client.chat.completions.create(
            model="m", stream=True, extra_body={"ignore_eos": True}, **LASTING
        )
        try:
            async for chunk in answer:
                read.append(chunk)
                if len(read) == 1:
                    serving = await the_one_that_runs(workers)
                if len(read) == 9:
                    serving.process.kill()
        except openai.APIError as error:
            read.append(error)
    assert serving.process.returncode is not None
    return read, serving


async def the_one_that_runs(workers: list[RealWorker]) -> RealWorker:
    """The worker that runs a request; its metrics may tell of it after its first token has come."""
    async with asyncio.timeout(10):
        while not (serving := [worker for worker in workers if await running(worker)]):
            await asyncio.sleep(0.01)
    (only,) = serving
    return only


async def test_a_killed_worker_is_taken_over_from_token_for_token(
    workers: tuple[RealWorker, RealWorker], directory: Path
) -> None:
    """The last test but one: of the two workers one is left after it."""
    expected = told(await ask(workers[1].url, CHAT, {**LASTING, "ignore_eos": True}))
    assert expected["usage"]["completion_tokens"] == LASTING["max_tokens"]
    async with gateway_before(directory, *(worker.url for worker in workers), resume=True) as gateway:
        read, killed = await until_killed(gateway, list(workers))
        assert all(isinstance(chunk, openai.types.chat.ChatCompletionChunk) for chunk in read), read[-1]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in read if chunk.choices)
        assert text == expected["text"]
        assert read[-1].usage.completion_tokens == LASTING["max_tokens"]
        assert read[-1].usage.prompt_tokens == expected["usage"]["prompt_tokens"]
        assert len({chunk.id for chunk in read}) == 1
        await gateway.metric("sluice_resumes_total", 1, outcome="resumed")
        await gateway.metric("sluice_requests_total", 1, outcome="completed")
        (left,) = [worker for worker in workers if worker is not killed]
    async with gateway_before(directory, left.url, resume=False) as gateway:
        read, _ = await until_killed(gateway, [left])
        *chunks, error = read
        assert isinstance(error, openai.APIError)
        assert error.code == "worker_lost"
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert expected["text"].startswith("".join(texts))
        assert len(texts) >= 9
        await gateway.metric("sluice_requests_total", 1, outcome="failed", code="worker_lost")
        await gateway.idle()
