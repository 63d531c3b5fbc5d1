"""The fake worker beside real vLLM: the same question to both, the same structure of answer, the same refusal."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.contract.structure import structure
from tests.fakes.reading import DONE, events

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
USAGE = {"include_usage": True}
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}
RANDOM = {"n": 2, "temperature": 1}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}

CHATS: list[dict[str, Any]] = [
    {},
    {"stream_options": None},
    {"n": None, "stop": None, "temperature": None},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 21},
    {"return_token_ids": True},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": NAMED, "max_tokens": 5},
    {"tools": [TOOL], "tool_choice": "required", "max_tokens": 80, "ignore_eos": False},
    {"tools": "x"},
    {"stop": []},
    {"stop": 5},
    {"max_tokens": 1},
    {"max_tokens": 2.0},
    {"max_tokens": "2"},
    {"max_tokens": 2047, "ignore_eos": False},
    {"min_tokens": 2},
    {"user": "a", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "seed": 1, "frequency_penalty": 0.5},
    {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4", "tool_call_id": "a"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"content": "a"}]},
    {"messages": ["x"]},
    {"messages": None},
    {"model": ""},
    {"model": 5},
    {"temperature": 3},
    {"temperature": True},
    {"top_k": -5},
    {"n": 100_000},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "nope"}},
    {"prompt_logprobs": 1},
    {"cache_salt": "abc"},
    {"cache_salt": ""},
    {"chat_template": "x"},
    {"priority": 3},
]
PROMPTS: list[dict[str, Any]] = [
    {},
    {"echo": True},
    {"logprobs": 0},
    {"logprobs": 1},
    {"logprobs": 1, "echo": True},
    {"logprobs": 21},
    {"prompt": [5, 6]},
    {"prompt": [5, 6], "return_token_ids": True},
    {"prompt": ""},
    {"prompt": []},
    {"prompt": 5},
    {"max_tokens": 0},
    {"max_tokens": None},
    {"suffix": "x"},
    {"stop": ["\x01"]},
]


CHAT_BASE = {"model": "m", "temperature": 0, "ignore_eos": True, "max_tokens": 4}
CHAT_BASE |= {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
PROMPT_BASE = {"model": "m", "prompt": "one two three", "temperature": 0, "ignore_eos": True, "max_tokens": 3}
RESPONSE_BASE = {"model": "m", "input": "one two three four five six", "max_output_tokens": 3, "temperature": 0}

CASES = [(CHAT, CHAT_BASE, fields, stream) for fields in CHATS for stream in (False, True)]
CASES += [(CHAT, CHAT_BASE, {"stream_options": options}, True) for options in (USAGE, CONTINUOUS, {}, 5)]
CASES += [(COMPLETIONS, PROMPT_BASE, fields, stream) for fields in PROMPTS for stream in (False, True)]
CASES += [(COMPLETIONS, PROMPT_BASE, {"stream_options": options}, True) for options in (USAGE, CONTINUOUS)]
# Streamed, the choices of one request come in no fixed order.
CASES += [(COMPLETIONS, PROMPT_BASE, {"prompt": [[5, 6], [7]], "return_token_ids": True}, False)]
CASES += [(CHAT, CHAT_BASE, RANDOM, False), (COMPLETIONS, PROMPT_BASE, {**RANDOM, "prompt": ["a", "b"]}, False)]
CASES += [
    ("/v1/responses", RESPONSE_BASE, fields, stream)
    for fields in ({}, {"instructions": "be brief"}, {"metadata": {"a": "b"}}, {"temperature": -1}, {"model": "x"})
    for stream in (False, True)
]
CASES += [
    ("/v1/messages", CHAT_BASE, fields, stream)
    for fields in ({}, {"system": "be brief"}, {"max_tokens": 0}, {"max_tokens": 5000}, {"model": "x"})
    for stream in (False, True)
]


def seen(answer: httpx.Response) -> Any:
    """What must be equal: status, and the refusal or the structure of the answer."""
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        found = [
            (event.name, event.data if event.data == DONE else known(event.json)) for event in events(answer.content)
        ]
        return [answer.status_code, *(now for before, now in zip([None, *found], found, strict=False) if now != before)]
    return [answer.status_code, known(answer.json())]


def known(body: Any) -> Any:
    """A refusal as it is, but for the list of alternatives that pydantic tried; an answer's structure."""
    error = body.get("error") if isinstance(body, dict) else None
    if error is None:
        return structure(body)
    many = "validation error" in error["message"]
    return {**error, "message": "validation"} if many else error


def name(case: tuple[str, dict[str, Any], dict[str, Any], bool]) -> str:
    path, _, fields, stream = case
    return f"{path}{'-stream' if stream else ''}-{fields}"


@pytest.mark.parametrize(("path", "base", "fields", "stream"), CASES, ids=map(name, CASES))
def test_both_answer_alike(
    fake_url: str, vllm_url: str, path: str, base: dict[str, Any], fields: dict[str, Any], stream: bool
) -> None:
    body = {**base, **fields, "stream": stream}
    ours, theirs = (httpx.post(f"{url}{path}", json=body, timeout=60) for url in (fake_url, vllm_url))
    assert seen(ours) == seen(theirs)
