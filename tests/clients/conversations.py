"""What an official client must be able to do through the gateway, whatever worker answers: fake or real vLLM.

`test_*` modules subclass `Conversations` beside fixtures `served` and `client`, so both kinds pass the same assertions.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, AsyncStream, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.integration.gateway.running import GatewayProcess, Scrape, until

# Far less than what a test asks a worker to generate, far more than a busy machine stalls.
WITHIN_S = 20.0
PATIENCE_S = 60.0
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# Half a minute of tokens on any worker: vLLM does not know `x_timing`, and takes its own time.
LONG: dict[str, Any] = {"ignore_eos": True, "x_timing": {"decode_s": 0.05}}
LONG_TOKENS = 600


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway that serves `model`, of which `variant` is a pinned form, by the worker at `worker_url`.

    It asks for `key`, unless that is `none`.
    """

    gateway: GatewayProcess
    model: str
    variant: str
    worker_url: str
    key: str = "none"

    @property
    def url(self) -> str:
        return f"{self.gateway.url}/v1"

    def client(self, **options: Any) -> AsyncOpenAI:
        given = {"base_url": self.url, "api_key": self.key, "max_retries": 0, "timeout": 60.0, **options}
        return AsyncOpenAI(**given)

    async def running(self) -> float:
        """Requests that the worker's engine runs, by its own count."""
        async with httpx.AsyncClient(base_url=self.worker_url, timeout=PATIENCE_S) as worker:
            return Scrape((await worker.get("/metrics")).text).sum("vllm:num_requests_running")

    async def busy(self) -> None:
        """Wait until the worker runs a request."""

        async def is_busy() -> bool:
            return await self.running() > 0

        await until(is_busy, "the worker runs a request", PATIENCE_S)

    async def released(self) -> None:
        """Soon the worker runs nothing, every slot is free and no request is in flight."""

        async def is_free() -> bool:
            return await self.running() == 0

        await until(is_free, "the worker runs nothing", WITHIN_S)
        await self.gateway.idle(WITHIN_S)


class Conversations:
    """Chat, streams, tools, errors and departures, as seen by the official Python client."""

    async def test_chat(self, client: AsyncOpenAI, served: Served) -> None:
        answer = await client.chat.completions.create(
            model=served.model, messages=QUESTION, max_tokens=16, temperature=0
        )
        assert answer.object == "chat.completion"
        assert answer._request_id
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage
        assert 0 < answer.usage.completion_tokens <= 16
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    async def test_a_variant_can_be_pinned(self, client: AsyncOpenAI, served: Served) -> None:
        raw = await client.chat.completions.with_raw_response.create(
            model=served.variant, messages=QUESTION, max_tokens=2
        )
        assert raw.headers["x-sluice-model"] == served.model
        assert f"{served.model}:{raw.headers['x-sluice-variant']}" == served.variant
        assert raw.headers["x-request-id"] == raw.parse()._request_id

    async def test_stream(self, client: AsyncOpenAI, served: Served) -> None:
        whole = await client.chat.completions.create(
            model=served.model, messages=QUESTION, max_tokens=16, temperature=0
        )
        stream = await client.chat.completions.create(
            model=served.model, messages=QUESTION, max_tokens=16, temperature=0, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert content == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert all(chunk.usage is None for chunk in chunks)
        assert len({chunk.id for chunk in chunks}) == 1

    async def test_stream_with_usage(self, client: AsyncOpenAI, served: Served) -> None:
        stream = await client.chat.completions.create(
            model=served.model,
            messages=QUESTION,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = [chunk async for chunk in stream]
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == []
        assert last.usage
        assert 0 < last.usage.completion_tokens <= 8

    async def test_completion(self, client: AsyncOpenAI, served: Served) -> None:
        answer = await client.completions.create(model=served.model, prompt="The capital of France is", max_tokens=5)
        assert answer.object == "text_completion"
        stream = await client.completions.create(
            model=served.model, prompt="The capital of France is", max_tokens=5, stream=True
        )
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason in ("stop", "length")

    @pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "weather"}}, "required"])
    async def test_tools(self, client: AsyncOpenAI, served: Served, choice: Any) -> None:
        answer = await client.chat.completions.create(
            model=served.model, messages=QUESTION, tools=[WEATHER], tool_choice=choice, max_tokens=128, temperature=0
        )
        assert answer.choices[0].message.tool_calls
        (call,) = answer.choices[0].message.tool_calls
        assert call.type == "function"
        assert call.function.name == "weather"
        assert call.function.arguments

    async def test_logprobs(self, client: AsyncOpenAI, served: Served) -> None:
        answer = await client.chat.completions.create(
            model=served.model, messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0
        )
        assert answer.choices[0].logprobs
        entries = answer.choices[0].logprobs.content
        assert entries
        assert answer.usage
        assert len(entries) == answer.usage.completion_tokens
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in entries)

    async def test_extra_fields_of_vllm_arrive(self, client: AsyncOpenAI, served: Served) -> None:
        answer = await client.chat.completions.create(
            model=served.model, messages=QUESTION, max_tokens=5, extra_body={"ignore_eos": True, "min_tokens": 5}
        )
        assert answer.usage
        assert answer.usage.completion_tokens == 5

    async def test_structured_output(self, client: AsyncOpenAI, served: Served) -> None:
        answer = await client.chat.completions.create(
            model=served.model, messages=QUESTION, max_tokens=32, response_format={"type": "json_object"}
        )
        assert (answer.choices[0].message.content or "").lstrip().startswith("{")

    async def test_a_wrong_model(self, client: AsyncOpenAI) -> None:
        for stream in (False, True):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(model="nobody", messages=QUESTION, stream=stream)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            assert caught.value.type == "invalid_request_error"
            assert caught.value.request_id

    async def test_a_prompt_that_is_too_long(self, client: AsyncOpenAI, served: Served) -> None:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(
                    model=served.model, messages=[{"role": "user", "content": "word " * 4000}], stream=stream
                )
            assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")

    async def test_a_refused_value(self, client: AsyncOpenAI, served: Served) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=served.model, messages=QUESTION, temperature=-1)
        assert (caught.value.code, caught.value.param) == ("invalid_value", "temperature")

    async def test_a_timeout_frees_the_worker(self, served: Served) -> None:
        async with served.client(timeout=0.5) as hasty:
            with pytest.raises(openai.APITimeoutError):
                await hasty.chat.completions.create(
                    model=served.model, messages=QUESTION, max_tokens=LONG_TOKENS, extra_body=LONG
                )
        await served.released()

    async def test_a_stream_that_is_closed_frees_the_worker(self, client: AsyncOpenAI, served: Served) -> None:
        stream = await client.chat.completions.create(
            model=served.model, messages=QUESTION, max_tokens=LONG_TOKENS, stream=True, extra_body=LONG
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        await served.released()

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_cancelled_request_frees_the_worker(
        self, client: AsyncOpenAI, served: Served, stream: bool
    ) -> None:
        async def ask() -> None:
            answer = await client.chat.completions.create(
                model=served.model, messages=QUESTION, max_tokens=LONG_TOKENS, stream=stream, extra_body=LONG
            )
            if isinstance(answer, AsyncStream):
                async for _ in answer:
                    pass

        asking = asyncio.create_task(ask())
        await served.busy()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await served.released()

    async def test_models(self, client: AsyncOpenAI, served: Served) -> None:
        listed = {entry.id: entry for entry in (await client.models.list()).data}
        assert {served.model, served.variant} <= set(listed)
        one = await client.models.retrieve(served.variant)
        assert (one.id, one.object) == (served.variant, "model")
        assert one.model_extra is not None
        assert one.model_extra["max_model_len"] == 2048
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nobody")

    async def test_responses(self, client: AsyncOpenAI, served: Served) -> None:
        answer = await client.responses.create(model=served.model, input="Say hi", max_output_tokens=8)
        assert answer.object == "response"
        assert answer.usage
        stream = await client.responses.create(model=served.model, input="Say hi", max_output_tokens=8, stream=True)
        kinds = [event.type async for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] in ("response.completed", "response.incomplete")
        assert "response.output_text.delta" in kinds

    async def test_messages(self, served: Served) -> None:
        body = {"model": served.model, "messages": QUESTION, "max_tokens": 8}
        answer = (await served.gateway.http.post("/v1/messages", json=body)).json()
        assert (answer["type"], answer["role"]) == ("message", "assistant")
        assert answer["usage"]["output_tokens"] > 0
        stream = await served.gateway.http.post("/v1/messages", json={**body, "stream": True})
        assert "event: message_stop" in stream.text

    async def test_tokenize(self, served: Served) -> None:
        tokens = (await served.gateway.http.post("/tokenize", json={"model": served.model, "prompt": "one two"})).json()
        assert tokens["count"] == len(tokens["tokens"]) > 0
        body = {"model": served.model, "tokens": tokens["tokens"]}
        assert (await served.gateway.http.post("/detokenize", json=body)).json()["prompt"].endswith("one two")

    async def test_embeddings_of_a_model_that_has_none(self, client: AsyncOpenAI, served: Served) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.embeddings.create(model=served.model, input="text")
        assert caught.value.code == "not_found"
        assert served.model in caught.value.message

    async def test_the_synchronous_client(self, served: Served) -> None:
        def ask() -> str:
            with OpenAI(base_url=served.url, api_key=served.key, max_retries=0) as client:
                stream = client.chat.completions.create(
                    model=served.model, messages=QUESTION, max_tokens=4, stream=True
                )
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        assert await asyncio.to_thread(ask)
