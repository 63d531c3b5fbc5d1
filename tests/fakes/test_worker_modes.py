"""Every fault does what the catalogue says, seen by a raw socket or by httpx."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.faults import CATALOGUE
from tests.fakes.generation import MULTIBYTE
from tests.fakes.reading import DONE, chunks, events, post_raw
from tests.fakes.worker import FakeWorker

CHAT = "/v1/chat/completions"
WORDS = ["one", " two", " three", " four", " five"]


def ask(stream: bool = False, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "".join(WORDS)}], "stream": stream, **fields}


@pytest.fixture
async def client(fake_worker: FakeWorker) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=fake_worker.url, timeout=10) as client:
        yield client


async def stream_of(worker: FakeWorker, fault: str) -> tuple[bytes, bytes]:
    return await post_raw(worker.url, CHAT, ask(stream=True, x_fault=fault))


def contents(stream: bytes) -> list[str]:
    """The content of every chunk that has choices."""
    payloads = [event.json for event in events(stream) if event.data != DONE]
    return [payload["choices"][0]["delta"].get("content", "") for payload in payloads if payload.get("choices")]


async def gauge(client: httpx.AsyncClient, name: str) -> float:
    page = (await client.get("/metrics")).text
    return next(
        family.samples[0].value for family in text_string_to_metric_families(page) if family.name == f"vllm:{name}"
    )


# before any byte


async def test_die_before_byte(fake_worker: FakeWorker) -> None:
    assert await stream_of(fake_worker, "die_before_byte") == (b"", b"")
    assert fake_worker.counts.broken == 1


async def test_hang_before_sends_nothing_until_healed(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        asking = asyncio.create_task(client.post(CHAT, json=ask(stream, x_fault="hang_before")))
        await fake_worker.wait_for(running=1)
        assert not asking.done()
        fake_worker.heal()
        assert (await asking).status_code == 200


async def test_hang_before_ends_when_the_client_leaves(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    asking = asyncio.create_task(client.post(CHAT, json=ask(x_fault="hang_before")))
    await fake_worker.wait_for(open=1, running=1)
    asking.cancel()
    await fake_worker.aborted()
    assert fake_worker.counts.open == 0
    assert fake_worker.requests[-1].outcome == "aborted"


async def test_health_ok_engine_dead(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    fake_worker.inject("health_ok_engine_dead")
    asking = asyncio.create_task(client.post(CHAT, json=ask()))
    await fake_worker.wait_for(running=1)
    assert (await client.get("/health")).status_code == 200
    assert await gauge(client, "num_requests_running") == 1
    asking.cancel()
    await fake_worker.aborted()


async def test_kill_me_prompt_takes_the_worker_and_its_other_requests_down(
    fake_worker: FakeWorker, client: httpx.AsyncClient
) -> None:
    fake_worker.hold()
    other = asyncio.create_task(client.post(CHAT, json=ask()))
    await fake_worker.wait_for(running=1)
    deadly = {"messages": [{"role": "user", "content": "kill_me_prompt"}]}
    with pytest.raises(ConnectionResetError):
        await post_raw(fake_worker.url, CHAT, deadly)
    with pytest.raises(httpx.ReadError):
        await other
    with pytest.raises(httpx.ConnectError):
        await client.get("/health")
    await fake_worker.wait_for(broken=2)
    assert fake_worker.crashed


async def test_kv_full_waits_inside_the_engine(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    fake_worker.inject("kv_full")
    asking = asyncio.create_task(client.post(CHAT, json=ask()))
    await fake_worker.wait_for(waiting=1, running=0)
    assert await gauge(client, "kv_cache_usage_perc") == 1
    assert await gauge(client, "num_requests_waiting") == 1
    assert await gauge(client, "num_preemptions") == 1
    fake_worker.heal()
    assert (await asking).status_code == 200
    assert await gauge(client, "kv_cache_usage_perc") == 0


async def test_ignore_abort_goes_on_without_the_client(fake_worker: FakeWorker) -> None:
    fake_worker.hold()
    async with httpx.AsyncClient(base_url=fake_worker.url, timeout=30) as leaving:
        asking = asyncio.create_task(leaving.post(CHAT, json=ask(stream=True, x_fault="ignore_abort")))
        await fake_worker.wait_for(running=1)
        asking.cancel()
        await fake_worker.wait_for(connections=0)
    assert (fake_worker.counts.open, fake_worker.counts.aborted) == (1, 0)
    fake_worker.resume()
    await fake_worker.wait_for(open=0, running=0, finished=1)


# instead of an answer


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        ("fast_500", 500, "InternalServerError"),
        ("draining_500", 500, "InternalServerError"),
        ("busy_503", 503, "Service Unavailable"),
        ("429:3", 429, "Too Many Requests"),
    ],
)
async def test_refusals_carry_vllms_error_object(client: httpx.AsyncClient, fault: str, status: int, kind: str) -> None:
    answer = await client.post(CHAT, json=ask(stream=True, x_fault=fault))
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("retry-after") == ("3" if status == 429 else None)
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, status, None)


async def test_garbage_is_not_http(client: httpx.AsyncClient) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post(CHAT, json=ask(x_fault="garbage"))


async def test_html200(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=ask(x_fault="html200"))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.text.startswith("<!doctype html>")


# within the answer


async def test_slow_stretches_every_step(client: httpx.AsyncClient) -> None:
    begun = time.monotonic()
    answer = await client.post(CHAT, json=ask(x_fault="slow:20"))
    # One prefill, five words and the end token, each 1 ms times 20.
    assert time.monotonic() - begun >= 0.9 * 7 * 0.020
    assert answer.json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("count", [1, 4, 99])
async def test_die_after_delivers_exactly_that_many_events(fake_worker: FakeWorker, count: int) -> None:
    _, body = await stream_of(fake_worker, f"die_after:{count}")
    sent = b"".join(chunks(body + b"0\r\n\r\n"))
    # Role, five words, the end: a stream is never longer, and never ends in order.
    assert contents(sent) == ["", *WORDS, ""][:count]
    assert b"[DONE]" not in sent
    with pytest.raises(ValueError, match="invalid literal"):
        chunks(body)


async def test_die_after_cuts_a_plain_body(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    _, body = await post_raw(fake_worker.url, CHAT, ask(x_fault="die_after:10"))
    assert body == b'{"id":"cha'
    with pytest.raises(httpx.RemoteProtocolError, match="received 10 bytes"):
        await client.post(CHAT, json=ask(x_fault="die_after:10"))


async def test_reset_after(fake_worker: FakeWorker) -> None:
    with pytest.raises(ConnectionResetError):
        await stream_of(fake_worker, "reset_after:2")


async def test_hang_after_goes_on_when_healed(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    async with client.stream("POST", CHAT, json=ask(stream=True, x_fault="hang_after:3")) as answer:
        lines = answer.aiter_lines()
        seen = [line async for line, _ in _limit(lines, 3)]
        assert [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in seen] == ["", *WORDS[:2]]
        fake_worker.heal()
        rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"


async def test_hang_at_end_goes_on_when_healed(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    async with client.stream("POST", CHAT, json=ask(stream=True, x_fault="hang_at_end")) as answer:
        parts = answer.aiter_raw()
        while not (await anext(parts)).endswith(b"data: [DONE]\n\n"):
            pass
        ending = asyncio.ensure_future(anext(parts, b""))
        await asyncio.sleep(0)
        assert fake_worker.counts.open == 1
        fake_worker.heal()
        assert await ending == b""


async def _limit(lines: AsyncIterator[str], count: int) -> AsyncIterator[tuple[str, int]]:
    """The first `count` lines that are not empty."""
    seen = 0
    async for line in lines:
        if line:
            seen += 1
            yield line, seen
        if seen == count:
            return


@pytest.mark.parametrize("stream", [False, True])
async def test_short_cl_sends_more_than_it_declares(fake_worker: FakeWorker, stream: bool) -> None:
    head, body = await post_raw(fake_worker.url, CHAT, ask(stream, x_fault="short_cl"))
    assert len(body) == _declared(head) + 16
    assert body.endswith(b"data: [DONE]\n\n" if stream else b'"metrics":null}')


@pytest.mark.parametrize("stream", [False, True])
async def test_long_cl_declares_more_than_it_sends(fake_worker: FakeWorker, stream: bool) -> None:
    head, body = await post_raw(fake_worker.url, CHAT, ask(stream, x_fault="long_cl"))
    assert len(body) == _declared(head) - 16


def _declared(head: bytes) -> int:
    line = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
    return int(line.partition(b":")[2])


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_chunk(client: httpx.AsyncClient, stream: bool) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post(CHAT, json=ask(stream, x_fault="bad_chunk"))


async def test_half_event_ends_http_in_order_but_not_the_event(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=ask(stream=True, x_fault="half_event:3"))
    assert contents(answer.content) == ["", *WORDS[:2]]
    assert not answer.content.endswith(b"\n\n")


async def test_half_event_of_a_plain_answer_is_cut_json(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=ask(x_fault="half_event"))
    with pytest.raises(json.JSONDecodeError):
        answer.json()


async def test_no_done_ends_in_order_without_the_last_event(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=ask(stream=True, x_fault="no_done"))
    assert contents(answer.content) == ["", *WORDS, ""]
    assert b"[DONE]" not in answer.content


async def test_error_event(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=ask(stream=True, x_fault="error_event:3"))
    *_, failure, done = events(answer.content)
    assert failure.json["error"]["code"] == 500
    assert done.data == DONE


async def test_late_event_after_error(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=ask(stream=True, x_fault="error_event:3+late_event_after_error"))
    *_, last, failure, late, done = events(answer.content)
    assert failure.json["error"]["code"] == 500
    assert (late.data, done.data) == (last.data, DONE)


async def test_late_event_after_done(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=ask(stream=True, x_fault="late_event_after_done"))
    *_, last, done, late = events(answer.content)
    assert (done.data, late.data) == (DONE, last.data)


async def test_huge_event(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=ask(stream=True, x_fault="huge_event:1500000"))
    assert max(len(event.data) for event in events(answer.content)) > 1_500_000
    assert contents(answer.content) == ["", *WORDS, ""]
    plain = await client.post(CHAT, json=ask(x_fault="huge_event"))
    assert len(plain.content) > 2 * 1024 * 1024
    assert plain.json()["object"] == "chat.completion"


async def test_split_utf8_tears_every_character_apart(fake_worker: FakeWorker) -> None:
    _, body = await stream_of(fake_worker, "split_utf8")
    pieces = chunks(body)
    torn = [piece for piece in pieces if piece[0] & 0xC0 == 0x80]
    assert len(torn) == sum(byte & 0xC0 == 0x80 for byte in "".join(MULTIBYTE).encode())
    assert contents(b"".join(pieces)) == ["", *MULTIBYTE, *WORDS, ""]


@pytest.mark.parametrize("stream", [False, True])
async def test_one_byte_chunks(fake_worker: FakeWorker, stream: bool) -> None:
    _, body = await post_raw(fake_worker.url, CHAT, ask(stream, x_fault="one_byte_chunks"))
    pieces = chunks(body)
    assert {len(piece) for piece in pieces} == {1}
    whole = b"".join(pieces)
    assert (contents(whole) == ["", *WORDS, ""]) if stream else json.loads(whole)["choices"]


@pytest.mark.parametrize(
    ("fault", "mark", "absent"),
    [
        ("sse_cr", b"\r\r", b"\n"),
        ("sse_crlf", b"\r\n\r\n", b"\n\n"),
        ("sse_comments", b": before\n:\ndata:", b"\r"),
        ("sse_multiline", b'data: {\ndata:  "id"', b"\r"),
        ("sse_crlf+sse_comments+sse_multiline", b": before\r\n:\r\ndata: {\r\ndata:", b"\n\n"),
    ],
)
async def test_sse_variants_mean_the_same(client: httpx.AsyncClient, fault: str, mark: bytes, absent: bytes) -> None:
    answer = await client.post(CHAT, json=ask(stream=True, x_fault=fault))
    assert mark in answer.content
    assert absent not in answer.content
    assert contents(answer.content) == ["", *WORDS, ""]
    assert events(answer.content)[-1].data == DONE


# the control plane


@pytest.mark.parametrize("kind", ["nan", "negative"])
async def test_metrics_with_impossible_numbers(fake_worker: FakeWorker, client: httpx.AsyncClient, kind: str) -> None:
    fake_worker.inject(f"metrics_garbage:{kind}")
    value = await gauge(client, "num_requests_running")
    assert value != value if kind == "nan" else value == -1


async def test_metrics_that_are_not_metrics(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    fake_worker.inject("metrics_garbage")
    assert (await client.get("/metrics")).content.startswith(b"<html>")
    fake_worker.inject("metrics_garbage:500")
    assert (await client.get("/metrics")).status_code == 500


@pytest.mark.parametrize("kind", ["huge", "endless"])
async def test_metrics_that_never_seem_to_end(fake_worker: FakeWorker, client: httpx.AsyncClient, kind: str) -> None:
    fake_worker.inject(f"metrics_garbage:{kind}")
    read = 0
    async with client.stream("GET", "/metrics") as answer:
        async for part in answer.aiter_bytes():
            read += len(part)
            if read > 5 * 1024 * 1024:
                break
    assert read > 5 * 1024 * 1024
    await fake_worker.wait_for(connections=0)


async def test_health_500(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    fake_worker.inject("health_500")
    assert (await client.get("/health")).status_code == 500
    fake_worker.heal()
    assert (await client.get("/health")).status_code == 200


# how a fault is chosen


async def test_a_model_name_may_name_a_fault(client: httpx.AsyncClient) -> None:
    assert (await client.post(CHAT, json=ask() | {"model": "m!fast_500"})).status_code == 500
    assert (await client.post(CHAT, json=ask() | {"model": "x!fast_500"})).status_code == 500
    assert (await client.post(CHAT, json=ask())).status_code == 200


async def test_a_fault_for_the_next_requests_only(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    fake_worker.inject("fast_500", times=2)
    assert [(await client.post(CHAT, json=ask())).status_code for _ in range(4)] == [500, 500, 200, 200]


async def test_a_misspelt_fault_is_refused(fake_worker: FakeWorker, client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=ask(x_fault="die_affter:3"))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x_fault")
    with pytest.raises(ValueError, match="unknown fault"):
        fake_worker.inject("die_affter:3")


def test_every_fault_has_a_test() -> None:
    with open(__file__) as file:
        text = file.read()
    assert [name for name in CATALOGUE if name not in text] == []
