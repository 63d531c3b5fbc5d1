"""Broken framing over a raw socket: the exact answer, in its turn, and then the connection's end."""

from __future__ import annotations

import time

import pytest

from tests.fakes.reading import events
from tests.hostile.case import CHAT, GOOD, HOST, JSON, Case
from tests.hostile.conftest import LIMITS, Fortress
from tests.hostile.framing import FRAMING
from tests.hostile.raw import answers, exchange
from tests.integration.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

SHIPPED_S = 10
"""The shortest deadline that ships; here they are half a second and a whole one."""
HEAD = b"POST %b HTTP/1.1\r\n%b%b" % (CHAT.encode(), HOST, JSON)


@pytest.mark.parametrize("case", FRAMING, ids=lambda case: case.id)
async def test_it_is_answered_and_closed(fortress: Fortress, case: Case) -> None:
    seen = fortress.worker.counts.seen
    await fortress.refuses(case)
    assert fortress.worker.counts.seen - seen == case.statuses.count(200) * (CHAT.encode() in case.sent) + 1


async def is_closed(hasty: Fortress, sent: bytes) -> list[tuple[int, str]]:
    """The answers to `sent`, with which nothing else comes, once the gateway has closed: not at once, and soon."""
    began = time.monotonic()
    got = await exchange(hasty.gateway.url, sent)
    assert 0.4 <= time.monotonic() - began < SHIPPED_S
    await hasty.holds()
    return [(answer.status, answer.error["code"]) for answer in got]


async def test_b4_silence_is_closed(hasty: Fortress) -> None:
    assert await is_closed(hasty, b"") == []


async def test_b4_line_ends_keep_nothing_open(hasty: Fortress) -> None:
    assert await is_closed(hasty, b"\r\n") == []


@pytest.mark.parametrize("sent", [b"G", b"GET /healthz HTTP/1.1\r\n", HEAD + b"x-a: b"])
async def test_b1_a_head_that_does_not_end(hasty: Fortress, sent: bytes) -> None:
    assert await is_closed(hasty, sent) == [(408, "request_timeout")]


async def test_b2_a_head_in_drops_gets_no_longer(hasty: Fortress) -> None:
    began = time.monotonic()
    async with connected(hasty.gateway.url) as wire:
        drops = wire.send_slowly(HEAD + b"x: " + b"a" * 500, 0.02)
        (answer,) = answers(await wire.rest_while(drops))
    assert time.monotonic() - began < SHIPPED_S
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    await hasty.holds()


@pytest.mark.parametrize("framing", [b"content-length: 1000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
async def test_b3_a_body_that_does_not_come(hasty: Fortress, framing: bytes) -> None:
    assert await is_closed(hasty, HEAD + framing) == [(408, "request_timeout")]


async def test_b3_a_body_below_the_lowest_rate(hasty: Fortress) -> None:
    began = time.monotonic()
    async with connected(hasty.gateway.url) as wire:
        await wire.send(HEAD + b"content-length: 100000\r\n\r\n")
        (answer,) = answers(await wire.rest_while(wire.send_slowly(b" " * 300, 0.02)))
    assert 0.4 < time.monotonic() - began < SHIPPED_S
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    await hasty.holds()


async def test_b3_a_body_of_a_route_that_reads_none(hasty: Fortress) -> None:
    """The answer comes at once; the connection ends with it, although the client has announced more."""
    sent = b"GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    began = time.monotonic()
    (answer,) = await exchange(hasty.gateway.url, sent)
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert time.monotonic() - began < SHIPPED_S
    await hasty.holds()


async def test_the_deadlines_that_ship() -> None:
    from app.settings import Limits

    shipped = Limits()
    assert (shipped.header_timeout_s, shipped.body_timeout_s, shipped.body_grace_s) == (10, 30, 5)
    assert (shipped.body_bytes_per_s, shipped.header_bytes, shipped.target_bytes) == (16384, 32768, 8192)
    assert set(LIMITS) <= set(shipped.model_dump())


async def test_b26_an_error_waits_for_the_answers_before_it(fortress: Fortress) -> None:
    """A stream that goes on is not cut by what is wrong with the request behind it."""
    body = GOOD[:-1] + b',"stream":true,"x_timing":{"decode_s":0.03},"max_tokens":8}'
    sent = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body + b"GARBAGE\r\n\r\n"
    async with connected(fortress.gateway.url) as wire:
        await wire.send(sent)
        data = await wire.rest()
    stream, _, refused = data.partition(b"0\r\n\r\nHTTP/1.1 400")
    assert b"[DONE]" in stream
    assert b"malformed_request" in refused
    await fortress.holds()


async def test_b27_a_stream_in_http_1_0_is_framed_by_its_end(fortress: Fortress) -> None:
    body = GOOD[:-1] + b',"stream":true}'
    sent = b"POST %b HTTP/1.0\r\n%bcontent-length: %d\r\n\r\n%b" % (CHAT.encode(), JSON, len(body), body)
    (answer,) = await exchange(fortress.gateway.url, sent)
    assert "transfer-encoding" not in answer.headers
    assert [event.data for event in events(answer.body)][-1] == "[DONE]"
    assert answer.body.startswith(b"data: ")
    await fortress.holds()


async def test_a_request_in_many_small_parts_is_served(fortress: Fortress) -> None:
    sent = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(GOOD), GOOD)
    (answer,) = await exchange(fortress.gateway.url, *(sent[at : at + 7] for at in range(0, len(sent), 7)))
    assert answer.status == 200
    await fortress.holds()


async def test_every_refusal_is_counted_and_none_is_logged(fortress: Fortress) -> None:
    before = (await fortress.gateway.scrape()).sum("sluice_malformed_requests_total", code="malformed_request")
    for _ in range(3):
        await exchange(fortress.gateway.url, b"\x16\x03\x01 canary-in-garbage\r\n\r\n")
    after = (await fortress.gateway.scrape()).sum("sluice_malformed_requests_total", code="malformed_request")
    assert after - before == 3
    assert "canary-in-garbage" not in fortress.gateway.process.output
    assert "Invalid HTTP" not in fortress.gateway.process.output
