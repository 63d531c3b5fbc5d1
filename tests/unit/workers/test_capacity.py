"""How many slots a worker offers."""

from __future__ import annotations

import pytest

from app.catalogue import Variant, WorkerAddress
from app.settings import Health
from app.workers.capacity import open_slots, strangers_in
from app.workers.vllm_metrics import EngineLoad
from app.workers.worker import Condition, State, Worker

RULES = Health(slow_start_s=10, kv_usage_max=0.95)


def worker(
    state: State = State.READY,
    *,
    ready_since: float | None = None,
    load: EngineLoad | None = None,
    strangers: int = 0,
) -> Worker:
    address = WorkerAddress("a", "127.0.0.1", 1, "m", 8)
    condition = Condition(state, "", ready_since=ready_since)
    return Worker(address, Variant("m", "v", (address,)), condition, load, strangers=strangers)


@pytest.mark.parametrize("state", list(State))
def test_only_a_ready_worker_has_slots(state: State) -> None:
    assert open_slots(worker(state), 0.0, RULES) == (8 if state is State.READY else 0)


@pytest.mark.parametrize(("since", "slots"), [(0.0, 1), (1.0, 1), (1.3, 2), (5.0, 4), (9.9, 8), (10.0, 8), (99.0, 8)])
def test_a_worker_that_returns_gets_its_slots_little_by_little(since: float, slots: int) -> None:
    assert open_slots(worker(ready_since=100.0), 100.0 + since, RULES) == slots


def test_without_slow_start_it_has_all_at_once() -> None:
    assert open_slots(worker(ready_since=100.0), 100.0, Health(slow_start_s=0)) == 8


@pytest.mark.parametrize(("usage", "slots"), [(0.94, 8), (0.95, 0), (1.0, 0)])
def test_no_new_work_while_the_kv_cache_is_full(usage: float, slots: int) -> None:
    assert open_slots(worker(load=EngineLoad(3, 1, usage)), 0.0, RULES) == slots


def test_an_engine_without_work_is_never_full() -> None:
    assert open_slots(worker(load=EngineLoad(0, 0, 1.0)), 0.0, RULES) == 8


@pytest.mark.parametrize(("strangers", "slots"), [(0, 8), (3, 5), (7, 1), (8, 1), (1000, 1)])
def test_strangers_take_slots_but_never_the_last(strangers: int, slots: int) -> None:
    assert open_slots(worker(strangers=strangers), 0.0, RULES) == slots


@pytest.mark.parametrize(
    ("load", "held", "strangers"),
    [(None, 0, 0), (EngineLoad(3, 2, 0), 5, 0), (EngineLoad(3, 2, 0), 1, 4), (EngineLoad(0, 0, 0), 4, 0)],
)
def test_strangers_are_what_nobody_holds_a_slot_for(load: EngineLoad | None, held: int, strangers: int) -> None:
    assert strangers_in(worker(load=load), held) == strangers
