"""The whole road with a real vLLM: the quantized default model, started as `sluice up` starts it, behind a gateway."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.clients.conversations import QUESTION, Conversations, Served
from tests.contract.real_worker import RealWorker, started_worker
from tests.fakes.reading import DONE, events
from tests.integration.gateway.running import GatewayProcess, until
from tests.integration.gateway.wire import connected, dechunked

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800), pytest.mark.asyncio(loop_scope="session")]

MODEL, VARIANT = "smollm2", "w8a8"
SLOTS = 8
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def worker() -> Iterator[RealWorker]:
    """The quantized default model on vLLM's CPU build, from the prepared home. Fails when `make up` never ran."""
    with started_worker(f"{MODEL}:{VARIANT}", variant=VARIANT, max_num_seqs=SLOTS) as starting:
        yield starting.proven()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(worker: RealWorker, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    variant = {
        "name": VARIANT,
        "manifest": str(worker.checkpoint / "sluice.json"),
        "workers": [{"url": worker.url, "max_concurrency": SLOTS}],
    }
    models = [{"name": MODEL, "variants": [variant]}]
    batches = {"directory": str(tmp_path_factory.mktemp("kept"))}
    async with GatewayProcess(tmp_path_factory.mktemp("real"), models, batches=batches) as gateway:
        await gateway.ready(worker, timeout_s=120)
        yield Served(gateway, MODEL, f"{MODEL}:{VARIANT}", worker.url)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with served.client() as client:
        yield client


class TestWithRealVllm(Conversations):
    """The shared conversations."""


async def test_the_quantized_model_knows_its_capital(client: AsyncOpenAI, served: Served) -> None:
    answer = await client.chat.completions.create(model=served.model, messages=QUESTION, max_tokens=16, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")


async def test_a_batch_of_twenty_lines(client: AsyncOpenAI, served: Served) -> None:
    body = {"model": served.model, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    lines = [{"custom_id": f"q{i}", "method": "POST", "url": CHAT, "body": body} for i in range(20)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = await client.files.create(file=("questions.jsonl", data), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

    async def has_ended() -> bool:
        nonlocal batch
        batch = await client.batches.retrieve(batch.id)
        return batch.status not in ("validating", "in_progress", "finalizing")

    await until(has_ended, "the end of the batch", timeout_s=600)
    assert batch.status == "completed"
    assert batch.error_file_id is None
    assert batch.output_file_id is not None
    text = (await client.files.content(batch.output_file_id)).text
    records = [json.loads(record) for record in text.splitlines()]
    assert [record["custom_id"] for record in records] == [line["custom_id"] for line in lines]
    answers = [record["response"]["body"] for record in records]
    assert all("Paris" in answer["choices"][0]["message"]["content"] for answer in answers)
    assert batch.usage is not None
    assert batch.usage.output_tokens == sum(answer["usage"]["completion_tokens"] for answer in answers)


async def test_the_list_tells_what_the_manifest_says(client: AsyncOpenAI, served: Served) -> None:
    one = await client.models.retrieve(served.variant)
    assert one.model_extra is not None
    assert (one.model_extra["quantization"], one.model_extra["ready"]) == ("w8a8", True)
    assert "root" not in one.model_extra


async def test_a_stream_is_the_workers_own_but_for_the_hidden_usage(served: Served) -> None:
    """The same question twice, once asked of the worker itself: equal but for ids and times."""
    body = {"messages": QUESTION, "max_tokens": 16, "temperature": 0, "stream": True}
    async with httpx.AsyncClient(base_url=served.worker_url, timeout=120) as direct:
        asked = {**body, "model": served.variant, "stream_options": {"include_usage": True}}
        expected = events((await direct.post(CHAT, json=asked)).content)
    got = events((await served.gateway.http.post(CHAT, json={**body, "model": served.model}, timeout=120)).content)
    assert got[-1].data == expected[-1].data == DONE
    choices = [event.json["choices"] for event in expected[:-1]]
    assert choices[-1] == []
    assert [event.json["choices"] for event in got[:-1]] == choices[:-1]
    assert [event.json.keys() for event in got[:-2]] == [event.json.keys() for event in expected[:-3]]


async def test_more_requests_than_slots_are_all_served(client: AsyncOpenAI, served: Served) -> None:
    async def ask(number: int) -> str | None:
        answer = await client.chat.completions.create(
            model=served.model,
            messages=[{"role": "user", "content": f"Count from {number}"}],
            max_tokens=8,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage
        assert answer.usage.completion_tokens == 8
        return answer.choices[0].message.content

    answers = await asyncio.gather(*(ask(number) for number in range(2 * SLOTS)))
    assert all(answers)
    await served.released()


async def test_tokens_are_counted_as_vllm_counted_them(client: AsyncOpenAI, served: Served) -> None:
    before = await served.gateway.scrape()
    stream = await client.chat.completions.create(
        model=served.model, messages=QUESTION, max_tokens=6, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        pass
    await served.gateway.idle()
    after = await served.gateway.scrape()
    name = "sluice_generation_tokens_total"
    assert after.sum(name, model=MODEL, variant=VARIANT) - before.sum(name, model=MODEL, variant=VARIANT) == 6
    first = "sluice_time_to_first_token_seconds_count"
    assert after.sum(first) - before.sum(first) == 1


async def test_a_gateway_that_is_stopped_finishes_its_stream(
    worker: RealWorker, tmp_path: Path, served: Served
) -> None:
    variant = {"name": VARIANT, "workers": [{"url": worker.url}]}
    async with GatewayProcess(tmp_path, [{"name": MODEL, "variants": [variant]}]) as gateway:
        await gateway.ready(worker, timeout_s=120)
        async with connected(gateway.url) as wire:
            body = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "stream": True, "ignore_eos": True}
            await wire.post(CHAT, body)
            await wire.until(b"\r\n\r\n")
            gateway.process.terminate()
            content, in_order = dechunked(await wire.rest(timeout_s=60))
            assert in_order
            assert events(content)[-1].data == DONE
        assert await asyncio.to_thread(gateway.process.wait) == 0
    await served.released()


async def test_a_dead_engine_is_left(worker: RealWorker, served: Served) -> None:
    """Last, because it ends the worker: killed in the middle of a stream, which is told, and never ready again."""
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 600, "stream": True, "ignore_eos": True}
    failed = (await served.gateway.scrape()).sum("sluice_requests_total", outcome="failed")
    async with connected(served.gateway.url) as wire:
        await wire.post(CHAT, body, {"content-type": "application/json", "connection": "close"})
        await wire.until(b'"content":" ')
        for child in psutil.Process(worker.process.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)
        assert b'"error"' in await wire.rest(timeout_s=60)
    await served.gateway.metric("sluice_requests_total", failed + 1, outcome="failed")

    async def is_left() -> bool:
        return await served.gateway.state_of(worker) != "ready"

    await until(is_left, "the worker is left", 60)
    refused = await served.gateway.http.post(CHAT, json={"model": MODEL, "messages": QUESTION})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_healthy_worker")
