"""What the gateway relies on in a worker, held by the fake and by real vLLM alike: structure, never wording of answers.

`x_timing` slows the fake down where a test needs requests that last; vLLM ignores it, as every unknown field.
An event of a stream holds a token, or all those that a busy vLLM has made since the last one: no test counts events.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from itertools import groupby, pairwise
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.inference import InferenceRequest, Route, cache_salt
from app.relay.dialect import usage_of_answer
from app.relay.passage import Passage, Way
from tests.contract.structure import runs, structure
from tests.fakes.reading import DONE, events

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SSE = "text/event-stream; charset=utf-8"
LASTING = {"max_tokens": 1500, "ignore_eos": True, "x_timing": {"decode_s": 0.02}}
LEFT_WITHIN_S = 15.0
"""Half of what they would last."""
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
USAGE = [("prompt_tokens", "int"), ("total_tokens", "int"), ("completion_tokens", "int")]
DETAILS = ("prompt_tokens_details", [("cached_tokens", "int"), ("created_cache_tokens", "int")])
CHUNK = ["id", "object", "created", "model", "choices"]


def chat(**fields: Any) -> dict[str, Any]:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    return {"model": "m", "messages": question, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}


def counts_up(counts: list[int], first: int, last: int) -> bool:
    """Whether they grow from `first` to `last`."""
    return (counts[0], counts[-1]) == (first, last) and all(a < b for a, b in pairwise(counts))


async def payloads(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a stream but its `[DONE]`, which must be the last."""
    answer = await client.post(path, json={**body, "stream": True})
    assert (answer.status_code, answer.headers["content-type"]) == (200, SSE)
    assert answer.headers["transfer-encoding"] == "chunked"
    *rest, last = events(answer.content)
    assert last.data == DONE
    return [event.json for event in rest]


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """Every sample of /metrics by name, summed over labels."""
    page = (await client.get("/metrics")).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


async def ended(client: httpx.AsyncClient) -> float:
    """How many answers came to their end, be it a limit or their own."""
    families = {family.name: family for family in text_string_to_metric_families((await client.get("/metrics")).text)}
    finished = families["vllm:request_success"].samples
    return sum(sample.value for sample in finished if sample.labels["finished_reason"] in ("stop", "length"))


async def metric_reaches(client: httpx.AsyncClient, within_s: float = 60.0, **expected: float) -> None:
    """Ask /metrics until the gauges have these values; there is no event to await behind HTTP. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while True:
            now = await gauges(client)
            if all(now[f"vllm:{name}"] == value for name, value in expected.items()):
                return
            await asyncio.sleep(0.02)


@pytest.fixture
async def idle_client(client: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a worker that runs nothing before and after."""
    await metric_reaches(client, num_requests_running=0, num_requests_waiting=0)
    yield client
    await metric_reaches(client, num_requests_running=0, num_requests_waiting=0)


# control routes


@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_health_is_an_empty_200(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == "0"


async def test_models_name_the_served_model(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v1/models")).json()
    assert list(answer) == ["object", "data"]
    (card,) = answer["data"]
    assert list(card) == ["id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"]
    assert (card["id"], card["max_model_len"], card["parent"]) == ("m", 2048, None)


async def test_version_and_load(client: httpx.AsyncClient) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", (await client.get("/version")).json()["version"])
    assert structure((await client.get("/load")).json()) == [("server_load", "int")]


@pytest.mark.parametrize(
    ("method", "path", "status", "phrase"),
    [
        ("GET", "/nosuch", 404, "Not Found"),
        ("POST", "/v1/embeddings", 404, "Not Found"),
        ("POST", "/v1/rerank", 404, "Not Found"),
        ("GET", CHAT, 405, "Method Not Allowed"),
        ("POST", "/health", 405, "Method Not Allowed"),
    ],
)
async def test_unknown_routes_and_methods(
    client: httpx.AsyncClient, method: str, path: str, status: int, phrase: str
) -> None:
    answer = await client.request(method, path, json={"model": "m", "input": "x"})
    assert (answer.status_code, answer.json()) == (status, {"detail": phrase})
    assert ("allow" in answer.headers) == (status == 405)


# plain chat


async def test_chat_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=chat())
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["server"] == "uvicorn"
    assert int(answer.headers["content-length"]) == len(answer.content)
    body = answer.json()
    nulls = [
        "prompt_logprobs",
        "prompt_token_ids",
        "prompt_text",
        "kv_transfer_params",
        "ec_transfer_params",
        "metrics",
    ]
    assert list(body) == [*CHUNK, "service_tier", "system_fingerprint", "usage", *nulls]
    assert {body[name] for name in nulls} == {None}
    (choice,) = body["choices"]
    kept = ["index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids", "routed_experts"]
    assert list(choice) == kept
    fields = ["role", "content", "refusal", "annotations", "audio", "function_call", "reasoning"]
    assert list(choice["message"]) == fields
    assert (choice["finish_reason"], body["usage"]["completion_tokens"]) == ("length", 6)
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    assert body["id"].startswith("chatcmpl-")


async def test_usage_tells_cached_tokens_of_a_repeated_prompt(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=chat())
    usage = (await client.post(CHAT, json=chat())).json()["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    # Whole blocks of 32 tokens; the template alone makes the prompt longer than one.
    assert cached > 0
    assert cached % 32 == 0
    assert usage["completion_tokens_details"] is None


@pytest.mark.parametrize("route", [Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES])
async def test_tenants_share_no_cache(client: httpx.AsyncClient, route: Route) -> None:
    asked = f"What is the question that only the tenants of {route.name} ask? " * 8
    prompts: dict[Route, dict[str, Any]] = {
        Route.COMPLETIONS: {"prompt": asked},
        Route.RESPONSES: {"input": asked, "max_output_tokens": 1},
    }
    body: dict[str, Any] = {
        "model": "any",
        "max_tokens": 1,
        **prompts.get(route, {"messages": [{"role": "user", "content": asked}]}),
    }

    async def cached(tenant: str) -> int:
        request = InferenceRequest.parse(json.dumps(body).encode(), request_id="r", route=route, arrived=0.0)
        # A tenant of this route alone: what templates write before the question is the same on several routes.
        request.cache_salt = cache_salt(b"secret", f"{tenant} {route}")
        answer = await client.post(route, content=request.body_for("m"), headers={"content-type": "application/json"})
        usage = usage_of_answer(answer.raise_for_status().content)
        assert usage is not None
        return usage.cached_tokens

    found = [await cached(tenant) for tenant in ("one", "one", "two", "three", "two")]
    assert (found[0], found[2], found[3]) == (0, 0, 0)
    assert 0 < found[1] == found[4]


async def test_a_given_request_id_names_the_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=chat(), headers={"x-request-id": "our-id-1"})
    assert answer.json()["id"] == "chatcmpl-our-id-1"
    assert "x-request-id" not in answer.headers


@pytest.mark.parametrize(
    "fields",
    [
        {"frobnicate": 1, "nonce": "abc"},
        {"priority": -5},
        {"model": None},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"max_tokens": None, "max_completion_tokens": 6},
    ],
)
async def test_accepted_without_complaint(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    body = {name: value for name, value in chat(**fields).items() if value is not None}
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 6


# streams


async def test_stream_begins_with_a_role_and_ends_with_a_reason(client: httpx.AsyncClient) -> None:
    first, *rest = await payloads(client, CHAT, chat())
    assert list(first) == [*CHUNK, "prompt_token_ids", "prompt_text"]
    role = {"role": "assistant", "content": ""}
    assert first["choices"] == [{"index": 0, "delta": role, "logprobs": None, "finish_reason": None}]
    assert runs(chunk["choices"][0] for chunk in rest) == [
        [
            ("index", "int"),
            ("delta", [("content", "str")]),
            ("logprobs", "NoneType"),
            ("finish_reason", "NoneType"),
            ("token_ids", "NoneType"),
        ],
        [
            ("index", "int"),
            ("delta", [("content", "str")]),
            ("logprobs", "NoneType"),
            ("finish_reason", "str"),
            ("stop_reason", "any"),
            ("token_ids", "NoneType"),
        ],
    ]
    *others, last = rest
    assert all(list(chunk) == CHUNK for chunk in others)
    assert list(last) == [*CHUNK, "system_fingerprint"]
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in rest} == {
        (first["id"], "chat.completion.chunk", "m")
    }


async def test_a_stream_that_ends_by_itself_has_an_empty_last_delta(client: httpx.AsyncClient) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}}
    *_, last = await payloads(client, CHAT, chat(response_format=wanted, max_tokens=60, ignore_eos=False))
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")


async def test_include_usage_adds_one_chunk_without_choices(client: httpx.AsyncClient) -> None:
    *rest, last = await payloads(client, CHAT, chat(stream_options={"include_usage": True}))
    assert structure(last) == [
        *structure(dict.fromkeys(["id", "object"], "")),
        ("created", "int"),
        ("model", "str"),
        ("choices", []),
        ("usage", [*USAGE, DETAILS]),
        ("system_fingerprint", "str"),
    ]
    assert last["usage"]["completion_tokens"] == 6
    assert not any("usage" in chunk or "system_fingerprint" in chunk for chunk in rest)
    plain = (await client.post(CHAT, json=chat())).json()
    assert last["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


async def test_continuous_usage_counts_up(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *rest, last = await payloads(client, CHAT, chat(stream_options=options))
    assert counts_up([chunk["usage"]["completion_tokens"] for chunk in rest], 0, 6)
    assert runs(chunk["usage"] for chunk in rest) == [[*USAGE, ("completion_tokens_details", "NoneType")]]
    assert last["choices"] == []


async def test_chunks_of_text_differ_in_nothing_else(worker_url: str) -> None:
    """Each event in a chunk of its own, and alike but for its text: what `relay.passage` saves its work by."""
    chunks = await raw_chunks(worker_url, chat(max_tokens=40, stream=True))
    passed: list[bytes] = []
    way = Way(passed.append, lambda now: None, lambda error: None, lambda: 0.0)
    alike = next(found for _, content in chunks if (found := Passage.like(content, way)))
    assert [chunk for chunk, _ in chunks if alike.take(chunk)] == passed
    assert len(passed) >= 5  # not those with escapes, nor the one that finishes


async def raw_chunks(url: str, body: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """An answer's chunks as they are on the wire, each with its content."""
    content, address = json.dumps(body).encode(), httpx.URL(url)
    head = b"POST %b HTTP/1.1\r\nhost: m\r\nconnection: close\r\ncontent-type: application/json\r\n" % CHAT.encode()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(head + b"content-length: %d\r\n\r\n%b" % (len(content), content))
    async with asyncio.timeout(60):
        _, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    chunks = []
    while rest:
        size = rest.partition(b"\r\n")[0]
        end = len(size) + 2 + int(size, 16) + 2
        chunks.append((rest[:end], rest[len(size) + 2 : end - 2]))
        rest = rest[end:]
    return chunks


async def test_two_choices_stream_side_by_side(client: httpx.AsyncClient) -> None:
    body = chat(n=2, temperature=1.0, stream_options={"include_usage": True})
    first, second, *rest, last = await payloads(client, CHAT, body)
    assert [chunk["choices"][0]["delta"].get("role") for chunk in (first, second)] == ["assistant", "assistant"]
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in rest if chunk["choices"][0]["index"] == index]
        *others, last_of_its = own
        assert {choice["finish_reason"] for choice in others} == {None}
        assert last_of_its["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 12


async def test_two_choices_plain(client: httpx.AsyncClient) -> None:
    answer = (await client.post(CHAT, json=chat(n=2, temperature=1.0))).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_is_cut_off_and_named(client: httpx.AsyncClient, stream: bool) -> None:
    only = {"structured_outputs": {"choice": ["alpha omega"]}, "stop": ["omega"], "max_tokens": 30, "ignore_eos": False}
    if stream:
        parts = [chunk["choices"][0] for chunk in await payloads(client, CHAT, chat(**only))]
        text, last = "".join(part["delta"].get("content", "") for part in parts), parts[-1]
    else:
        last = (await client.post(CHAT, json=chat(**only))).json()["choices"][0]
        text = last["message"]["content"]
    assert (text, last["finish_reason"], last["stop_reason"]) == ("alpha ", "stop", "omega")


async def test_json_schema_binds_the_answer(client: httpx.AsyncClient) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}}
    answer = (await client.post(CHAT, json=chat(response_format=wanted, max_tokens=60, ignore_eos=False))).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"city": "Paris"}


async def test_a_stream_sends_its_headers_before_its_first_token(idle_client: httpx.AsyncClient) -> None:
    """So an open status line says nothing about the engine: the first event does."""
    slow = chat(x_timing={"prefill_s": 0.5})
    slow["messages"] = [{"role": "user", "content": " ".join(map(str, range(300)))}]
    async with asyncio.timeout(30), idle_client.stream("POST", CHAT, json={**slow, "stream": True}) as answer:
        assert answer.status_code == 200
        before = await gauges(idle_client)
        await anext(answer.aiter_bytes())
        assert before["vllm:generation_tokens_total"] < (await gauges(idle_client))["vllm:generation_tokens_total"]


# tools and log probabilities


@pytest.mark.parametrize(("choice", "reason"), [(NAMED, "stop"), ("required", "tool_calls")])
async def test_a_forced_tool_call(client: httpx.AsyncClient, choice: Any, reason: str) -> None:
    body = chat(tools=[WEATHER], tool_choice=choice, max_tokens=100, ignore_eos=False)
    (answer,) = (await client.post(CHAT, json=body)).json()["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert structure(call) == [
        ("id", "str"),
        ("type", "str"),
        ("function", [("name", "str"), ("arguments", "str")]),
    ]
    assert (call["function"]["name"], answer["message"]["content"], answer["finish_reason"]) == (
        "get_weather",
        "",
        reason,
    )
    json.loads(call["function"]["arguments"])


@pytest.mark.parametrize(("choice", "reason"), [(NAMED, "stop"), ("required", "tool_calls")])
async def test_a_streamed_tool_call_has_its_name_first(client: httpx.AsyncClient, choice: Any, reason: str) -> None:
    body = chat(tools=[WEATHER], tool_choice=choice, max_tokens=100, ignore_eos=False)
    _, named, *rest, last = await payloads(client, CHAT, body)
    (call,) = named["choices"][0]["delta"]["tool_calls"]
    assert list(call) == ["id", "type", "index", "function"]
    assert call["function"] == {"name": "get_weather"}
    assert named["choices"][0]["delta"]["content"] is None
    parts = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in rest]
    assert runs(parts) == [[("index", "int"), ("function", [("arguments", "str")])]]
    json.loads("".join(part["function"]["arguments"] for part in parts))
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, reason)


@pytest.mark.parametrize("top", [0, 2])
async def test_chat_logprobs(client: httpx.AsyncClient, top: int) -> None:
    body = chat(logprobs=True, top_logprobs=top)
    (choice,) = (await client.post(CHAT, json=body)).json()["choices"]
    content = choice["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [top] * 6
    assert runs(content)[0][:3] == [("token", "str"), ("logprob", "float"), ("bytes", ["int"])]
    streamed = [chunk["choices"][0] for chunk in (await payloads(client, CHAT, body))[1:]]
    assert all(list(part["logprobs"]) == ["content"] for part in streamed)
    assert sum(len(part["logprobs"]["content"]) for part in streamed) == 6


async def test_completion_logprobs(client: httpx.AsyncClient) -> None:
    body = {"model": "m", "prompt": "The capital of France is", "max_tokens": 3, "logprobs": 2, "ignore_eos": True}
    (choice,) = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    assert list(choice["logprobs"]) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    assert {len(part) for part in choice["logprobs"].values()} == {3}
    # The chosen token comes on top of the two best when it is not among them.
    assert all(2 <= len(alternatives) <= 3 for alternatives in choice["logprobs"]["top_logprobs"])


# completions and tokens


async def test_completion_stream(client: httpx.AsyncClient) -> None:
    body = {"model": "m", "prompt": "one two three", "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    chunks = await payloads(client, COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    kept = ["index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"]
    assert all(list(chunk["choices"][0]) == kept for chunk in chunks[:-1])
    *others, last = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert (set(others), last) == ({None}, "length")
    assert structure(chunks[-1]["usage"]) == [*USAGE, ("prompt_tokens_details", [("cached_tokens", "int")])]
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert chunks[0]["id"].startswith("cmpl-")


async def test_tokens_are_counted_alike_everywhere(client: httpx.AsyncClient) -> None:
    prompt = "one two three four"
    counted = (await client.post("/tokenize", json={"model": "m", "prompt": prompt})).json()
    assert list(counted) == ["count", "max_model_len", "tokens", "token_strs"]
    assert (counted["count"], counted["max_model_len"]) == (len(counted["tokens"]), 2048)
    back = await client.post("/detokenize", json={"model": "m", "tokens": counted["tokens"]})
    assert back.json() == {"prompt": prompt}
    for given in (prompt, counted["tokens"]):
        body = {"model": "m", "prompt": given, "max_tokens": 2, "return_token_ids": True, "ignore_eos": True}
        answer = (await client.post(COMPLETIONS, json=body)).json()
        assert answer["usage"]["prompt_tokens"] == counted["count"]
        assert answer["choices"][0]["prompt_token_ids"] == counted["tokens"]
        assert len(answer["choices"][0]["token_ids"]) == 2


async def test_the_template_is_counted(client: httpx.AsyncClient) -> None:
    body = chat(return_token_ids=True)
    counted = (await client.post("/tokenize", json={"model": "m", "messages": body["messages"]})).json()
    answer = (await client.post(CHAT, json=body)).json()
    assert answer["usage"]["prompt_tokens"] == counted["count"]
    assert answer["prompt_token_ids"] == counted["tokens"]
    first, *rest = await payloads(client, CHAT, body)
    assert first["prompt_token_ids"] == counted["tokens"]
    assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in rest) == 6


async def test_several_prompts_are_choices_in_order(client: httpx.AsyncClient) -> None:
    body = {"model": "m", "prompt": ["a b", "c d e"], "n": 2, "max_tokens": 2, "ignore_eos": True}
    answer = (await client.post(COMPLETIONS, json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 8


# errors

LONG = [{"role": "user", "content": "hello world " * 3000}]
ERRORS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "no-such-model"}, 404, "NotFoundError", "model"),
    ({"messages": LONG}, 400, "BadRequestError", "input_tokens"),
    ({"max_tokens": 0}, 400, "BadRequestError", "max_tokens"),
    ({"max_tokens": 5000}, 400, "BadRequestError", "max_tokens"),
    ({"min_tokens": 50}, 400, "BadRequestError", None),
    ({"n": 0}, 400, "BadRequestError", None),
    ({"n": 2}, 400, "BadRequestError", None),
    ({"n": 1.5}, 400, "Bad Request", "body.n"),
    ({"temperature": -1}, 400, "BadRequestError", "temperature"),
    ({"temperature": "hot"}, 400, "Bad Request", "body.temperature"),
    ({"top_p": 0}, 400, "BadRequestError", "top_p"),
    ({"presence_penalty": 3}, 400, "BadRequestError", None),
    ({"seed": "a"}, 400, "Bad Request", "body.seed"),
    ({"stop": [""]}, 400, "BadRequestError", None),
    ({"messages": []}, 400, "BadRequestError", None),
    ({"messages": "hi"}, 400, "Bad Request", "body.messages"),
    ({"top_logprobs": 2}, 400, "BadRequestError", "top_logprobs"),
    ({"tools": []}, 400, "BadRequestError", "tools"),
    ({"tool_choice": "required"}, 400, "BadRequestError", "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "BadRequestError",
     "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, 400, "BadRequestError", "response_format"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "status", "kind", "param"), ERRORS)
async def test_a_refused_request_is_json_even_for_a_stream(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, kind: str, param: str | None, stream: bool
) -> None:
    answer = await client.post(CHAT, json=chat(**fields) | {"stream": stream})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["type"], error["param"], error["code"]) == (kind, param, status)


async def test_stream_options_need_a_stream(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=chat(stream_options={"include_usage": True}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream_options")


LATE: list[tuple[dict[str, Any], str | None]] = [
    ({"logprobs": True, "top_logprobs": 50}, "logprobs"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}}, None),
]


@pytest.mark.parametrize(("fields", "param"), LATE)
async def test_what_only_the_engine_refuses_is_an_event_of_a_stream(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str | None
) -> None:
    plain = await client.post(CHAT, json=chat(**fields))
    assert plain.status_code == 400
    (event,) = await payloads(client, CHAT, chat(**fields))
    assert event == plain.json()
    assert (event["error"]["type"], event["error"]["param"]) == ("BadRequestError", param)


@pytest.mark.parametrize(
    ("raw", "param"),
    [(b"", "body"), (b'{"model":"m",', "body.13"), (b"[1]", "body"), (b'{"model":"m"}', "body.messages")],
)
async def test_a_body_that_is_not_a_request(client: httpx.AsyncClient, raw: bytes, param: str) -> None:
    answer = await client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (400, "Bad Request", param, 400)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/messages", "/v1/responses", "/tokenize"])
@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {}])
async def test_only_json_is_taken(client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> None:
    answer = await client.post(path, content=json.dumps(chat()), headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (400, "Bad Request", None, 400)
    typed = await client.post(
        CHAT, content=json.dumps(chat()), headers={"content-type": "application/json; charset=utf-8"}
    )
    assert typed.status_code == 200


# the other dialects


async def test_responses(client: httpx.AsyncClient) -> None:
    body = {"model": "m", "input": "hi there", "max_output_tokens": 4, "temperature": 0}
    answer = (await client.post("/v1/responses", json=body)).json()
    assert answer["object"] == "response"
    assert list(answer["usage"]) == [
        "input_tokens",
        "input_tokens_details",
        "output_tokens",
        "output_tokens_details",
        "total_tokens",
    ]
    stream = events((await client.post("/v1/responses", json={**body, "stream": True})).content)
    assert [event.name for event in stream if event.name != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.json["sequence_number"] for event in stream] == list(range(len(stream)))
    assert structure(stream[-1].json["response"]) == structure(answer)


async def test_messages(client: httpx.AsyncClient) -> None:
    body = {**chat(), "max_tokens": 4}
    answer = (await client.post("/v1/messages", json=body)).json()
    assert list(answer) == ["id", "type", "role", "content", "model", "stop_reason", "usage"]
    assert answer["usage"]["output_tokens"] == 4
    stream = events((await client.post("/v1/messages", json={**body, "stream": True})).content)
    start, block = ["message_start", "content_block_start"], ["content_block_stop", "message_delta", "message_stop"]
    names = [event.name for event in stream]
    assert [name for name, _ in groupby(names)] == [*start, "content_block_delta", *block]
    assert [structure(event.json) for event in (stream[0], stream[1], stream[2], stream[-2])] == [
        [
            ("type", "str"),
            (
                "message",
                [
                    *[(name, "str") for name in ("id", "type", "role")],
                    ("content", []),
                    ("model", "str"),
                    ("stop_reason", "any"),
                    ("stop_sequence", "NoneType"),
                    ("usage", [("input_tokens", "int"), ("output_tokens", "int")]),
                ],
            ),
        ],
        [("type", "str"), ("content_block", [("type", "str"), ("text", "str")]), ("index", "int")],
        [("type", "str"), ("delta", [("type", "str"), ("text", "str")]), ("index", "int")],
        [
            ("type", "str"),
            ("delta", [("stop_reason", "any"), ("stop_sequence", "NoneType")]),
            ("usage", structure(answer["usage"])),
        ],
    ]


async def test_messages_have_errors_of_their_own_shape(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/messages", json={**chat(), "model": "no-such-model"})
    assert answer.status_code == 404
    assert structure(answer.json()) == [("type", "str"), ("error", [("type", "str"), ("message", "str")])]
    short = await client.post("/v1/messages", json={"model": "m", "messages": [{"role": "user", "content": "a"}]})
    assert short.json()["error"]["param"] == "body.max_tokens"


# load and leaving


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_slot(idle_client: httpx.AsyncClient, stream: bool) -> None:
    before = await ended(idle_client)
    async with httpx.AsyncClient(base_url=idle_client.base_url, timeout=60) as leaving:
        asking = asyncio.create_task(leaving.post(CHAT, json=chat(**LASTING) | {"stream": stream}))
        await metric_reaches(idle_client, num_requests_running=1)
        asking.cancel()
        await metric_reaches(idle_client, LEFT_WITHIN_S, num_requests_running=0)
    assert await ended(idle_client) == before


async def test_more_than_the_slots_wait_inside_the_engine(idle_client: httpx.AsyncClient) -> None:
    before = await ended(idle_client)
    async with httpx.AsyncClient(base_url=idle_client.base_url, timeout=60) as many:
        asking = [asyncio.create_task(many.post(CHAT, json=chat(**LASTING))) for _ in range(11)]
        await metric_reaches(idle_client, num_requests_running=8, num_requests_waiting=3)
        for task in asking:
            task.cancel()
        await metric_reaches(idle_client, LEFT_WITHIN_S, num_requests_running=0, num_requests_waiting=0)
    assert await ended(idle_client) == before


async def test_metrics_that_the_gateway_reads(idle_client: httpx.AsyncClient) -> None:
    page = await idle_client.get("/metrics")
    assert page.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    kinds = {
        "num_requests_running": "gauge",
        "num_requests_waiting": "gauge",
        "kv_cache_usage_perc": "gauge",
        "prefix_cache_queries": "counter",
        "prefix_cache_hits": "counter",
        "num_preemptions": "counter",
        "prompt_tokens": "counter",
        "generation_tokens": "counter",
        "request_success": "counter",
        "time_to_first_token_seconds": "histogram",
        "request_queue_time_seconds": "histogram",
        "cache_config_info": "gauge",
    }
    assert {name: families[f"vllm:{name}"].type for name in kinds} == kinds
    assert families["vllm:num_requests_running"].samples[0].labels == {"engine": "0", "model_name": "m"}
    cache = families["vllm:cache_config_info"].samples[0].labels
    assert int(cache["block_size"]) > 0
    assert int(cache["num_gpu_blocks"]) > 0


async def test_metrics_count_tokens(idle_client: httpx.AsyncClient) -> None:
    before = await gauges(idle_client)
    usage = (await idle_client.post(CHAT, json=chat())).json()["usage"]
    await metric_reaches(
        idle_client,
        prompt_tokens_total=before["vllm:prompt_tokens_total"] + usage["prompt_tokens"],
        generation_tokens_total=before["vllm:generation_tokens_total"] + usage["completion_tokens"],
        prefix_cache_queries_total=before["vllm:prefix_cache_queries_total"] + usage["prompt_tokens"],
        time_to_first_token_seconds_count=before["vllm:time_to_first_token_seconds_count"] + 1,
        request_success_total=before["vllm:request_success_total"] + 1,
    )


async def test_a_connection_is_kept_after_answers_of_every_kind(worker_url: str) -> None:
    limits = httpx.Limits(max_connections=1)
    ports = []
    async with httpx.AsyncClient(base_url=worker_url, timeout=60, limits=limits) as client:
        for body in (chat(), chat(model="x"), chat(stream=True), chat()):
            async with client.stream("POST", CHAT, json=body) as answer:
                ports.append(answer.extensions["network_stream"].get_extra_info("client_addr"))
                await answer.aread()
    assert len(set(ports)) == 1
