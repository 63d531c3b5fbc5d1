"""Strictness that nobody honest feels: the official clients, LangChain, and vLLM's own extra parameters."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from anthropic import AsyncAnthropic
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from app.inference import narrowed_salt
from tests.hostile.case import CHAT, COMPLETIONS
from tests.hostile.conftest import Fortress

pytestmark = pytest.mark.asyncio(loop_scope="session")

VLLM: dict[str, Any] = {
    "use_beam_search": False,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "length_penalty": 1.0,
    "stop_token_ids": [2],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 1,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": 100,
    "prompt_logprobs": 0,
    "allowed_token_ids": [1, 2, 3],
    "bad_words": ["never"],
    "echo": False,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "documents": [{"title": "t", "text": "x"}],
    "chat_template_kwargs": {"enable_thinking": False},
    "structured_outputs": {"choice": ["yes", "no"]},
    "thinking_token_budget": 100,
    "include_reasoning": True,
    "priority": 1,
    "request_id": "mine",
    "session_id": "mine",
    "cache_salt": "mine",
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "repetition_detection": {"max_pattern_size": 4},
    "stream_interval": 1,
    "watermarking": None,
}
OPENAI: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": {"17": -100, "18": 12.5},
    "logprobs": True,
    "top_logprobs": 3,
    "max_completion_tokens": 8,
    "metadata": {"trace": "x"},
    "modalities": ["text"],
    "n": 2,
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "hello"},
    "prompt_cache_key": "k",
    "reasoning_effort": "low",
    "response_format": {"type": "text"},
    "safety_identifier": "s",
    "seed": -1,
    "service_tier": "auto",
    "stop": ["\n\n", "END"],
    "store": False,
    "temperature": 1,
    "top_p": 1,
    "user": "u",
    "verbosity": "low",
}
DROPPED = {"priority", "request_id", "session_id"}
REPLACED = {"cache_salt": narrowed_salt("", "mine")}


class Weather(BaseModel):
    """The weather somewhere."""

    city: str = Field(description="where", min_length=1, max_length=200, pattern=r"^[A-Za-z ]+$")
    days: list[int] = Field(default_factory=list, max_length=14)
    unit: str = "C"


@pytest.mark.parametrize("name", sorted(VLLM))
async def test_each_of_vllms_parameters_reaches_the_worker(fortress: Fortress, name: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, name: VLLM[name]}
    answer = await fortress.gateway.http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    got = fortress.worker.requests[-1].body
    assert got.get(name) == (None if name in DROPPED else REPLACED.get(name, VLLM[name]))


async def test_every_openai_parameter_at_once(fortress: Fortress) -> None:
    async with AsyncOpenAI(base_url=f"{fortress.gateway.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], **OPENAI, extra_body={"top_k": 5}
        )
    assert len(answer.choices) == 2
    assert OPENAI.items() <= fortress.worker.requests[-1].body.items()


async def test_a_scored_prompt(fortress: Fortress) -> None:
    """What evaluation harnesses send: no new token, the prompt's own probabilities, several prompts of token ids."""
    body = {"model": "m", "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = await fortress.gateway.http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text


async def test_langchain(fortress: Fortress) -> None:
    async with httpx.AsyncClient(timeout=30) as http:
        model = ChatOpenAI(
            model="m",
            base_url=f"{fortress.gateway.url}/v1",
            api_key="none",
            temperature=0.2,
            stream_usage=True,
            http_async_client=http,
        )
        told = await model.ainvoke([SystemMessage("be brief"), HumanMessage("hi")])
        assert told.content
        parts = [part async for part in model.astream("hi")]
        assert sum(part.usage_metadata["total_tokens"] for part in parts if part.usage_metadata) > 0
        history = [
            HumanMessage("weather?"),
            AIMessage("", tool_calls=[{"name": "Weather", "args": {"city": "Rome"}, "id": "call_1"}]),
            ToolMessage("sunny", tool_call_id="call_1"),
        ]
        assert (await model.bind_tools([Weather]).ainvoke(history)) is not None
        for method in ("json_schema", "function_calling"):
            asked = model.with_structured_output(Weather, method=method, include_raw=True)
            assert (await asked.ainvoke("weather in Rome"))["raw"] is not None


async def test_an_image_that_comes_with_the_request_reaches_the_worker(fortress: Fortress) -> None:
    pixel = "data:image/gif;base64,R0lGODdhAQABAIAAAAAAAAAAACwAAAAAAQABAAACAkQBADs="
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": pixel}}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}]}
    answer = await fortress.gateway.http.post(CHAT, json=body)
    assert "is not a multimodal model" in answer.json()["error"]["message"]
    assert fortress.worker.requests[-1].body["messages"] == body["messages"]


async def test_anthropics_client(fortress: Fortress) -> None:
    """On `/v1/messages`: a text, and a stream of events."""
    asked: Any = {"role": "user", "content": "hi"}
    async with AsyncAnthropic(base_url=fortress.gateway.url, api_key="none", max_retries=0) as client:
        whole = await client.messages.create(model="m", max_tokens=5, messages=[asked], system="be brief")
        assert whole.usage.output_tokens > 0
        async with client.messages.stream(model="m", max_tokens=5, messages=[asked]) as stream:
            assert [event async for event in stream][-1].type == "message_stop"


async def test_a_schema_asked_for_as_agents_ask(fortress: Fortress) -> None:
    """Strict tools and parsed answers, as libraries for structured output make them of a pydantic model."""
    messages: Any = [{"role": "user", "content": "weather in Rome"}]
    async with AsyncOpenAI(base_url=f"{fortress.gateway.url}/v1", api_key="none", max_retries=0) as client:
        tool = pydantic_function_tool(Weather)
        chosen: Any = {"type": "function", "function": {"name": "Weather"}}
        answer = await client.chat.completions.create(model="m", messages=messages, tools=[tool], tool_choice=chosen)
        assert answer.choices[0].message.tool_calls
    sent = fortress.worker.requests[-1].body["tools"][0]["function"]
    assert sent["strict"] is True
    assert sent["parameters"]["additionalProperties"] is False
