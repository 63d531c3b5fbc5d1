"""The official `openai` Python client against the gateway with a fake worker, and how it reads the gateway's errors."""

from __future__ import annotations

import json
import time

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import SecretStr

from tests.clients.conversations import QUESTION, WEATHER, Conversations, Served
from tests.fakes.worker import FakeWorker

pytestmark = pytest.mark.asyncio(loop_scope="session")

COUNTING: list[ChatCompletionMessageParam] = [{"role": "user", "content": "one two three"}]


class TestWithTheFakeWorker(Conversations):
    """The shared conversations."""


async def test_an_answer_word_by_word(client: AsyncOpenAI, served: Served) -> None:
    stream = await client.chat.completions.create(model=served.model, messages=COUNTING, stream=True)
    words = [chunk.choices[0].delta.content async for chunk in stream]
    assert words == ["", "one", " two", " three", None]


async def test_tool_arguments_obey_their_schema(client: AsyncOpenAI, served: Served) -> None:
    async with client.chat.completions.stream(
        model=served.model, messages=QUESTION, tools=[WEATHER], tool_choice="required"
    ) as stream:
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.tool_calls
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}


async def test_a_broken_stream_raises(client: AsyncOpenAI, served: Served) -> None:
    stream = await client.chat.completions.create(
        model=served.model, messages=COUNTING, stream=True, extra_body={"x_fault": "die_after:3"}
    )
    got: list[str | None] = []

    async def read() -> None:
        async for chunk in stream:
            got.append(chunk.choices[0].delta.content)  # noqa: PERF401 - what came before the break is wanted

    with pytest.raises(openai.APIError) as caught:
        await read()
    assert got == ["", "one", " two"]
    assert (caught.value.code, caught.value.type) == ("worker_lost", "server_error")


async def test_a_broken_answer_raises(client: AsyncOpenAI, served: Served) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(
            model=served.model, messages=COUNTING, extra_body={"x_fault": "die_before_byte"}
        )
    assert (caught.value.status_code, caught.value.code) == (503, "no_healthy_worker")


async def test_a_full_worker_is_tried_again_after_the_time_that_the_gateway_names(
    fake: FakeWorker, served: Served
) -> None:
    fake.inject("429:1", times=2)  # the gateway's own two attempts
    begun = time.monotonic()
    async with served.client(max_retries=1) as patient:
        answer = await patient.chat.completions.create(model=served.model, messages=COUNTING)
    assert answer.choices[0].message.content == "one two three"
    assert time.monotonic() - begun >= 1  # the client's own would be half of that


async def test_what_must_not_be_tried_again_is_not(fake: FakeWorker, served: Served) -> None:
    seen = fake.counts.seen
    async with served.client(max_retries=3) as patient:
        with pytest.raises(openai.BadRequestError):
            await patient.chat.completions.create(
                model=served.model, messages=COUNTING, extra_body={"chat_template": "{{ 7 * 7 }}"}
            )
    assert fake.counts.seen == seen


async def test_embeddings(client: AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model="embed", input=["one", "two"])
    assert [entry.index for entry in answer.data] == [0, 1]
    assert all(isinstance(number, float) for number in answer.data[0].embedding)


async def test_a_wrong_key_is_an_authentication_error(served: Served) -> None:
    async with served.client(api_key="sk-wrong") as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            await stranger.chat.completions.create(model=served.model, messages=COUNTING)
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")


async def test_langchain_with_a_key(served: Served) -> None:
    async with httpx.AsyncClient(timeout=30) as http:
        model = ChatOpenAI(
            model=served.model, base_url=served.url, api_key=SecretStr(served.key), http_async_client=http
        )
        assert (await model.ainvoke("one two three")).content == "one two three"
        assert "".join([str(part.content) async for part in model.astream("one two three")]) == "one two three"
