"""What each policy makes of the same conversations, on a model of workers with a cache each."""

from __future__ import annotations

import random
from typing import Literal

import pytest

from app import settings
from app.routing.router import Router
from app.workers.worker import Worker
from loadtest.conversations import Workload, conversations
from tests.fakes.engine import PrefixCache
from tests.unit.routing.test_router import chat, worker

Policy = Literal["prefix", "least_loaded", "round_robin"]

IN_FLIGHT = 4
BLOCK = 32


class Pool:
    """Workers whose caches hold `blocks` blocks each, under one policy; the latest requests are still in flight."""

    def __init__(self, policy: Policy, size: int, blocks: int) -> None:
        self.router = Router(settings.Routing(policy=policy, kv_cache_tokens=blocks * BLOCK, bytes_per_token=6))
        self.workers = [worker(f"10.0.0.{at}:8000") for at in range(size)]
        self.caches = {one.id: PrefixCache(BLOCK, blocks) for one in self.workers}
        self.in_flight: list[Worker] = []

    def ask(self, *said: str) -> None:
        if len(self.in_flight) == IN_FLIGHT:
            self.in_flight.pop(0).in_flight -= 1
        ranking = self.router.rank(self.workers, chat(*said))
        chosen = next(one for one in self.workers if one.id == ranking.worker_ids[0])
        self.router.sent(chosen, ranking.blocks)
        self.caches[chosen.id].admit([hash(word) for text in said for word in text.split()])
        chosen.in_flight += 1
        self.in_flight.append(chosen)

    @property
    def hit_rate(self) -> float:
        return sum(one.hits for one in self.caches.values()) / sum(one.queries for one in self.caches.values())

    @property
    def busiest_share(self) -> float:
        return max(one.queries for one in self.caches.values()) / sum(one.queries for one in self.caches.values())


def after_a_day(policy: Policy, load: Workload, size: int, blocks: int) -> Pool:
    """All conversations to their end, each turn of all of them in an order drawn by lot."""
    pool, source = Pool(policy, size, blocks), random.Random(1)  # noqa: S311 - a load, not a secret
    talks = conversations(load, seed=1, mark="")
    for _ in range(load.turns):
        for talk in source.sample(talks, len(talks)):
            pool.ask(*(message["content"] for message in talk.ask("m", 1)["messages"]))
            talk.hear("answer " * load.answer_tokens)
    return pool


@pytest.mark.parametrize(
    ("load", "size", "blocks"),
    [
        pytest.param(Workload(conversations=8), 2, 80, id="what all caches hold and none alone"),
        pytest.param(Workload(conversations=16, systems=1), 2, 160, id="one system prompt"),
        pytest.param(Workload(conversations=24, systems=6), 4, 100, id="more workers"),
    ],
)
def test_prefix_routing_finds_more_in_the_caches_and_piles_up_nowhere(load: Workload, size: int, blocks: int) -> None:
    by_prefix, by_load, in_turn = (
        after_a_day(policy, load, size, blocks) for policy in ("prefix", "least_loaded", "round_robin")
    )
    assert by_prefix.hit_rate > 1.15 * by_load.hit_rate
    assert by_prefix.hit_rate > 1.15 * in_turn.hit_rate
    assert by_prefix.busiest_share < 1.5 / size
