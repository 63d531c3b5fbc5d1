"""Ranking: ready before not, every candidate with its reason; least loaded, in turn, or where the prompt is cached."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import settings
from app.catalogue import Variant, WorkerAddress
from app.inference import InferenceRequest, Route
from app.routing.router import Router
from app.routing.scorers import load_limit
from app.workers.vllm_metrics import EngineLoad
from app.workers.worker import Condition, State, Worker

DENSE = Variant("m", "dense", ())
LOST = Condition(State.LOST, "refused")
READY = Condition(State.READY, "")


def worker(
    name: str,
    *,
    in_flight: int = 0,
    slots: int = 8,
    ready: bool = True,
    load: EngineLoad | None = None,
    variant: Variant = DENSE,
) -> Worker:
    address = WorkerAddress(name, "127.0.0.1", 1, "m", slots)
    return Worker(address, variant, READY if ready else LOST, load, in_flight=in_flight)


def chat(*turns: str, cache_salt: str = "", **fields: Any) -> InferenceRequest:
    """A conversation so far: the user and the assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(turns)]
    body = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    request = InferenceRequest.parse(body, request_id="r", route=Route.CHAT, arrived=0.0)
    request.cache_salt = cache_salt
    return request


def router(policy: Literal["prefix", "least_loaded", "round_robin"] = "prefix", **routing: Any) -> Router:
    return Router(settings.Routing(policy=policy, **routing))


def order(*pool: Worker, request: InferenceRequest | None = None, by: Router | None = None) -> list[str]:
    return list((by or router()).rank(pool, request or chat("hello")).worker_ids)


POLICIES_BY_LOAD = pytest.mark.parametrize("by", [router("least_loaded"), router("prefix")])


@POLICIES_BY_LOAD
def test_the_least_loaded_comes_first(by: Router) -> None:
    pool = worker("a", in_flight=5), worker("b", in_flight=1), worker("c", in_flight=3)
    assert order(*pool, by=by) == ["b", "c", "a"]


@POLICIES_BY_LOAD
def test_load_is_relative_to_slots(by: Router) -> None:
    pool = worker("small", in_flight=2, slots=2), worker("large", in_flight=8, slots=64)
    assert order(*pool, by=by) == ["large", "small"]


@POLICIES_BY_LOAD
def test_equal_workers_keep_the_catalogues_order(by: Router) -> None:
    assert order(worker("a"), worker("b"), worker("c"), by=by) == ["a", "b", "c"]


@POLICIES_BY_LOAD
def test_what_other_gateways_send_counts_too(by: Router) -> None:
    assert order(worker("a", load=EngineLoad(4, 2, 0.5)), worker("b", in_flight=1), by=by) == ["b", "a"]


@pytest.mark.parametrize("policy", ["prefix", "least_loaded", "round_robin"])
@pytest.mark.parametrize("content", ["short", "long " * 100])
def test_a_worker_that_is_not_ready_stays_a_candidate_and_comes_last_with_its_reason(policy: Any, content: str) -> None:
    pool = worker("dead", ready=False), worker("full", in_flight=99)
    ranking = router(policy).rank(pool, chat(content)).candidates
    assert [candidate.worker_id for candidate in ranking] == ["full", "dead"]
    assert ranking[1].reason == "refused"


def test_in_turn_all_ready_workers_come_first_equally_often() -> None:
    by = router("round_robin")
    pool = worker("a"), worker("b"), worker("dead", ready=False), worker("c", in_flight=7)
    rankings = [order(*pool, by=by) for _ in range(9)]
    assert [ranking[0] for ranking in rankings] == ["a", "b", "c"] * 3
    assert {ranking[-1] for ranking in rankings} == {"dead"}


def test_a_conversation_goes_back_to_its_worker() -> None:
    by, pool = router(), (worker("a"), worker("b"), worker("c"))
    for home in pool:
        first = chat(f"{home.id} asks. " * 40)
        by.sent(home, by.rank(pool, first).blocks)
    for home in pool:
        second = chat(f"{home.id} asks. " * 40, "an answer", "and another question")
        best = by.rank(pool, second).candidates[0]
        assert (best.worker_id, best.reason) == (home.id, "has the prefix")


def test_a_small_shared_part_does_not_outweigh_a_free_worker() -> None:
    by, pool = router(), (worker("a", in_flight=1, slots=2), worker("b", slots=2))
    system = "You are helpful. " * 20
    by.sent(pool[0], by.rank(pool, chat(system)).blocks)
    assert order(*pool, request=chat(system, "", "What else? " * 200), by=by) == ["b", "a"]


def test_a_worker_beyond_its_share_of_the_load_is_not_preferred() -> None:
    by, pool = router(load_bound=1.25), (worker("a", slots=64), worker("b", slots=64))
    popular = chat("popular " * 100)
    by.sent(pool[0], by.rank(pool, popular).blocks)
    went = Counter[str]()
    for _ in range(40):
        ranking = by.rank(pool, popular)
        chosen = next(one for one in pool if one.id == ranking.worker_ids[0])
        chosen.in_flight += 1
        by.sent(chosen, ranking.blocks)
        went[chosen.id] += 1
    assert max(went.values()) <= load_limit(pool[0], 39, 128, 1.25) == 25


def test_a_piled_worker_is_told_from_a_preferred_one() -> None:
    by, pool = router(), (worker("a", in_flight=9, slots=64), worker("b", slots=64))
    popular = chat("popular " * 100)
    by.sent(pool[0], by.rank(pool, popular).blocks)
    best, other = by.rank(pool, popular).candidates
    assert (best.worker_id, best.reason) == ("b", "ready")
    assert (other.worker_id, other.reason) == ("a", "has the prefix and too much of the load")


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 64)), min_size=1, max_size=8),
    st.floats(1, 4, allow_nan=False),
)
def test_some_worker_is_always_below_its_limit(pool: list[tuple[int, int]], bound: float) -> None:
    workers = [worker(str(at), in_flight=held, slots=slots) for at, (held, slots) in enumerate(pool)]
    busy, slots = sum(held for held, _ in pool), sum(slots for _, slots in pool)
    assert any(one.in_flight < load_limit(one, busy, slots, bound) for one in workers)


def test_a_full_cache_takes_in_what_it_mostly_has_and_leaves_the_rest_to_an_empty_one() -> None:
    by = router(kv_cache_tokens=1_000)
    pool = worker("full"), worker("empty")
    system = "You are helpful. " * 40
    for topic in range(8):
        by.sent(pool[0], by.rank(pool, chat(system, "", f"{topic} " * 250)).blocks)
    new = chat(system, "", "What is new? " * 150)
    known = chat(system, "", "7 " * 250, "an answer", "And more?")
    assert order(*pool, request=new, by=by) == ["empty", "full"]
    assert order(*pool, request=known, by=by) == ["full", "empty"]


def test_a_workers_own_metrics_tell_how_much_it_caches() -> None:
    by = router(kv_cache_tokens=1)
    pool = worker("a", load=EngineLoad(0, 0, 0.0, kv_tokens=100_000)), worker("b")
    prompt = chat("long " * 400)
    for one in pool:
        by.sent(one, by.rank(pool, prompt).blocks)
    assert [candidate.reason for candidate in by.rank(pool, prompt).candidates] == ["has the prefix", "ready"]


def test_new_prompts_spread_over_idle_workers_and_always_in_the_same_way() -> None:
    pool = tuple(worker(f"10.0.0.{at}:8000") for at in range(4))
    prompts = [chat(f"question {at} " * 30) for at in range(200)]
    firsts = [order(*pool, request=prompt)[0] for prompt in prompts]
    assert firsts == [order(*pool, request=prompt)[0] for prompt in prompts]
    assert min(Counter(firsts).values()) > 25
    assert len(Counter(firsts)) == 4


def test_among_equals_the_first_listed_variant_is_preferred_for_new_prompts() -> None:
    other = Variant("m", "w8a8", ())
    pool = worker("a1"), worker("a2"), worker("b1", variant=other), worker("b2", variant=other)
    for at in range(50):
        ranking = order(*pool, request=chat(f"question {at} " * 30))
        assert set(ranking[:2]) == {"a1", "a2"}


def test_tenants_do_not_find_each_others_prompts() -> None:
    by, pool = router(), (worker("a"), worker("b"))
    by.sent(pool[0], by.rank(pool, chat("secret " * 100, cache_salt="one")).blocks)
    reasons = {candidate.reason for candidate in by.rank(pool, chat("secret " * 100, cache_salt="two")).candidates}
    assert reasons == {"ready"}
    assert by.rank(pool, chat("secret " * 100, cache_salt="one")).candidates[0].reason == "has the prefix"


def test_a_lost_worker_comes_back_with_nothing_and_its_late_ends_bring_nothing_back() -> None:
    by, pool = router(), (worker("a"), worker("b"))
    prompt = chat("long " * 100)
    blocks = by.rank(pool, prompt).blocks
    by.sent(pool[0], blocks)
    pool[0].condition = LOST
    by.changed(pool[0])
    by.sent(pool[0], blocks)
    pool[0].condition = READY
    assert {candidate.reason for candidate in by.rank(pool, prompt).candidates} == {"ready"}


def test_other_state_changes_keep_the_cache() -> None:
    by, pool = router(), (worker("a"), worker("b"))
    prompt = chat("long " * 100)
    by.sent(pool[0], by.rank(pool, prompt).blocks)
    by.changed(pool[0])
    assert by.rank(pool, prompt).candidates[0].reason == "has the prefix"


def test_a_pool_of_one_needs_no_hashing() -> None:
    ranking = router().rank([worker("only")], chat("long " * 100))
    assert (ranking.worker_ids, list(ranking.blocks)) == (("only",), [])
