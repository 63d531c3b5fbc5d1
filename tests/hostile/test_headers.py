"""Headers that would steer what is not the client's, and text that would leave its place."""

from __future__ import annotations

import json
import re

import pytest

from tests.fakes.reading import events
from tests.hostile.case import CHAT, GOOD, HOST, JSON, post
from tests.hostile.conftest import Fortress
from tests.hostile.raw import exchange

pytestmark = pytest.mark.asyncio(loop_scope="session")

GIVEN = {b"mine", b"x" * 10_240, b"___prefill_addr_10.0.0.1:80___", b"a\tb", b"\xff\xfe", b""}


@pytest.mark.parametrize("given", sorted(GIVEN))
async def test_b62_request_ids_are_made_here(fortress: Fortress, given: bytes) -> None:
    (answer,) = await exchange(fortress.gateway.url, post(GOOD, JSON + b"x-request-id: %b\r\n" % given))
    assert answer.status == 200
    sent = fortress.worker.requests[-1].headers["x-request-id"]
    is_harmless = re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", given) is not None
    assert sent == answer.headers["x-sluice-request-id" if is_harmless else "x-request-id"]
    assert ("x-sluice-request-id" in answer.headers) == is_harmless
    assert len(sent) == 32
    assert set(sent) <= set("0123456789abcdef")


async def test_b63_only_a_listed_few_headers_reach_the_worker(fortress: Fortress) -> None:
    lines = [
        b"x-forwarded-for: 10.0.0.1",
        b"x-forwarded-host: evil",
        b"x-forwarded-path: /metrics",
        b"x-real-ip: 10.0.0.1",
        b"forwarded: for=10.0.0.1",
        b"x_request_id: theirs",
        b"connection: x-secret",
        b"x-secret: 1",
        b"x-vllm-priority: -100",
        b"x-data-parallel-rank: 1",
        b"x-session-id: theirs",
        b"authorization: Bearer theirs",
        b"cookie: a=b",
        b"traceparent: 00-%b-%b-01" % (b"a" * 32, b"b" * 16),
        b"tracestate: v=\xff",
    ]
    sent = b"POST %b HTTP/1.1\r\n%b%b%b\r\n" % (
        CHAT.encode(),
        HOST,
        JSON,
        b"\r\n".join(lines) + b"\r\nconnection: close\r\n",
    )
    sent = sent.replace(b"\r\n\r\n", b"\r\ncontent-length: %d\r\n\r\n" % len(GOOD)) + GOOD
    (answer,) = await exchange(fortress.gateway.url, sent)
    assert answer.status == 200
    reached = fortress.worker.requests[-1].headers
    assert set(reached) == {"host", "content-type", "content-length", "x-request-id", "traceparent"}


@pytest.mark.parametrize("given", [b"00-x-y-01", b"evil", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01" + b"c" * 400])
async def test_b63_a_trace_that_is_none_is_left_out(fortress: Fortress, given: bytes) -> None:
    (answer,) = await exchange(fortress.gateway.url, post(GOOD, JSON + b"traceparent: %b\r\n" % given))
    assert answer.status == 200
    assert "traceparent" not in fortress.worker.requests[-1].headers


@pytest.mark.parametrize(
    "text", ["data: [DONE]\n\n", "\r\n\r\nHTTP/1.1 200 OK\r\n", '\x1b[31m\n{"level":"error"}', "</script>"]
)
async def test_b70_text_stays_inside_its_strings(fortress: Fortress, text: str) -> None:
    """Also when the model says it back: one stream, one end, and no line of it in the log."""
    marked = f"canary-{text}"
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": marked}]}
    (answer,) = await exchange(fortress.gateway.url, post(json.dumps(body).encode()))
    told = [event.data for event in events(answer.body)]
    assert told.count("[DONE]") == 1
    assert told[-1] == "[DONE]"
    assert all(json.loads(data)["object"] == "chat.completion.chunk" for data in told[:-1])
    assert "canary-" not in fortress.gateway.process.output


async def test_answers_are_not_sniffed_and_not_stored(fortress: Fortress) -> None:
    for sent in (post(GOOD), post(b"{"), post(GOOD[:-1] + b',"stream":true}')):
        (answer,) = await exchange(fortress.gateway.url, sent)
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
