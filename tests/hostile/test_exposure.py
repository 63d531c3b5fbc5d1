"""What is shown, to whom: headers, other origins, log lines, secrets."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.fakes.worker import FakeWorker
from tests.hostile.case import CHAT, GOOD, HOST, JSON, post
from tests.hostile.conftest import Fortress
from tests.hostile.raw import exchange
from tests.integration.gateway.running import GatewayProcess, model, start_gateway, until
from tests.ports import free_port

pytestmark = pytest.mark.asyncio(loop_scope="session")

PASSWORD = "redis-canary-77d0"
EVERYTHING = [
    "/v1/models",
    "/v1/models/m",
    "/healthz",
    "/readyz",
    "/metrics",
    "/nowhere",
    "/openapi.json",
    "/docs",
    "/console",
]


def encoded(path: str) -> str:
    """The same path in another spelling."""
    return path[:-1] + f"%{ord(path[-1]):02x}"


# S2: one spelling of a path, and nothing but the path decides


@pytest.mark.parametrize("path", ["/metrics", "/docs", "/openapi.json", "/admin/queue", "/healthz", "/v1/models", CHAT])
async def test_a_path_has_one_spelling(fortress: Fortress, path: str) -> None:
    for spelt in (encoded(path), "/%2e" + path, path + "%00", path.replace("/", "%2f", 2)):
        sent = b"GET %b HTTP/1.1\r\n%bconnection: close\r\n\r\n" % (spelt.encode(), HOST)
        (answer,) = await exchange(fortress.gateway.url, sent)
        assert answer.status in (400, 404), spelt
        assert answer.error["code"] in ("not_found", "malformed_request")


async def test_a_models_name_may_be_encoded(fortress: Fortress) -> None:
    for name in ("m", "%6d", "m%3Av"):
        assert (await fortress.gateway.http.get(f"/v1/models/{name}")).status_code == 200
    unknown = await fortress.gateway.http.get(f"/v1/models/{quote('../metrics', safe='')}")
    assert unknown.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/nowhere", "/v1/models", "/metrics"])
async def test_no_header_says_what_is_asked_for(fortress: Fortress, path: str) -> None:
    plain = await fortress.gateway.http.get(path)
    lines = dict.fromkeys(("x-original-url", "x-rewrite-url", "x-forwarded-path", "x-forwarded-prefix"), "/metrics")
    moved = await fortress.gateway.http.get(path, headers={**lines, "host": "evil", "x-http-method-override": "POST"})
    assert (moved.status_code, moved.headers["content-type"]) == (plain.status_code, plain.headers["content-type"])


# S30, S31: other origins get nothing, and nobody stores or sniffs anything


@pytest.mark.parametrize("path", [*EVERYTHING, CHAT])
async def test_other_origins_are_not_invited(fortress: Fortress, path: str) -> None:
    asked = {
        "origin": "https://evil.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    http = fortress.gateway.http
    answers = [await http.options(path, headers=asked), await http.get(path, headers=asked)]
    assert answers[0].status_code in (404, 405)
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", EVERYTHING)
async def test_nothing_is_stored_or_sniffed(fortress: Fortress, path: str) -> None:
    for headers in [(await fortress.gateway.http.get(path)).headers]:
        assert headers.get_list("cache-control") == ["no-store"]
        assert headers.get_list("x-content-type-options") == ["nosniff"]
        assert "server" not in headers
        assert "set-cookie" not in headers


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (post(GOOD), 200),
        (post(GOOD[:-1] + b',"stream":true}'), 200),
        (post(b"{"), 400),
        (b"BREW / HTTP/1.1\r\n\r\n", 405),
        (b"\x16\x03\x01\r\n\r\n", 400),
    ],
)
async def test_no_answer_is_stored_or_sniffed(fortress: Fortress, sent: bytes, status: int) -> None:
    """Also a worker's answer, a stream, and what never became a request."""
    (answer,) = await exchange(fortress.gateway.url, sent)
    assert answer.status == status
    assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.headers["x-accel-buffering"] == "no"


# S6, S17: nothing that a client writes makes anybody connect


async def test_no_field_makes_the_gateway_connect(fortress: Fortress) -> None:
    called = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        writer.transport.abort()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        where = dict.fromkeys(("api_base", "base_url", "webhook", "callback_url", "url", "proxy", "endpoint"), url)
        body: dict[str, Any] = {**json.loads(GOOD), **where, "extra": {"nested": [where]}, "metadata": where}
        answer = await fortress.gateway.http.post(CHAT, json=body, headers={"x-callback": url, "referer": url})
        assert answer.status_code == 200
        await fortress.gateway.idle()
        assert not called.is_set()


async def test_no_shape_of_ours_takes_an_address(fortress: Fortress) -> None:
    """Nor a command, a template or a file to open: names of fields in the OpenAPI document, at any depth."""
    document = (await fortress.gateway.http.get("/openapi.json")).json()
    names = {name for shape in document["components"]["schemas"].values() for name in shape.get("properties", {})}
    assert names
    assert not names & {"url", "uri", "api_base", "base_url", "command", "template", "path", "file", "module", "import"}


# S19, S33: what is logged


async def test_an_old_worker_is_told_of(tmp_path: Path) -> None:
    """In one line, once, and it serves all the same: which version to run is the operator's decision."""
    async with (
        FakeWorker("m", version="0.31.4+cpu") as worker,
        GatewayProcess(tmp_path, [model("m", worker)]) as gateway,
    ):
        await gateway.ready(worker)
        worker.crash()
        await until(lambda: has_state(gateway, worker, "lost"), "lost")
        await worker.start()
        await gateway.ready(worker)
        told = [line for line in gateway.process.output.splitlines() if "is older than 0.32.0" in line]
    assert len(told) == 1
    assert json.loads(told[0])["doubt"] == "vLLM 0.31.4 is older than 0.32.0 and lacks its security fixes"


async def has_state(gateway: GatewayProcess, worker: FakeWorker, state: str) -> bool:
    return await gateway.state_of(worker) == state


async def test_redis_password_is_shown_nowhere(tmp_path: Path) -> None:
    """Neither when Redis is out of reach, nor by any page, nor in the process list."""
    url = f"redis://user:{PASSWORD}@127.0.0.1:{free_port()}/0"
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(FakeWorker("m"))
        gateway = GatewayProcess(tmp_path, [model("m", worker)], redis={"url": url}, logs={"level": "debug"})
        await stack.enter_async_context(gateway)
        await gateway.ready(worker)
        pages = [await gateway.http.get(path) for path in (*EVERYTHING, "/admin/queue")]
        listed = Path(f"/proc/{gateway.process.pid}/cmdline").read_text(encoding="utf-8")
        assert "redis is out of reach" in gateway.process.output
        for shown in (*(page.text for page in pages), listed, gateway.process.output):
            assert PASSWORD not in shown


@pytest.mark.parametrize(
    "wrong", [f"{{url: ['{PASSWORD}']}}", f"{{url: 'redis://:{PASSWORD}@x', tls: {{}}}}", PASSWORD]
)
async def test_a_wrong_configuration_is_told_without_its_secrets(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "sluice.yaml"
    path.write_text(f"redis: {wrong}", encoding="utf-8")
    with start_gateway("--config", str(path)) as process:
        assert await asyncio.to_thread(process.wait, 60) == 2
        assert "redis" in process.output
        assert PASSWORD not in process.output


async def test_bodies_of_errors_quote_at_most_a_little(fortress: Fortress) -> None:
    """Of what a client sent, at most two hundred characters come back, and no control character."""
    name = "\\u001b[31m" + "x" * 5000
    (answer,) = await exchange(fortress.gateway.url, post(b'{"model":"%b","messages":[]}' % name.encode(), JSON))
    assert answer.status in (400, 404)
    assert len(answer.error["message"]) < 400
    assert "\x1b" not in answer.error["message"]
