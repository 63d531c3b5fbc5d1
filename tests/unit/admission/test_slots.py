"""The adaptive limit on engines whose knee is known."""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.admission.slots import HOLD, KV_MOST, WINDOW, AdaptiveSlots
from app.workers.vllm_metrics import EngineLoad

READING_S = 2.0
REQUEST_READINGS = 2
"""How long requests stay that a lowered limit no longer lets in."""


@dataclass
class Engine:
    """Under constant demand: a step takes `floor_s`, or in proportion to the batch where that is more (a roofline).

    It runs at most `max_num_seqs`; each request has `kv_share` of the cache.
    """

    floor_s: float = 0.02
    s_per_sequence: float = 0.001
    max_num_seqs: int = 256
    kv_share: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.lot = random.Random(self.seed)  # noqa: S311
        self.now = 100.0
        self.generated = 0.0
        self.preemptions = 0.0
        self.inside: list[int] = []

    @property
    def knee(self) -> float:
        return self.floor_s / self.s_per_sequence

    def tokens_per_s(self, running: int) -> float:
        return running / max(self.floor_s, self.s_per_sequence * running) if running else 0.0

    def read(self, limit: int, demand: int = 10**6) -> EngineLoad:
        """One reading, with `limit` in force since the last one. Who is in already stays for a while."""
        self.inside = [*self.inside[-REQUEST_READINGS + 1 :], min(limit, demand)]
        inside = max(self.inside)
        running = min(inside, self.max_num_seqs)
        if self.kv_share:
            fits = max(1, int(1 / self.kv_share))
            self.preemptions += running > fits
            running = min(running, fits)
        self.now += READING_S
        self.generated += self.tokens_per_s(running) * READING_S * (1 + self.noise * self.lot.uniform(-1, 1))
        usage = min(1.0, running * self.kv_share)
        return EngineLoad(running, inside - running, usage, 0, self.generated, self.preemptions, self.now)

    def brings(self, limit: int) -> float:
        """Tokens a second under that limit, for ever."""
        return self.tokens_per_s(min(limit, self.max_num_seqs, int(1 / self.kv_share) if self.kv_share else limit))


def driven(slots: AdaptiveSlots, engine: Engine, readings: int, demand: int = 10**6) -> list[int]:
    """The limits over so many readings."""
    return [slots.observe(engine.read(slots.limit, demand)) for _ in range(readings)]


SETTLED = 20 * (WINDOW + 1)
"""Readings within which any knee up to 256 is found."""


def settled(slots: AdaptiveSlots, engine: Engine) -> int:
    """The limit that it comes to, and keeps but for a look at others now and then."""
    driven(slots, engine, SETTLED)
    return int(statistics.median(driven(slots, engine, WINDOW * HOLD * 2)))


@pytest.mark.parametrize("knee", [1, 2, 3, 8, 13, 20, 57, 120])
def test_it_finds_the_knee(knee: int) -> None:
    engine, slots = Engine(s_per_sequence=0.02 / knee), AdaptiveSlots(256)
    found = settled(slots, engine)
    assert engine.brings(found) >= 0.96 * engine.brings(256)
    assert found <= knee + max(1, knee // 6)


@given(
    knee=st.integers(1, 200),
    most=st.integers(1, 256),
    max_num_seqs=st.integers(1, 256),
    noise=st.sampled_from((0.0, 0.01)),
    seed=st.integers(0, 9),
)
def test_it_keeps_the_throughput_and_no_queue_in_the_engine(
    knee: int, most: int, max_num_seqs: int, noise: float, seed: int
) -> None:
    engine = Engine(s_per_sequence=0.02 / knee, max_num_seqs=max_num_seqs, noise=noise, seed=seed)
    slots = AdaptiveSlots(most)
    seen = driven(slots, engine, SETTLED)
    assert all(1 <= limit <= most for limit in seen)
    best = engine.brings(most)
    later, waited = [], 0
    for _ in range(WINDOW * HOLD * 4):
        load = engine.read(slots.limit)
        slots.observe(load)
        later.append(engine.brings(load.running))
        waited += load.waiting > 1
    assert sum(later) / len(later) >= 0.95 * best
    assert waited <= 0.05 * len(later)


def test_it_follows_a_knee_that_moves() -> None:
    engine, slots = Engine(s_per_sequence=0.001), AdaptiveSlots(256)
    assert 17 <= settled(slots, engine) <= 23
    for knee in (60, 10):
        engine.s_per_sequence = 0.02 / knee
        driven(slots, engine, WINDOW * HOLD * 3)
        found = settled(slots, engine)
        assert engine.brings(found) >= 0.96 * engine.brings(256)
        assert found <= knee + max(1, knee // 4)


@given(st.floats(0.004, 0.9), st.integers(1, 256))
def test_it_never_lets_in_more_than_the_cache_holds(share: float, most: int) -> None:
    """Once requests of a size have been seen, the limit keeps them within KV_MOST of the cache; one may always run."""
    engine, slots = Engine(s_per_sequence=0.0, kv_share=share), AdaptiveSlots(most)
    driven(slots, engine, 4)
    for limit in driven(slots, engine, SETTLED):
        assert limit == 1 or limit * share <= KV_MOST + 1e-9


def test_requests_that_grow_push_it_down_at_once_and_small_ones_let_it_up_again() -> None:
    engine, slots = Engine(s_per_sequence=0.0001, kv_share=0.005), AdaptiveSlots(64)
    driven(slots, engine, SETTLED)
    assert slots.limit == 64
    engine.kv_share = 0.05
    driven(slots, engine, 20)
    assert slots.limit <= 18
    engine.kv_share = 0.005
    driven(slots, engine, 400)
    assert slots.limit == 64


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.floats(0, 1), st.floats(0, 1e4)), max_size=60))
def test_whatever_it_reads_it_stays_within_its_bounds(readings: list[tuple[int, int, float, float]]) -> None:
    slots, generated = AdaptiveSlots(100), 0.0
    for number, (running, waiting, usage, tokens) in enumerate(readings):
        generated += tokens
        before = slots.limit
        limit = slots.observe(EngineLoad(running, waiting, usage, 0, generated, 0.0, float(number)))
        assert 1 <= limit <= 100
        assert limit <= max(before * 2, before + 1)


def test_without_demand_nothing_changes() -> None:
    engine, slots = Engine(), AdaptiveSlots(256)
    demand = settled(slots, engine) // 2
    driven(slots, engine, WINDOW + 1, demand=demand)
    found = slots.limit
    assert set(driven(slots, engine, 500, demand=demand)) == {found}


def test_it_comes_back_from_a_limit_that_demand_does_not_reach() -> None:
    """Twelve requests tell that sixteen slots bring no more than eight did, although they do not fill them."""
    engine, slots = Engine(s_per_sequence=0.02 / 6), AdaptiveSlots(256)
    assert max(driven(slots, engine, SETTLED, demand=12)) == 16
    assert statistics.median(driven(slots, engine, WINDOW * HOLD * 2, demand=12)) <= 7


def test_the_same_load_is_not_answered_twice() -> None:
    """A state that changed between two readings shows the old one again."""
    engine, slots = Engine(), AdaptiveSlots(256)
    load = engine.read(slots.limit)
    assert {slots.observe(load) for _ in range(50)} == {8}


def test_a_restarted_worker_is_a_new_one() -> None:
    engine, slots = Engine(s_per_sequence=0.0001), AdaptiveSlots(256)
    driven(slots, engine, SETTLED)
    assert slots.limit > 100
    engine.generated = 0.0
    slots.observe(engine.read(8))
    assert slots.limit == 8


def test_who_is_steered_follows_learns_and_takes_over_where_it_is() -> None:
    engine, leader, follower = Engine(), AdaptiveSlots(256), AdaptiveSlots(256)
    for _ in range(SETTLED):
        load = engine.read(leader.limit)
        leader.observe(load)
        assert follower.observe(load, steered=leader.limit) == leader.limit
    taken_over = driven(follower, engine, WINDOW * HOLD * 3)
    moves = [abs(b - a) / a for a, b in itertools.pairwise(taken_over)]
    assert max(moves) <= 0.5
    assert engine.brings(follower.limit) >= 0.96 * engine.brings(256)
