"""What the worker means reaches the client, and what the client means reaches the worker, byte for byte."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.inference import OWNED_FIELDS, REFUSED_FIELDS
from tests.fakes.reading import DONE, events
from tests.integration.gateway.asking import CHAT, COMPLETIONS, MESSAGES, RESPONSES, chat, unstamped
from tests.integration.gateway.conftest import House
from tests.integration.gateway.running import GatewayProcess

pytestmark = pytest.mark.asyncio(loop_scope="session")

ODD_BUT_LEGAL = [
    "split_utf8",
    "one_byte_chunks",
    "sse_cr",
    "sse_crlf",
    "sse_comments",
    "sse_multiline",
    "sse_crlf+sse_comments+sse_multiline",
    "sse_cr+sse_comments+split_utf8+one_byte_chunks",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, chat("één 漢字 🙂 <b>")),
    "usage": (CHAT, chat(stream_options={"include_usage": True})),
    "continuous usage": (CHAT, chat(stream_options={"include_usage": True, "continuous_usage_stats": True})),
    "logprobs": (CHAT, chat(logprobs=True, top_logprobs=3)),
    "several choices": (CHAT, chat(n=3, stop=["two"])),
    "named tool": (CHAT, chat(tools=[TOOL], tool_choice=NAMED)),
    "required tool": (CHAT, chat(tools=[TOOL], tool_choice="required")),
    "json": (CHAT, chat(response_format={"type": "json_object"})),
    "cut by length": (CHAT, chat("a b c d e f", max_tokens=3, return_token_ids=True)),
    "completion": (COMPLETIONS, {"model": "m", "prompt": "one two", "max_tokens": 8}),
    "several prompts": (COMPLETIONS, {"model": "m", "prompt": ["a b", "c d"], "max_tokens": 4, "logprobs": 2}),
    "messages": (MESSAGES, {"model": "m", "messages": [{"role": "user", "content": "hi you"}], "max_tokens": 9}),
    "responses": (RESPONSES, {"model": "m", "input": "one two", "max_output_tokens": 9}),
}


async def both(house: House, path: str, body: dict[str, Any], **more: Any) -> tuple[httpx.Response, httpx.Response]:
    """The worker's own answer, asked under the id that the gateway gave the request, and the one that came through the
    gateway; the worker is asked for `more`."""
    relayed = await house.gateway.http.post(path, json=body)
    headers = {"x-request-id": relayed.headers["x-request-id"]}
    async with httpx.AsyncClient(base_url=house.worker.url, timeout=10) as direct:
        return await direct.post(path, json={**body, **more}, headers=headers), relayed


@pytest.mark.parametrize("fault", ["", *ODD_BUT_LEGAL])
async def test_odd_but_legal_streams_arrive_as_they_were_sent(house: House, fault: str) -> None:
    body = chat("one two", stream=True, stream_options={"include_usage": True}, x_fault=fault)
    direct, relayed = await both(house, CHAT, body)
    assert relayed.headers["content-type"] == direct.headers["content-type"]
    assert unstamped(relayed.content) == unstamped(direct.content)
    assert events(relayed.content)[-1].data == DONE


@pytest.mark.parametrize("fault", ["", *ODD_BUT_LEGAL])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_of_a_stream_only_the_usage_that_nobody_asked_for_is_missing(house: House, path: str, fault: str) -> None:
    body = {**BODIES["chat" if path == CHAT else "completion"][1], "stream": True, "x_fault": fault}
    direct, relayed = await both(house, path, body, stream_options={"include_usage": True})
    expected = [event for event in events(unstamped(direct.content)) if event.data == DONE or event.json["choices"]]
    assert events(unstamped(relayed.content)) == expected
    assert len(expected) == len(events(direct.content)) - 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", [name for name in BODIES if name != "responses"])
async def test_every_kind_of_answer_is_the_workers_own(house: House, name: str, stream: bool) -> None:
    path, body = BODIES[name]
    body = {"stream": stream, **body}
    if stream:
        body.setdefault("stream_options", {"include_usage": True})
    else:
        body.pop("stream_options", None)
    direct, relayed = await both(house, path, body)
    assert (direct.status_code, relayed.status_code) == (200, 200)
    assert unstamped(relayed.content) == unstamped(direct.content)


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_are_relayed(house: House, stream: bool) -> None:
    """Its item ids are random, so the shape is compared."""
    path, body = BODIES["responses"]
    direct, relayed = await both(house, path, {**body, "stream": stream})
    if stream:
        assert [event.name for event in events(relayed.content)] == [event.name for event in events(direct.content)]
        assert (
            events(relayed.content)[-1].json["response"]["usage"]
            == events(direct.content)[-1].json["response"]["usage"]
        )
    else:
        assert relayed.json()["output"][0]["content"] == direct.json()["output"][0]["content"]


async def test_every_field_of_a_request_arrives_as_it_was_written(house: House) -> None:
    fields = [
        b'"x_integer":123456789012345678901234567890',
        b'"x_float":1.0',
        b'"x_exponent":-1.50E+2',
        b'"x_text":"\\u00e9 \\ud83d\\ude42 \xc3\xa9 \\/ \\n"',
        b'"x_null":null',
        b'"x_nested":{"b": [1 , 2.50, {}], "a":"data: [DONE]\\n\\n"}',
        b'"messages":[{"role":"user","content":"a\\u0000b"}]',
    ]
    answer = await house.gateway.http.post(
        CHAT,
        content=b'{"model":"m",%b}' % b",".join(fields),
        headers={"content-type": "application/json; charset=utf-8"},
    )
    assert answer.status_code == 200
    received = house.worker.requests[-1].request.body
    assert received == b'{"model":"m",%b}' % b",".join(fields)


async def test_the_worker_gets_its_own_name_for_the_model(house: House) -> None:
    for name in ("pair", "pair:v"):
        answer = await house.gateway.http.post(CHAT, json=chat(model=name))
        assert answer.json()["model"] == "pair"
        assert (answer.headers["x-sluice-model"], answer.headers["x-sluice-variant"]) == ("pair", "v")


@pytest.mark.parametrize("field", sorted(REFUSED_FIELDS))
async def test_fields_that_steer_the_engine_are_refused(house: House, field: str) -> None:
    seen = house.worker.counts.seen
    answer = await house.gateway.http.post(CHAT, json={**chat(), field: None})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("unsupported_parameter", field, "invalid_request_error")
    assert house.worker.counts.seen == seen


async def test_fields_that_are_the_gateways_own_are_left_out(house: House) -> None:
    answer = await house.gateway.http.post(CHAT, json={**chat(user="kept"), **dict.fromkeys(OWNED_FIELDS, "x")})
    assert answer.status_code == 200
    got = house.worker.requests[-1].body
    assert got.pop("cache_salt") != "x"
    assert set(got) == {"model", "messages", "user"}


async def test_no_header_of_a_client_reaches_the_worker_but_the_trace(house: House) -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    private = {"authorization": "Bearer secret", "cookie": "a=b", "x-forwarded-for": "10.0.0.1", "accept": "*/*"}
    given = {**trace, **private, "x-request-id": "mine", "x-client-request-id": "mine too"}
    answer = await house.gateway.http.post(CHAT, json=chat(), headers=given)
    headers = house.worker.requests[-1].headers
    assert headers.items() >= {**trace, "host": f"127.0.0.1:{house.worker.port}"}.items()
    assert headers["x-request-id"] == answer.headers["x-sluice-request-id"]
    assert headers.keys() == {*trace, "x-request-id", "host", "content-type", "content-length"}


def usage_chunks(answer: httpx.Response) -> list[Any]:
    return [
        event.json["usage"]
        for event in events(answer.content)
        if event.data != DONE and event.json["choices"] == [] and "usage" in event.json
    ]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 0),
        ({"stream_options": None}, 0),
        ({"stream_options": {"include_usage": False}}, 0),
        ({"stream_options": {"continuous_usage_stats": True}}, 0),
        ({"stream_options": {"include_usage": True}}, 1),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_usage_is_shown_to_who_asked_for_it(
    gateway: GatewayProcess, house: House, path: str, options: dict[str, Any], count: int
) -> None:
    body = chat("a b") if path == CHAT else {"model": "m", "prompt": "a b"}
    answer = await gateway.http.post(path, json={**body, "stream": True, **options})
    assert len(usage_chunks(answer)) == count
    assert house.worker.requests[-1].body["stream_options"]["include_usage"] is True


async def test_a_null_or_false_stream_is_none(gateway: GatewayProcess) -> None:
    for stream in (None, False):
        answer = await gateway.http.post(CHAT, json=chat(stream=stream))
        assert answer.json()["object"] == "chat.completion"


async def test_the_end_is_the_workers_and_never_made_up(gateway: GatewayProcess) -> None:
    whole = await gateway.http.post(CHAT, json=chat("a", stream=True))
    assert whole.content.count(b"[DONE]") == 1
    anthropic = await gateway.http.post(MESSAGES, json={**BODIES["messages"][1], "stream": True})
    assert b"[DONE]" not in anthropic.content
    assert events(anthropic.content)[-1].name == "message_stop"


async def test_text_that_looks_like_an_event_stays_text(gateway: GatewayProcess) -> None:
    said = "data: [DONE]\n\ndata: {}\n\n"
    answer = await gateway.http.post(CHAT, json=chat(said, stream=True))
    parts = [event.json for event in events(answer.content)[:-1]]
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts).strip() == said.strip()
    assert answer.content.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "one two"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "one"}]}),
        ("/detokenize", {"tokens": [1, 2]}),
    ],
)
async def test_routes_without_generation_are_relayed(house: House, path: str, body: dict[str, Any]) -> None:
    direct, relayed = await both(house, path, {"model": "m", **body})
    assert relayed.status_code == 200
    assert relayed.json() == direct.json()


async def test_a_route_that_the_worker_does_not_offer_says_so(gateway: GatewayProcess) -> None:
    for path, name in [("/v1/embeddings", "m"), ("/v1/rerank", "m"), ("/v1/score", "m"), (CHAT, "embed")]:
        answer = await gateway.http.post(path, json=chat(model=name, input="x", query="q", documents=["d"]))
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["code"] == "not_found"
        assert name in error["message"]
        assert path in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "items"),
    [
        ("/v1/embeddings", {"model": "embed", "input": ["a", "b"]}, "data"),
        ("/v1/score", {"model": "score", "text_1": "a", "text_2": ["b", "c"]}, "data"),
        ("/v1/rerank", {"model": "score", "query": "a", "documents": ["b", "c"]}, "results"),
    ],
)
async def test_models_that_do_not_generate_are_served_too(
    gateway: GatewayProcess, path: str, body: dict[str, Any], items: str
) -> None:
    answer = await gateway.http.post(path, json=body)
    assert answer.status_code == 200
    assert sorted(item["index"] for item in answer.json()[items]) == [0, 1]
