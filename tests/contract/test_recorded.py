"""The fake worker against recorded answers of vLLM 0.32.0 (tests/wire): same request, same structure.

The recording server ran with tool calling, request id headers and prompt token details, and served the model `m` with a
context of 2,048 tokens. Errors must be equal in every byte of their JSON, other answers in keys, order and types.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.structure import runs, structure
from tests.fakes.reading import DONE, Event, events
from tests.fakes.worker import FakeWorker

WIRE = Path(__file__).parent.parent / "wire"
CHAT = "/v1/chat/completions"
ROUTES = {
    "completion": "/v1/completions",
    "responses": "/v1/responses",
    "anthropic_messages": "/v1/messages",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
    "score": "/v1/score",
    "err_embeddings": "/v1/embeddings",
}
GETS = {
    "get_health": "/health",
    "get_load": "/load",
    "get_nosuch": "/nosuch",
    "get_ping": "/ping",
    "get_server_info": "/server_info",
    "get_v1_models": "/v1/models",
    "get_v1_models_m": "/v1/models/m",
    "get_version": "/version",
    "err_method_get_chat": CHAT,
}
# Headers that differ from one request to the next, or tell only how long the text is.
CHANGING = {"date", "content-length", "x-request-id"}


@dataclass(frozen=True, slots=True)
class Recorded:
    status: int
    headers: dict[str, str]
    body: bytes


def recorded(name: str) -> Recorded:
    head, _, body = (WIRE / f"{name}.http").read_bytes().partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in fields)
    return Recorded(int(status.split()[1]), headers, body)


def names() -> list[str]:
    return sorted(path.name.removesuffix(".request.json") for path in WIRE.glob("*.request.json"))


def route(name: str) -> str:
    return next((path for start, path in ROUTES.items() if name.startswith(start)), CHAT)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with FakeWorker("m", prompt_tokens_details=True, request_id_headers=True) as worker:
        async with httpx.AsyncClient(base_url=worker.url, timeout=30) as client:
            yield client


def assert_same_headers(answer: httpx.Response, record: Recorded) -> None:
    assert list(answer.headers) == list(record.headers)
    for name in set(record.headers) - CHANGING:
        # Case is kept on the wire but not in the table of headers.
        assert answer.headers[name].lower() == record.headers[name]


def payloads(stream: list[Event]) -> list[Any]:
    return [(event.name, event.data if event.data == DONE else event.json) for event in stream]


def assert_same_body(answer: httpx.Response, record: Recorded) -> None:
    if record.headers.get("content-type", "").startswith("text/event-stream"):
        ours, theirs = payloads(events(answer.content)), payloads(events(record.body))
        assert [(name, structure(data)) for name, data in _once(ours)] == [
            (name, structure(data)) for name, data in _once(theirs)
        ]
    elif record.status >= 400:
        assert answer.json() == json.loads(record.body)
    elif record.body:
        assert structure(answer.json()) == structure(json.loads(record.body))
    else:
        assert answer.content == b""


def _once(stream: list[Any]) -> list[Any]:
    """One event of every run of events that have the same name and structure."""
    kept = stream[:1]
    kept += [event for before, event in pairwise(stream) if runs([before, event])[1:]]
    return kept


@pytest.mark.parametrize("name", names())
async def test_posts_are_answered_as_recorded(client: httpx.AsyncClient, name: str) -> None:
    record = recorded(name)
    headers = {"content-type": "application/json"}
    if name == "chat_request_id":
        headers["x-request-id"] = "lab-req-123"
    answer = await client.post(route(name), content=(WIRE / f"{name}.request.json").read_bytes(), headers=headers)
    assert answer.status_code == record.status
    assert_same_headers(answer, record)
    assert_same_body(answer, record)


@pytest.mark.parametrize("name", GETS)
async def test_gets_are_answered_as_recorded(client: httpx.AsyncClient, name: str) -> None:
    record = recorded(name)
    answer = await client.get(GETS[name])
    assert answer.status_code == record.status
    assert_same_headers(answer, record)
    assert_same_body(answer, record)


async def test_head_is_refused_as_recorded(client: httpx.AsyncClient) -> None:
    record = recorded("head_health")
    answer = await client.head("/health")
    assert answer.status_code == record.status
    assert_same_headers(answer, record)


@pytest.mark.parametrize(
    ("name", "fault"), [("engine_chat_after_engine_kill_1", "fast_500"), ("engine_req5", "busy_503")]
)
async def test_failures_are_worded_as_recorded(client: httpx.AsyncClient, name: str, fault: str) -> None:
    record = recorded(name)
    body = {"messages": [{"role": "user", "content": "x"}], "x_fault": fault}
    answer = await client.post(CHAT, json=body)
    assert (answer.status_code, answer.json()) == (record.status, json.loads(record.body))


async def test_a_worker_that_dies_leaves_a_stream_as_recorded(client: httpx.AsyncClient) -> None:
    """vLLM's default shutdown leaves open streams unfinished: whole events, no `[DONE]`."""
    record = events(recorded("sigterm_timeout0_stream").body)
    body = {"messages": [{"role": "user", "content": "a b c d"}], "stream": True, "x_fault": "no_done"}
    answer = events((await client.post(CHAT, json=body)).content)
    assert DONE not in {event.data for event in record + answer}
    assert structure(answer[0].json) == structure(record[0].json)
    assert structure(answer[1].json) == structure(record[1].json)


def metric_types(page: str) -> dict[str, str]:
    return {words[2]: words[3] for line in page.splitlines() if (words := line.split())[:2] == ["#", "TYPE"]}


async def test_metrics_have_recorded_names_types_and_labels(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]})
    answer, record = await client.get("/metrics"), recorded("get_metrics")
    assert answer.headers["content-type"] == record.headers["content-type"]
    theirs = record.body.decode()
    assert metric_types(answer.text).items() <= metric_types(theirs).items()
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            name, _, labels = line.partition("{")
            shown = {part.partition("=")[0] for part in labels.partition("}")[0].split(",")}
            real = next(real for real in theirs.splitlines() if real.startswith(f"{name}{{"))
            assert shown <= {part.partition("=")[0] for part in real.partition("{")[2].partition("}")[0].split(",")}
