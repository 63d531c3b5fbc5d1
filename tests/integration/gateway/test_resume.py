"""A stream whose worker is lost goes on on another one, where its model is set to, and the client cannot tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.fakes.reading import DONE, Event, events
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, COMPLETIONS, chat, minted_id, renamed, unstamped
from tests.integration.gateway.running import GatewayProcess, model
from tests.integration.gateway.wire import connected, dechunked

pytestmark = pytest.mark.asyncio(loop_scope="session")

GAP_S = 3.0
WORDS = ["één", " 漢字", " three", ",", " four", " 🙂"]
TEXT = "".join(WORDS)
USAGE = {"include_usage": True}
ADMISSION = {"no_worker_timeout_s": 0.3, "trust_tenant_header": True}
TENANTS = [{"name": "keen", "resume": True}, {"name": "wary", "resume": False}]
OUTCOMES = ("resumed", "failed", "not_possible")
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, chat(TEXT, model="pair", temperature=0)),
    "sampled chat": (CHAT, chat(TEXT, model="pair", temperature=0.9, max_tokens=5)),
    "stop string": (CHAT, chat(TEXT, model="pair", temperature=0, stop=["four", "never said"])),
    "completion": (COMPLETIONS, {"model": "pair", "prompt": TEXT, "temperature": 0}),
}


class House:
    """A gateway whose models go on elsewhere: `pair` has two workers for it, `lone` has none, `plain` must not."""

    def __init__(self) -> None:
        self.pair = (FakeWorker("pair"), FakeWorker("pair"))
        self.lone = FakeWorker("lone")
        self.plain = (FakeWorker("plain"), FakeWorker("plain"))
        self.gateway: GatewayProcess

    @property
    def workers(self) -> tuple[FakeWorker, ...]:
        return (*self.pair, self.lone, *self.plain)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def _shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    house = House()
    async with AsyncExitStack() as stack:
        for worker in house.workers:
            await stack.enter_async_context(worker)
        models = [
            {**model("pair", *house.pair), "resume": True},
            {**model("lone", house.lone), "resume": True},
            model("plain", *house.plain),
        ]
        directory = tmp_path_factory.mktemp("resume")
        # Every stream is cut here, on workers that have to stay.
        relay = {"gap_timeout_s": GAP_S, "failures_until_ejected": 100}
        house.gateway = await stack.enter_async_context(
            GatewayProcess(directory, models, admission=ADMISSION, relay=relay, tenants=TENANTS)
        )
        yield house


@pytest_asyncio.fixture(loop_scope="session")
async def home(_shared: House) -> AsyncIterator[House]:
    await _shared.gateway.ready(*_shared.workers)
    yield _shared
    for worker in _shared.workers:
        worker.heal()
        worker.resume()
    await _shared.gateway.idle()


def lost(body: dict[str, Any], fault: str) -> dict[str, Any]:
    """The same request, whose first worker has `fault`, whichever that is; a continuation carries no metadata."""
    return {**body, "metadata": {"x_fault": fault}}


async def stream(url: str, path: str, body: dict[str, Any], tenant: str = "") -> tuple[list[Event], bool, str]:
    """The events of a stream, whether its HTTP body was ended in order, and what was said about resuming."""
    async with connected(url) as wire:
        headers = {"content-type": "application/json", "x-request-id": "same"}
        headers |= {"x-sluice-tenant": tenant} if tenant else {}
        await wire.post(path, {**body, "stream": True}, headers)
        head = (await wire.until(b"\r\n\r\n")).decode()
        assert " 200 " in head
        try:
            content, in_order = dechunked(await wire.until(b"\r\n0\r\n") + b"\r\n")
            trailer = (await wire.until(b"\r\n")).decode()
        except asyncio.IncompleteReadError as cut:
            content, in_order, trailer = *dechunked(cut.partial), ""
    told = next((line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("x-sluice-resume")), "")
    if told == "armed" and in_order:  # the trailer says what came of it
        assert "trailer: x-sluice-resume" in head
        assert trailer.startswith("x-sluice-resume: ")
        told += trailer.strip().removeprefix("x-sluice-resume:")
    return events(unstamped(renamed(content, minted_id(head)))), in_order, told


async def whole(home: House, path: str, body: dict[str, Any]) -> list[Event]:
    """The answer as both workers give it, asked themselves; from then on both know its token ids."""
    first, second = [await stream(worker.url, path, {**body, "stream_options": USAGE}) for worker in home.pair]
    assert first == second
    return first[0]


async def outcomes(home: House) -> dict[str, float]:
    scrape = await home.gateway.scrape()
    return {outcome: scrape.sum("sluice_resumes_total", outcome=outcome) for outcome in OUTCOMES}


async def counted(home: House, before: dict[str, float], outcome: str) -> None:
    for each in OUTCOMES:
        await home.gateway.metric("sluice_resumes_total", before[each] + (each == outcome), outcome=each)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, fault) for name in BODIES for fault in ("die_after", "reset_after", "half_event", "error_event")),
        ("chat", "hang_after"),
    ],
)
async def test_a_broken_stream_goes_on_as_if_nothing_had_happened(home: House, name: str, fault: str) -> None:
    path, body = BODIES[name]
    expected = await whole(home, path, body)
    before, tokens = await outcomes(home), (await home.gateway.scrape()).sum("sluice_generation_tokens_total")
    got, in_order, told = await stream(home.gateway.url, path, lost({**body, "stream_options": USAGE}, f"{fault}:4"))
    assert got == expected
    assert (in_order, told) == (True, "armed resumed")
    await counted(home, before, "resumed")
    usage = expected[-2].json["usage"]
    await home.gateway.metric("sluice_generation_tokens_total", tokens + usage["completion_tokens"])


@pytest.mark.parametrize("name", BODIES)
async def test_wherever_it_is_cut(home: House, name: str) -> None:
    path, body = BODIES[name]
    expected = await whole(home, path, body)
    shown = [event for event in expected if event.data == DONE or event.json["choices"]]
    first = 2 if path == CHAT else 1
    last = next(number for number, event in enumerate(expected) if '"finish_reason":"' in event.data)
    for cut in range(first, last + 1):
        got, in_order, _ = await stream(home.gateway.url, path, lost(body, f"die_after:{cut}"))
        assert (got, in_order) == (shown, True)


@pytest.mark.parametrize(
    ("fault", "name"), [("die_after:1", "chat"), ("die_after:8", "chat"), ("no_done", "completion")]
)
async def test_what_has_not_begun_or_has_finished_does_not_go_on(home: House, fault: str, name: str) -> None:
    """Before its first token there is nothing to go on from, and after a finish reason nothing to go on with."""
    path, body = BODIES[name]
    expected = await whole(home, path, body)
    before, seen = await outcomes(home), sum(worker.counts.seen for worker in home.pair)
    got, in_order, told = await stream(home.gateway.url, path, lost({**body, "stream_options": USAGE}, fault))
    assert got[:-1] == expected[: len(got) - 1]
    assert (got[-1].json["error"]["code"], in_order, told) == ("worker_lost", False, "armed")
    await counted(home, before, "not_possible")
    assert sum(worker.counts.seen for worker in home.pair) == seen + 1


async def test_without_another_worker_it_ends_as_it_always_did(home: House) -> None:
    before = await outcomes(home)
    body = lost(chat(TEXT, model="lone", temperature=0), "die_after:4")
    got, in_order, told = await stream(home.gateway.url, CHAT, body)
    assert [event.json["choices"][0]["delta"].get("content") for event in got[1:-1]] == WORDS[:3]
    assert (got[-1].json["error"]["code"], in_order, told) == ("worker_lost", False, "armed")
    await counted(home, before, "not_possible")


@pytest.mark.parametrize("fault", ["die_before_byte", "fast_500", "garbage", "html200", "error_event:0"])
async def test_a_continuation_that_fails_ends_the_stream(home: House, fault: str) -> None:
    path, body = BODIES["chat"]
    expected = await whole(home, path, body)
    before = await outcomes(home)
    for worker in home.pair:
        worker.inject(fault)
    got, in_order, _ = await stream(home.gateway.url, path, lost(body, "die_after:4"))
    assert got[:4] == expected[:4]
    assert (len(got), got[-1].json["error"]["code"], in_order) == (5, "worker_lost", False)
    await counted(home, before, "failed")


async def test_a_second_loss_is_not_resumed(home: House) -> None:
    path, body = BODIES["chat"]
    expected = await whole(home, path, body)
    before = await outcomes(home)
    for worker in home.pair:
        worker.inject("die_after:2")
    got, in_order, _ = await stream(home.gateway.url, path, lost(body, "die_after:3"))
    assert got[:5] == expected[:5]
    assert (len(got), got[-1].json["error"]["code"], in_order) == (6, "worker_lost", False)
    after = await outcomes(home)
    assert {each: after[each] - before[each] for each in OUTCOMES} == {"resumed": 1, "failed": 0, "not_possible": 1}


async def test_another_answer_is_not_taken_for_the_rest(home: House) -> None:
    """Held back for the stop string, text that the client has must come again; this worker says something else."""
    path, body = BODIES["stop string"]
    await whole(home, path, body)
    before = await outcomes(home)
    for worker in home.pair:
        worker.inject("split_utf8")  # puts other words in front
    got, in_order, _ = await stream(home.gateway.url, path, lost(body, "die_after:5"))
    assert (got[-1].json["error"]["code"], in_order) == ("worker_lost", False)
    await counted(home, before, "failed")


async def test_a_client_that_leaves_after_the_resume_is_noticed(home: House) -> None:
    path, body = BODIES["chat"]
    await whole(home, path, body)
    cancelled = (await home.gateway.scrape()).sum("sluice_requests_total", outcome="cancelled")
    for worker in home.pair:
        worker.inject("hang_after:2")
    async with connected(home.gateway.url) as wire:
        await wire.post(path, lost({**body, "stream": True}, "die_after:3"))
        await wire.until(WORDS[2].encode())
        assert sum(worker.counts.open for worker in home.pair) == 1
    for worker in home.pair:
        await worker.wait_for(open=0)
    await home.gateway.idle()
    await home.gateway.metric("sluice_requests_total", cancelled + 1, outcome="cancelled")


async def test_the_official_client_reads_one_answer(home: House) -> None:
    await whole(home, CHAT, BODIES["chat"][1])
    async with openai.AsyncOpenAI(base_url=f"{home.gateway.url}/v1", api_key="none", max_retries=0) as client:
        chunks = await client.chat.completions.create(
            model="pair",
            messages=[{"role": "user", "content": TEXT}],
            temperature=0,
            stream=True,
            metadata={"x_fault": "die_after:4"},
        )
        read = [chunk async for chunk in chunks]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in read) == TEXT
    assert len({chunk.id for chunk in read}) == 1


async def test_no_token_ids_are_shown_that_nobody_asked_for(home: House) -> None:
    path, body = BODIES["chat"]
    got, _, told = await stream(home.gateway.url, path, body)
    assert told == "armed armed"
    assert any(worker.requests[-1].body.get("return_token_ids") for worker in home.pair if worker.requests)
    assert not any('token_ids":[' in event.data for event in got)
    direct, _, _ = await stream(home.pair[0].url, path, {**body, "stream_options": USAGE})
    assert got == [event for event in direct if event.data == DONE or event.json["choices"]]


@pytest.mark.parametrize(
    ("fields", "told"), [({"return_token_ids": True}, "return_token_ids"), ({"n": 2, "temperature": 1}, "n")]
)
async def test_what_cannot_go_on_says_why_and_is_left_alone(home: House, fields: dict[str, Any], told: str) -> None:
    body = {**chat(TEXT, model="pair"), **fields}
    direct, _, _ = await stream(home.pair[0].url, CHAT, {**body, "stream_options": USAGE})
    got, _, said = await stream(home.gateway.url, CHAT, {**body, "stream_options": USAGE})
    assert said == f"not possible: {told}"
    assert got == direct


async def test_other_models_are_not_resumed(home: House) -> None:
    before = await outcomes(home)
    body = lost(chat(TEXT, model="plain", temperature=0), "die_after:4")
    got, in_order, told = await stream(home.gateway.url, CHAT, body)
    assert (got[-1].json["error"]["code"], in_order, told) == ("worker_lost", False, "")
    asked = [received.body for worker in home.plain for received in worker.requests if "metadata" in received.body]
    assert [set(body) for body in asked] == [
        {"model", "messages", "temperature", "metadata", "stream", "stream_options"}
    ]
    assert await outcomes(home) == before


async def test_a_tenants_word_outranks_its_models(home: House) -> None:
    """Who asked for it gets it on any model, who declined gets it on none; others get what the model says."""
    plain, pair = [chat(TEXT, model=name, temperature=0) for name in ("plain", "pair")]
    for worker in home.plain:  # from now on it knows its token ids
        await stream(worker.url, CHAT, plain)
    before = await outcomes(home)
    got, in_order, told = await stream(home.gateway.url, CHAT, lost(plain, "die_after:4"), "keen")
    pieces = [event.json["choices"][0]["delta"].get("content") for event in got[:-1]]
    assert ("".join(filter(None, pieces)), got[-1].data) == (TEXT, DONE)
    assert (in_order, told) == (True, "armed resumed")
    for body, tenant in ((pair, "wary"), (plain, "somebody")):
        got, in_order, told = await stream(home.gateway.url, CHAT, lost(body, "die_after:4"), tenant)
        assert (got[-1].json["error"]["code"], in_order, told) == ("worker_lost", False, "")
    await counted(home, before, "resumed")
