"""Every error is an OpenAI error object under the right status, with a request id, and never the framework's shape."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from tests.integration.gateway.asking import CHAT, COMPLETIONS, chat
from tests.integration.gateway.conftest import House, ShortTempered
from tests.integration.gateway.running import GatewayProcess
from tests.integration.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

JSON = {"content-type": "application/json"}
REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
KINDS = {"invalid_request_error", "server_error"}


def error_in(status: int, headers: Any, content: bytes) -> dict[str, Any]:
    """The error of an answer, once it has the shape of one."""
    assert headers["content-type"] == "application/json"
    assert REQUEST_ID.fullmatch(headers["x-request-id"])
    body = json.loads(content)
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] in KINDS
    assert error["message"]
    assert status >= 400
    return error


async def posted(
    gateway: GatewayProcess, content: bytes, path: str = CHAT, **headers: str
) -> tuple[int, dict[str, Any]]:
    answer = await gateway.http.post(path, content=content, headers={**JSON, **headers})
    return answer.status_code, error_in(answer.status_code, answer.headers, answer.content)


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"model":"m"} {}', "invalid_json", None),
        (b"not json", "invalid_json", None),
        (b'{"model":"m","x":NaN}', "invalid_value", "x"),
        ("{}".encode("utf-16"), "invalid_json", None),
        (b"\xef\xbb\xbf{}", "invalid_json", None),
        (b'{"model":"m","x":' + b"[" * 100_000, "invalid_json", None),
        (b"null", "invalid_value", None),
        (b"[]", "invalid_value", None),
        (b'"x"', "invalid_value", None),
        (b"1", "invalid_value", None),
        (b"{}", "invalid_value", "model"),
        (b'{"model":null}', "invalid_value", "model"),
        (b'{"model":1}', "invalid_value", "model"),
        (b'{"model":"\\ud800"}', "invalid_value", "model"),
        (b'{"model":"m","stream":"yes"}', "invalid_value", "stream"),
        (b'{"model":"m","stream":1}', "invalid_value", "stream"),
        (b'{"model":"m","stream":true,"stream_options":[]}', "invalid_value", "stream_options"),
        (b'{"model":"m","service_tier":"gold"}', "invalid_value", "service_tier"),
    ],
)
async def test_a_body_that_cannot_be_served(gateway: GatewayProcess, content: bytes, code: str, param: str) -> None:
    status, error = await posted(gateway, content)
    assert (status, error["code"], error["param"], error["type"]) == (400, code, param, "invalid_request_error")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"messages": "hello"}, "invalid_value", "messages"),
        ({"messages": []}, "invalid_value", None),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"max_tokens": 99_999}, "invalid_value", "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_worker_refuses_is_told_in_openais_shape(
    gateway: GatewayProcess, fields: dict[str, Any], code: str, param: str | None, stream: bool
) -> None:
    status, error = await posted(gateway, json.dumps({**chat(stream=stream), **fields}).encode())
    assert (status, error["code"], error["param"], error["type"]) == (400, code, param, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_too_long(gateway: GatewayProcess, stream: bool) -> None:
    status, error = await posted(gateway, json.dumps(chat("x " * 3000, stream=stream)).encode())
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "maximum context length is 2048 tokens" in error["message"]
    body = {"model": "m", "prompt": "x " * 3000, "stream": stream}
    status, error = await posted(gateway, json.dumps(body).encode(), COMPLETIONS)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")


@pytest.mark.parametrize("name", ["", "nobody", "m:other", "m:", ":v", "x" * 10_000, "../../m", "<script>"])
async def test_an_unknown_model(gateway: GatewayProcess, name: str) -> None:
    status, error = await posted(gateway, json.dumps(chat(model=name)).encode())
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx"],
)
async def test_a_body_that_is_not_declared_as_json(gateway: GatewayProcess, content_type: str | None) -> None:
    async with connected(gateway.url) as wire:
        await wire.post(CHAT, chat(), {} if content_type is None else {"content-type": content_type})
        status, headers, content = await wire.answer()
        assert (status, error_in(status, headers, content)["code"]) == (415, "unsupported_media_type")
        await wire.post(CHAT, chat())  # the connection is still in step
        status, _, content = await wire.answer()
        assert (status, json.loads(content)["object"]) == (200, "chat.completion")


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate"])
async def test_a_compressed_body(gateway: GatewayProcess, encoding: str) -> None:
    status, error = await posted(gateway, b"\x1f\x8b", **{"content-encoding": encoding})
    assert (status, error["code"]) == (415, "unsupported_media_type")


async def test_a_body_that_is_declared_too_large_is_refused_unread(gateway: GatewayProcess) -> None:
    async with connected(gateway.url) as wire:
        await wire.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1048577\r\n\r\n"
        )
        status, headers, content = await wire.answer()
        assert (status, error_in(status, headers, content)["code"]) == (413, "request_too_large")


async def test_a_streamed_body_is_refused_when_it_grows_too_large(short: ShortTempered) -> None:
    async with connected(short.gateway.url) as wire:
        await wire.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for _ in range(5):
            await wire.send(b"4000\r\n%b\r\n" % (b" " * 0x4000))
        status, headers, content = await wire.answer()
        assert (status, error_in(status, headers, content)["code"]) == (413, "request_too_large")


async def test_a_body_of_exactly_the_limit_is_taken(short: ShortTempered) -> None:
    content = json.dumps(chat("a")).encode()
    answer = await short.gateway.http.post(CHAT, content=content + b" " * (65536 - len(content)), headers=JSON)
    assert answer.status_code == 200
    answer = await short.gateway.http.post(CHAT, content=content + b" " * (65537 - len(content)), headers=JSON)
    assert answer.status_code == 413


async def test_a_body_that_does_not_arrive_is_a_timeout(short: ShortTempered) -> None:
    async with connected(short.gateway.url) as wire:
        await wire.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        status, headers, content = await wire.answer()
        assert (status, error_in(status, headers, content)["code"]) == (408, "request_timeout")


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/chat", "/v1/chat/completions/", "/healthz/", "/v1/../metrics", "//v1/models", "/admin"]
)
async def test_an_unknown_route(gateway: GatewayProcess, path: str) -> None:
    async with connected(gateway.url) as wire:
        for method in (b"GET", b"POST"):
            await wire.send(b"%b %b HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n" % (method, path.encode()))
            status, headers, content = await wire.answer()
            assert (status, error_in(status, headers, content)["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("PUT", COMPLETIONS, "POST"),
        ("DELETE", "/tokenize", "POST"),
        ("OPTIONS", CHAT, "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/m", "GET"),
        ("POST", "/metrics", "GET"),
        ("POST", "/healthz", "GET"),
        ("OPTIONS", "/v1/models", "GET"),
        ("PATCH", "/readyz", "GET"),
    ],
)
async def test_a_wrong_method(gateway: GatewayProcess, method: str, path: str, allow: str) -> None:
    answer = await gateway.http.request(method, path)
    assert answer.status_code == 405
    assert allow in re.split(r",\s*", answer.headers["allow"])
    assert error_in(405, answer.headers, answer.content)["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", [CHAT, "/v1/nothing"])
async def test_head_of_an_error_has_no_body(gateway: GatewayProcess, path: str) -> None:
    answer = await gateway.http.head(path)
    assert answer.status_code == (405 if path == CHAT else 404)
    assert answer.content == b""
    assert (await gateway.http.get("/healthz")).json() == {"status": "ok"}  # the connection is still in step


async def test_probes_may_be_asked_by_head(gateway: GatewayProcess) -> None:
    for path in ("/healthz", "/readyz"):
        answer = await gateway.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


async def test_an_unknown_model_of_the_list(gateway: GatewayProcess) -> None:
    answer = await gateway.http.get("/v1/models/nobody")
    error = error_in(answer.status_code, answer.headers, answer.content)
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


MINTED = re.compile("[0-9a-f]{32}")


def logged(gateway: GatewayProcess, request_id: str) -> dict[str, str]:
    """The ids in the log's line on the request that was given this one."""
    line = json.loads(gateway.process.wait_for_line(f'"request_id": ?"{request_id}"'))
    return {name: line[name] for name in ("request_id", "client_request_id")}


@pytest.mark.parametrize("given", ["a", "req_0123456789-ABC", "x" * 64])
async def test_a_harmless_request_id_comes_back_and_never_reaches_the_worker(house: House, given: str) -> None:
    answer = await house.gateway.http.post(CHAT, json=chat(), headers={"x-request-id": given})
    assert answer.headers.get_list("x-request-id") == [given]
    (minted,) = answer.headers.get_list("x-sluice-request-id")
    assert MINTED.fullmatch(minted)
    assert answer.json()["id"] == f"chatcmpl-{minted}"
    assert house.worker.requests[-1].headers["x-request-id"] == minted
    found = await asyncio.to_thread(logged, house.gateway, minted)
    assert found == {"request_id": minted, "client_request_id": given}
    failed = await house.gateway.http.post(CHAT, content=b"{", headers={**JSON, "x-request-id": given})
    assert failed.headers["x-request-id"] == given
    assert failed.headers["x-sluice-request-id"] not in ("", minted)


async def test_a_client_request_id_as_openai_has_it_is_only_logged(house: House) -> None:
    answer = await house.gateway.http.post(CHAT, json=chat(), headers={"x-client-request-id": "order-17"})
    minted = answer.headers["x-request-id"]
    assert MINTED.fullmatch(minted)
    assert "x-sluice-request-id" not in answer.headers
    found = await asyncio.to_thread(logged, house.gateway, minted)
    assert found == {"request_id": minted, "client_request_id": "order-17"}


async def test_a_request_id_that_comes_back_is_the_one_in_the_log(house: House) -> None:
    given = {"x-client-request-id": "order-18", "x-request-id": "front-1"}
    answer = await house.gateway.http.post(CHAT, json=chat(), headers=given)
    found = await asyncio.to_thread(logged, house.gateway, answer.headers["x-sluice-request-id"])
    assert found["client_request_id"] == answer.headers["x-request-id"] == "front-1"


async def test_two_clients_that_choose_one_id_are_two_requests_to_the_worker(house: House) -> None:
    for _ in range(2):
        await house.gateway.http.post(CHAT, json=chat(), headers={"x-request-id": "chosen"})
    first, second = house.worker.requests[-2:]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


@pytest.mark.parametrize("name", ["x-request-id", "x-client-request-id"])
@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "http://10.0.0.1/", "a\tb", "é"])
async def test_any_other_request_id_is_left_out(house: House, given: str, name: str) -> None:
    answer = await house.gateway.http.post(CHAT, json=chat(), headers={name.encode(): given.encode()})
    await only_minted(house, answer)


async def test_two_request_ids_are_none(house: House) -> None:
    headers = [("x-request-id", "one"), ("x-request-id", "two")]
    await only_minted(house, await house.gateway.http.post(CHAT, json=chat(), headers=headers))


async def only_minted(house: House, answer: httpx.Response) -> None:
    (minted,) = answer.headers.get_list("x-request-id")
    assert MINTED.fullmatch(minted)
    assert "x-sluice-request-id" not in answer.headers
    assert house.worker.requests[-1].headers["x-request-id"] == minted
    found = await asyncio.to_thread(logged, house.gateway, minted)
    assert found == {"request_id": minted, "client_request_id": ""}


async def test_good_answers_have_a_request_id_too(gateway: GatewayProcess) -> None:
    for path in ("/healthz", "/readyz", "/v1/models", "/metrics", "/docs", "/openapi.json"):
        answer = await gateway.http.get(path)
        assert answer.status_code == 200
        assert REQUEST_ID.fullmatch(answer.headers["x-request-id"])


async def test_no_answer_has_the_frameworks_shape(gateway: GatewayProcess) -> None:
    for path in ("/nothing", "/v1/models/nobody", "/docs/oauth2-redirect", "/redoc"):
        answer = await gateway.http.get(path)
        assert answer.status_code == 404
        error_in(404, answer.headers, answer.content)


async def test_answers_of_the_gateway_are_not_cached(gateway: GatewayProcess) -> None:
    assert (await gateway.http.post(CHAT, json=chat(stream=True))).headers["cache-control"] == "no-store"
    assert (await gateway.http.post(CHAT, content=b"{", headers=JSON)).headers["cache-control"] == "no-store"
