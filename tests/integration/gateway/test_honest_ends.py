"""A broken answer is told as broken, never finished by the gateway, and its connection serves nobody else."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.reading import DONE, Event, events
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, MESSAGES, RESPONSES, chat, minted_id, renamed, unstamped
from tests.integration.gateway.conftest import House, ShortTempered
from tests.integration.gateway.running import GatewayProcess, until
from tests.integration.gateway.wire import connected, dechunked

pytestmark = pytest.mark.asyncio(loop_scope="session")

WORDS = ["one", " two", " three", " four", " five"]
USAGE = {"include_usage": True}
UNREACHED = {(502, "worker_lost"), (503, "no_healthy_worker")}


async def stream_of(url: str, body: dict[str, Any], path: str = CHAT) -> tuple[list[Event], bool]:
    """The events of a stream, as if it had been asked for as `same`, and whether its HTTP body was ended in order."""
    async with connected(url) as wire:
        await wire.post(path, {**body, "stream": True}, {"content-type": "application/json", "x-request-id": "same"})
        head = await wire.until(b"\r\n\r\n")
        assert b" 200 " in head
        content, in_order = dechunked(await wire.rest() if b"connection: close" in head else await whole(wire))
    return events(unstamped(renamed(content, minted_id(head.decode())))), in_order


async def whole(wire: Any) -> bytes:
    """A chunked body up to its end or the peer's close."""
    try:
        body: bytes = await wire.until(b"0\r\n\r\n")
    except asyncio.IncompleteReadError as cut:
        body = cut.partial
    return body


async def sent_by(worker: FakeWorker, body: dict[str, Any]) -> list[Event]:
    """The events of a whole answer, asked of the worker itself."""
    found, _ = await stream_of(worker.url, {**body, "stream_options": USAGE})
    return found


def error_of(event: Event) -> tuple[str, str]:
    error = event.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["code"], error["type"]


@pytest.mark.parametrize(
    ("fault", "relayed", "code"),
    [
        ("die_after:5", 5, "worker_lost"),
        ("die_after:1", 1, "worker_lost"),
        ("bad_chunk:3", 3, "upstream_bad_response"),
        ("half_event:3", 3, "worker_lost"),
        ("no_done", 8, "worker_lost"),
        ("long_cl", 9, ""),
        ("short_cl", 7, "worker_lost"),
        ("huge_event:1500000", 2, "upstream_bad_response"),
    ],
)
async def test_a_broken_stream_ends_in_one_error_event(house: House, fault: str, relayed: int, code: str) -> None:
    body = chat("".join(WORDS), stream_options=USAGE)
    expected = await sent_by(house.worker, body)
    got, in_order = await stream_of(house.gateway.url, {**body, "x_fault": fault})
    assert got[:relayed] == expected[:relayed]
    if code:
        (last,) = got[relayed:]
        assert error_of(last) == (code, "server_error")
        assert not in_order
        assert DONE not in [event.data for event in got]
    else:  # [DONE] has arrived: nothing of the answer is missing, only HTTP's own end
        assert got[-1].data == DONE
        assert in_order


@pytest.mark.parametrize("fault", ["reset_after:4"])
async def test_a_reset_stream_keeps_to_a_prefix(house: House, fault: str) -> None:
    """A reset may take bytes with it that had not been read yet."""
    body = chat("".join(WORDS), stream_options=USAGE)
    expected = await sent_by(house.worker, body)
    got, in_order = await stream_of(house.gateway.url, {**body, "x_fault": fault})
    *before, last = got
    assert before == expected[: len(before)]
    assert len(before) <= 4
    assert error_of(last) == ("worker_lost", "server_error")
    assert not in_order


async def test_an_error_event_of_the_worker_is_relayed_and_counted_as_a_failure(house: House) -> None:
    before = (await house.gateway.scrape()).sum("sluice_requests_total", outcome="failed", code="worker_lost")
    got, in_order = await stream_of(house.gateway.url, chat("".join(WORDS), x_fault="error_event:3"))
    assert got[3].json["error"]["type"] == "InternalServerError"
    assert (got[4].data, len(got), in_order) == (DONE, 5, True)
    await house.gateway.metric("sluice_requests_total", before + 1, outcome="failed", code="worker_lost")


async def test_what_follows_an_error_event_of_the_worker_is_relayed_up_to_its_end(house: House) -> None:
    """The error is an event like any other: only `[DONE]` ends a stream, and only if the worker sends it."""
    body = chat("".join(WORDS), stream_options=USAGE)
    expected = await sent_by(house.worker, body)
    before = (await house.gateway.scrape()).sum("sluice_requests_total", outcome="failed", code="worker_lost")
    got, in_order = await stream_of(house.gateway.url, {**body, "x_fault": "error_event:3+late_event_after_error"})
    assert got[:3] == expected[:3]
    assert got[3].json["error"]["type"] == "InternalServerError"
    assert got[4] == expected[2]
    assert (got[5].data, len(got), in_order) == (DONE, 6, True)
    await house.gateway.metric("sluice_requests_total", before + 1, outcome="failed", code="worker_lost")


async def test_a_stream_that_breaks_behind_the_workers_own_error_event_gets_no_second_one(house: House) -> None:
    before = (await house.gateway.scrape()).sum("sluice_requests_total", outcome="failed", code="worker_lost")
    got, in_order = await stream_of(house.gateway.url, chat("".join(WORDS), x_fault="error_event:3+no_done"))
    assert got[3].json["error"]["type"] == "InternalServerError"
    assert (len(got), in_order) == (4, False)
    await house.gateway.metric("sluice_requests_total", before + 1, outcome="failed", code="worker_lost")


async def test_nothing_follows_the_end(house: House) -> None:
    body = chat("".join(WORDS), stream_options=USAGE)
    expected = await sent_by(house.worker, body)
    got, in_order = await stream_of(house.gateway.url, {**body, "x_fault": "late_event_after_done"})
    assert got == expected
    assert in_order


@pytest.mark.parametrize(("path", "name"), [(RESPONSES, "error"), (MESSAGES, "error")])
async def test_other_apis_hear_of_the_break_in_their_own_words(house: House, path: str, name: str) -> None:
    body = {"model": "m", "input": "a b c", "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 9}
    got, in_order = await stream_of(house.gateway.url, {**body, "x_fault": "die_after:3"}, path)
    assert len(got) == 4
    assert (got[-1].name, got[-1].json["type"]) == (name, "error")
    assert got[-1].json["code"] == "worker_lost"
    assert not in_order


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("garbage", 502, "upstream_bad_response"),
        ("html200", 502, "upstream_bad_response"),
        ("short_cl", 502, "upstream_bad_response"),
        ("long_cl", 502, "worker_lost"),
        ("bad_chunk", 502, "upstream_bad_response"),
        ("half_event", 502, "upstream_bad_response"),
        ("huge_event:9000000", 502, "upstream_bad_response"),
        ("die_after:10", 502, "worker_lost"),
        ("reset_after:10", 502, "worker_lost"),
        ("error_event", 502, "worker_lost"),
        ("fast_500", 502, "worker_lost"),
        ("draining_500", 502, "worker_lost"),
        ("die_before_byte", 503, "no_healthy_worker"),
    ],
)
async def test_a_broken_whole_answer_is_an_honest_error(house: House, fault: str, status: int, code: str) -> None:
    answer = await house.gateway.http.post(CHAT, json=chat(x_fault=fault))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (code, "server_error", None)
    assert "works" not in answer.text  # nothing of what the worker sent
    assert "EngineCore" not in answer.text
    if code != "upstream_bad_response":
        assert 1 <= int(answer.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("fault", "status"), [("garbage", 502), ("html200", 502), ("die_before_byte", 503), ("fast_500", 502)]
)
async def test_a_stream_that_never_began_is_an_honest_status(house: House, fault: str, status: int) -> None:
    answer = await house.gateway.http.post(CHAT, json=chat(stream=True, x_fault=fault))
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"


async def test_a_worker_that_hangs_up_at_once_is_an_honest_status(tmp_path: Path) -> None:
    """As a proxy does whose worker is gone. It never saw the request: once it takes connections again, it is served."""
    async with FakeWorker("m") as worker, FaultProxy(worker.port) as proxy:
        seen = {"url": f"http://127.0.0.1:{proxy.port}", "served_model": "m"}
        models = [{"name": "m", "variants": [{"name": "v", "workers": [seen]}]}]
        short = {"no_worker_timeout_s": 0.3}
        async with GatewayProcess(tmp_path, models, admission=short) as gateway:
            for turn in range(10):  # each time another request: one that comes again is soon suspect of the hanging up
                proxy.hangs_up = True
                answer = await gateway.http.post(CHAT, json=chat(nonce=f"turn {turn}"))
                assert (answer.status_code, answer.json()["error"]["code"]) in UNREACHED
                proxy.hangs_up = False

            async def is_served() -> bool:
                return (await gateway.http.post(CHAT, json=chat())).status_code == 200

            await until(is_served, "served again")


async def test_a_large_answer_is_an_answer(house: House) -> None:
    answer = await house.gateway.http.post(CHAT, json=chat(x_fault="huge_event"))
    assert answer.status_code == 200
    assert len(answer.json()["x"]) == 2 * 1024 * 1024


def attempts(workers: tuple[FakeWorker, ...], nonce: str) -> list[int]:
    """How often each worker was asked this."""
    return [sum(f'"{nonce}"'.encode() in received.request.body for received in worker.requests) for worker in workers]


async def test_a_failure_everywhere_ends_after_two_attempts(house: House) -> None:
    answer = await house.gateway.http.post(CHAT, json=chat(model="pair", nonce="twice", x_fault="die_before_byte"))
    assert answer.status_code == 502
    assert sum(attempts(house.pair, "twice")) == 2


async def test_garbage_is_not_tried_again(house: House) -> None:
    answer = await house.gateway.http.post(CHAT, json=chat(model="pair", nonce="once", x_fault="garbage"))
    assert answer.status_code == 502
    assert sum(attempts(house.pair, "once")) == 1


async def test_nothing_is_tried_again_after_the_first_byte(house: House) -> None:
    got, _ = await stream_of(house.gateway.url, chat(model="pair", nonce="begun", x_fault="die_after:1"))
    assert error_of(got[-1]) == ("worker_lost", "server_error")
    assert sum(attempts(house.pair, "begun")) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_that_does_not_begin_is_a_timeout(short: ShortTempered, stream: bool) -> None:
    answer = await short.gateway.http.post(CHAT, json=chat(stream=stream, x_fault="hang_before"))
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "upstream_timeout"
    assert answer.headers["x-should-retry"] == "false"
    await short.worker.wait_for(open=0)


async def test_a_whole_answer_that_stands_still_is_a_timeout(short: ShortTempered) -> None:
    answer = await short.gateway.http.post(CHAT, json=chat(x_fault="hang_after:10"))
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "upstream_stalled"
    await short.worker.wait_for(open=0)


async def test_a_stream_that_stands_still_ends_in_an_error_event(short: ShortTempered) -> None:
    body = chat("".join(WORDS), stream_options=USAGE)
    expected = await sent_by(short.worker, body)
    got, in_order = await stream_of(short.gateway.url, {**body, "x_fault": "hang_after:3"})
    assert got[:3] == expected[:3]
    assert [error_of(event) for event in got[3:]] == [("upstream_stalled", "server_error")]
    assert not in_order
    await short.worker.wait_for(open=0)


BREAKS = [
    "die_after:2",
    "die_before_byte",
    "garbage",
    "html200",
    "short_cl",
    "long_cl",
    "bad_chunk",
    "half_event",
    "no_done",
    "late_event_after_done",
]


async def ask_for_own(gateway: GatewayProcess, nonce: str, stream: bool) -> None:
    answer = await gateway.http.post(CHAT, json=chat(nonce=nonce, max_tokens=2, stream=stream))
    assert answer.status_code == 200, answer.text
    assert f" {nonce}-0" in answer.text
    assert answer.text.count("nonce") == 2, "a foreign answer"


async def test_a_broken_connection_never_serves_anybody_else(house: House) -> None:
    numbers = itertools.count()
    for fault, stream in itertools.product(BREAKS, (False, True)):
        await house.gateway.http.post(CHAT, json=chat(stream=False, x_fault=fault))
        await stream_of_any(house.gateway, chat(x_fault=fault))
        await leave_in_the_middle(house.gateway)
        await house.gateway.ready(house.worker)
        for _ in range(5):
            await asyncio.gather(
                *(ask_for_own(house.gateway, f"nonce{next(numbers)}", stream and n % 2 == 0) for n in range(10))
            )
    assert next(numbers) == 1000


async def leave_in_the_middle(gateway: GatewayProcess) -> None:
    """Ask for a stream and hang up while the worker still owes the rest of it."""
    async with connected(gateway.url) as wire:
        await wire.post(CHAT, chat("left behind", stream=True, x_fault="hang_after:2"))
        await wire.until(b"left")


async def stream_of_any(gateway: GatewayProcess, body: dict[str, Any]) -> None:
    """Ask for a stream and read whatever comes, to the end of it or of the connection."""
    async with connected(gateway.url) as wire:
        await wire.post(CHAT, {**body, "stream": True}, {"content-type": "application/json", "connection": "close"})
        await wire.rest()


async def test_good_connections_are_used_again(house: House) -> None:
    await house.gateway.http.post(CHAT, json=chat())
    opened = house.worker.connections
    for _ in range(20):
        await house.gateway.http.post(CHAT, json=chat())
        await house.gateway.http.post(CHAT, json=chat(stream=True))
    assert house.worker.connections <= opened


async def test_idle_connections_are_closed_before_the_worker_would(short: ShortTempered) -> None:
    await short.gateway.http.post(CHAT, json=chat())
    await short.worker.wait_for(connections=1)  # the monitor's own
