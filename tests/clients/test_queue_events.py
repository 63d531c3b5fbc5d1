"""Clients that ask for queue events and know nothing of them skip the comments, and raise an error after the head."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from pydantic import SecretStr

from tests.clients.conversations import QUESTION, Served
from tests.clients.test_openai_node import script as script
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model
from tests.integration.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

EVENTS = {"x-sluice-queue-events": "1"}
ANSWER = "What is the capital of France?"


@asynccontextmanager
async def queued(served: Served, narrow: FakeWorker) -> AsyncIterator[None]:
    """The slot is taken; it is given back once another waiting stream, which asked after ours, has heard of its place.

    Then ours, whoever asked, has heard too.
    """
    gateway = served.gateway
    await gateway.idle()
    narrow.hold()
    holder = asyncio.create_task(gateway.http.post(CHAT, json=chat(model="narrow")))
    await narrow.wait_for(open=1)

    async def let_go() -> None:
        await gateway.metric("sluice_queue_depth", 1, timeout_s=30)
        async with connected(gateway.url) as after:
            headers = {"content-type": "application/json", "authorization": f"Bearer {served.key}", **EVENTS}
            await after.post(CHAT, chat(model="narrow", stream=True), headers)
            await after.until(b" of=2 ")  # which of the two is first, their lengths decide
            narrow.resume()
            await after.until(b"[DONE]")

    letting = asyncio.create_task(let_go())
    try:
        yield
        await letting
    finally:
        narrow.resume()
        letting.cancel()
        await asyncio.gather(holder, letting, return_exceptions=True)


async def test_the_python_client(client: AsyncOpenAI, served: Served, narrow: FakeWorker) -> None:
    async with queued(served, narrow):
        stream = await client.chat.completions.create(
            model="narrow", messages=QUESTION, stream=True, extra_headers=EVENTS
        )
        assert "x-sluice-queue-ms" not in stream.response.headers  # the head was sent before that was known
        words = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(words) == ANSWER


async def test_langchain(served: Served, narrow: FakeWorker) -> None:
    bare = httpx.AsyncClient(timeout=30)
    async with bare, queued(served, narrow):
        chain = ChatOpenAI(
            model="narrow",
            base_url=served.url,
            api_key=SecretStr(served.key),
            default_headers=EVENTS,
            max_retries=0,
            http_async_client=bare,
        )
        words = [str(chunk.content) async for chunk in chain.astream(QUESTION[0]["content"])]  # type: ignore[arg-type]
    assert "".join(words) == ANSWER


async def test_the_node_client(script: Path, served: Served, narrow: FakeWorker) -> None:
    async with queued(served, narrow):
        process = await asyncio.create_subprocess_exec(
            *("node", script.name, served.url, "narrow", "queued"),
            cwd=script.parent,
            env={**os.environ, "OPENAI_API_KEY": served.key},
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await asyncio.wait_for(process.communicate(), 60)
    told = json.loads(printed)
    assert told["content"] == ANSWER
    assert told["comments"] >= 2


async def test_a_wait_in_vain_is_raised(tmp_path: Path) -> None:
    async with FakeWorker("narrow") as worker:
        patience = {"queue_timeout_s": 2}
        models = [model("narrow", worker, max_concurrency=1)]
        async with GatewayProcess(tmp_path, models, admission=patience) as gateway:
            await gateway.ready(worker)
            worker.hold()
            holder = asyncio.create_task(gateway.http.post(CHAT, json=chat(model="narrow")))
            await worker.wait_for(open=1)
            served = Served(gateway, "narrow", "narrow:v", worker.url)
            async with served.client() as client:
                stream = await client.chat.completions.create(
                    model="narrow", messages=QUESTION, stream=True, extra_headers=EVENTS
                )
                with pytest.raises(openai.APIError) as caught:
                    await anext(aiter(stream))
            assert caught.value.code == "queue_timeout"
            worker.resume()
            await holder
