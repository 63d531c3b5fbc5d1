"""The fake worker as an instrument: deterministic answers, slots, cache, counters, restarts."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.engine import PrefixCache, Timing
from tests.fakes.generation import example
from tests.fakes.reading import DONE, Event, events
from tests.fakes.vocabulary import Vocabulary, pieces
from tests.fakes.worker import FakeWorker

CHAT = "/v1/chat/completions"


def ask(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


async def answer_of(worker: FakeWorker, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=worker.url, timeout=30) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


def content(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


# what it says


async def test_the_last_user_message_is_echoed(fake_worker: FakeWorker) -> None:
    answer = await answer_of(fake_worker, ask("one two three"))
    assert content(answer) == "one two three"
    # Three words and the end token.
    assert answer["usage"]["completion_tokens"] == 4


async def test_ignore_eos_repeats_up_to_the_limit(fake_worker: FakeWorker) -> None:
    answer = await answer_of(fake_worker, ask("a b", max_tokens=5, ignore_eos=True))
    assert content(answer) == "a ba ba"
    assert answer["choices"][0]["finish_reason"] == "length"


async def streamed(worker: FakeWorker, path: str = CHAT, **fields: Any) -> list[Event]:
    """The events of a stream of five tokens."""
    body = ask("a b", **{"stream": True, "max_tokens": 5, "ignore_eos": True, **fields})
    async with httpx.AsyncClient(base_url=worker.url, timeout=30) as client:
        return events((await client.post(path, json=body)).content)


async def test_a_stream_has_an_event_a_token(fake_worker: FakeWorker) -> None:
    """Which a busy vLLM has not: the contract does not ask for it, tests that count events of the fake do."""
    _, *chunks, end = await streamed(fake_worker, return_token_ids=True)
    assert [len(chunk.json["choices"][0]["token_ids"]) for chunk in chunks] == [1] * 5
    assert end.data == DONE

    options = {"include_usage": True, "continuous_usage_stats": True}
    *counted, _, _ = await streamed(fake_worker, stream_options=options)
    assert [chunk.json["usage"]["completion_tokens"] for chunk in counted] == [0, 1, 2, 3, 4, 5]

    _, _, *both, _ = await streamed(fake_worker, n=2, temperature=1.0)
    for index in (0, 1):
        own = [choice for chunk in both for choice in chunk.json["choices"] if choice["index"] == index]
        assert [choice["finish_reason"] for choice in own] == [None] * 4 + ["length"]

    *texts, _ = await streamed(fake_worker, "/v1/completions", prompt="a b")
    assert [chunk.json["choices"][0]["finish_reason"] for chunk in texts] == [None] * 4 + ["length"]

    messages = await streamed(fake_worker, "/v1/messages")
    assert [event.name for event in messages].count("content_block_delta") == 5


async def test_a_nonce_marks_every_token(fake_worker: FakeWorker) -> None:
    assert content(await answer_of(fake_worker, ask(nonce="k7", max_tokens=3))) == " k7-0 k7-1 k7-2"


async def test_auto_calls_the_tool_that_the_user_names(fake_worker: FakeWorker) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("add", "subtract")]
    called = (await answer_of(fake_worker, ask("please subtract", tools=tools)))["choices"][0]
    assert called["message"]["tool_calls"][0]["function"] == {"name": "subtract", "arguments": '{"x": 7}'}
    assert called["finish_reason"] == "tool_calls"
    plain = (await answer_of(fake_worker, ask("hello", tools=tools)))["choices"][0]
    assert "tool_calls" not in plain["message"]


@given(st.text())
def test_tokens_join_to_the_text_and_decode_back(text: str) -> None:
    vocabulary = Vocabulary()
    words = pieces(text)
    assert "".join(words) == text
    assert vocabulary.decode(vocabulary.encode(words)) == words


def test_example_obeys_its_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "minItems": 2},
            "deep": {"type": "object", "properties": {"on": {"type": "boolean"}, "none": {"type": "null"}}},
            "fixed": {"const": 4},
        },
    }
    assert example(schema) == {"kind": "a", "tags": ["Pa", "Pa"], "deep": {"on": True, "none": None}, "fixed": 4}


# slots and time


async def test_slots_are_given_in_order_of_arrival() -> None:
    async with FakeWorker(max_num_seqs=2) as worker:
        worker.hold()
        asking = []
        for number in range(4):
            asking.append(asyncio.create_task(answer_of(worker, ask(str(number)))))
            await worker.wait_for(open=number + 1)
        await worker.wait_for(running=2, waiting=2)
        asking[2].cancel()
        await worker.wait_for(aborted=1, waiting=1)
        worker.resume()
        assert [content(answer) for answer in await asyncio.gather(*asking[:2], asking[3])] == ["0", "1", "3"]
        await worker.wait_for(running=0, waiting=0)


async def test_a_cancelled_wait_gives_nothing_away() -> None:
    async with FakeWorker(max_num_seqs=1) as worker:
        for _ in range(20):
            worker.hold()
            asking = [asyncio.create_task(answer_of(worker, ask())) for _ in range(3)]
            await worker.wait_for(open=3)
            worker.resume()
            asking[1].cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        await worker.wait_for(open=0, running=0, waiting=0)
        assert worker.counts.seen == 60
        assert worker.counts.finished + worker.counts.aborted == 60


async def test_time_follows_prompt_and_batch() -> None:
    async with FakeWorker(timing=Timing(prefill_s=0.03, decode_s=0.01)) as worker:
        begun = time.monotonic()
        await answer_of(worker, ask("a b c d"))
        # One prefill and five steps; the loop's clock may be early by its resolution.
        assert time.monotonic() - begun >= 0.9 * (0.03 + 5 * 0.01)
        begun = time.monotonic()
        await answer_of(worker, ask("a", x_timing={"prefill_s": 0.2}))
        assert time.monotonic() - begun >= 0.9 * 0.2


def test_a_batch_step_grows_with_what_runs() -> None:
    timing = Timing(decode_s=0.01, decode_s_per_running=0.002)
    assert timing.step(5) == pytest.approx(0.02)
    assert Timing().slowed(10).step(5) == pytest.approx(0.01)


async def test_the_engine_queue_has_a_limit_when_asked() -> None:
    async with FakeWorker(max_num_seqs=1, max_num_queued_reqs=2) as worker:
        worker.hold()
        asking = [asyncio.create_task(answer_of(worker, ask())) for _ in range(2)]
        await worker.wait_for(running=1, waiting=1)
        async with httpx.AsyncClient(base_url=worker.url, timeout=30) as client:
            refused = await client.post(CHAT, json=ask())
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "Service Unavailable")
        worker.resume()
        await asyncio.gather(*asking)


# cache


def test_prefix_cache_finds_whole_blocks_of_the_same_beginning() -> None:
    cache = PrefixCache(block_size=4, blocks=100)
    prompt = list(range(10))
    assert cache.admit(prompt) == 0
    assert cache.admit(prompt) == 8
    assert cache.admit([*prompt[:6], 99, 99, 99]) == 4
    assert cache.admit([99, *prompt]) == 0
    # The last token is always computed, so a prompt of exactly two blocks finds one.
    assert cache.admit(prompt[:8]) == 4
    assert (cache.queries, cache.hits) == (10 + 10 + 9 + 11 + 8, 16)


def test_prefix_cache_forgets_the_longest_unused() -> None:
    cache = PrefixCache(block_size=1, blocks=4)
    cache.admit([1, 2, 3])
    cache.admit([7, 8, 9])
    assert cache.admit([1, 2, 3]) == 0
    assert cache.admit([1, 2, 3]) == 2


# life


async def test_restart_on_the_same_port_with_another_model(fake_worker: FakeWorker) -> None:
    url = fake_worker.url
    await fake_worker.stop()
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")
        fake_worker.model = "other"
        await fake_worker.start()
        assert fake_worker.url == url
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "other"
        refused = await client.post(CHAT, json=ask(model="m"))
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")


async def test_stop_resets_open_streams_and_counts_them_broken(fake_worker: FakeWorker) -> None:
    fake_worker.hold()
    async with httpx.AsyncClient(base_url=fake_worker.url, timeout=30) as client:
        async with client.stream("POST", CHAT, json=ask(stream=True)) as answer:
            await fake_worker.wait_for(running=1)
            await fake_worker.stop()
            with pytest.raises(httpx.TransportError):
                await answer.aread()
    assert (fake_worker.counts.broken, fake_worker.counts.aborted, fake_worker.counts.open) == (1, 0, 0)


async def test_requests_are_kept_as_they_arrived(fake_worker: FakeWorker) -> None:
    async with httpx.AsyncClient(base_url=fake_worker.url, headers={"x-request-id": "r1"}, timeout=30) as client:
        await client.post(CHAT, json=ask(seed=4))
        await client.get("/health")
    (received,) = fake_worker.requests
    assert (received.path, received.outcome, received.body["seed"]) == (CHAT, "finished", 4)
    assert received.headers["x-request-id"] == "r1"
    assert fake_worker.probes == {"/health": 1}


async def test_waiting_in_vain_tells_the_numbers(fake_worker: FakeWorker) -> None:
    with pytest.raises(TimeoutError, match="'seen': 0"):
        await fake_worker.wait_for(timeout_s=0.01, seen=1)
    with pytest.raises(ValueError, match="no such number: sene"):
        await fake_worker.wait_for(sene=1)


async def test_a_defect_of_the_fake_fails_its_test() -> None:
    worker = FakeWorker()
    await worker.start()
    async with httpx.AsyncClient(base_url=worker.url, timeout=30) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(CHAT, json=ask(x_timing={"decode_s": "soon"}))
    with pytest.raises(TypeError):
        await worker.stop()


# other tasks


async def test_an_embedding_worker() -> None:
    async with FakeWorker(task="embed") as worker:
        answer = await answer_of(worker, {"model": "m", "input": ["a", "b", "a"]}, "/v1/embeddings")
        first, second, third = (entry["embedding"] for entry in answer["data"])
        assert first == third != second
        assert sum(value * value for value in first) == pytest.approx(1)
        async with httpx.AsyncClient(base_url=worker.url, timeout=30) as client:
            assert (await client.post(CHAT, json=ask())).status_code == 404


async def test_a_scoring_worker_ranks_the_equal_text_first() -> None:
    async with FakeWorker(task="score") as worker:
        body = {"model": "m", "query": "b", "documents": ["a", "b", "c"], "top_n": 2}
        ranked = (await answer_of(worker, body, "/v1/rerank"))["results"]
        assert [len(ranked), ranked[0]["index"], ranked[0]["relevance_score"]] == [2, 1, pytest.approx(1)]
        scored = await answer_of(worker, {"model": "m", "text_1": "a", "text_2": ["a", "b"]}, "/v1/score")
        assert scored["data"][0]["score"] > scored["data"][1]["score"]


async def test_a_faulty_embedding_worker() -> None:
    async with (
        FakeWorker(task="embed", fault="half_event") as worker,
        httpx.AsyncClient(base_url=worker.url, timeout=30) as client,
    ):
        answer = await client.post("/v1/embeddings", json={"model": "m", "input": "a"})
        with pytest.raises(json.JSONDecodeError):
            answer.json()
