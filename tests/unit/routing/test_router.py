"""Ranking: least loaded first, ready before not, every candidate with its reason."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.catalogue import Variant, WorkerAddress
from app.routing.router import rank
from app.routing.scorers import quickness
from app.workers.vllm_metrics import EngineLoad
from app.workers.worker import Condition, Pace, State, Worker


def worker(
    name: str,
    *,
    in_flight: int = 0,
    slots: int = 8,
    ready: bool = True,
    load: EngineLoad | None = None,
    slowness: float = 1.0,
) -> Worker:
    address = WorkerAddress(name, "127.0.0.1", 1, "m", slots)
    condition = Condition(State.READY, "") if ready else Condition(State.LOST, "refused")
    return Worker(
        address, Variant("m", "v", (address,)), condition, load, in_flight=in_flight, latency_s=slowness, pace=Pace(1.0)
    )


def order(*pool: Worker) -> list[str]:
    return [candidate.worker_id for candidate in rank(pool)]


def test_the_least_loaded_comes_first() -> None:
    assert order(worker("a", in_flight=5), worker("b", in_flight=1), worker("c", in_flight=3)) == ["b", "c", "a"]


def test_load_is_relative_to_slots() -> None:
    assert order(worker("small", in_flight=2, slots=2), worker("large", in_flight=8, slots=64)) == ["large", "small"]


def test_equal_workers_keep_the_catalogues_order() -> None:
    assert order(worker("a"), worker("b"), worker("c")) == ["a", "b", "c"]


def test_what_other_gateways_send_counts_too() -> None:
    idle = EngineLoad(0, 0, 0.0)
    assert order(worker("a", load=EngineLoad(4, 2, 0.5)), worker("b", in_flight=1, load=idle)) == ["b", "a"]


def test_a_worker_of_unknown_load_comes_after_all_that_have_room() -> None:
    known = worker("known", in_flight=7, load=EngineLoad(7, 0, 0.5))
    assert order(worker("unknown"), known) == ["known", "unknown"]


def test_without_any_load_our_own_counts_decide() -> None:
    assert order(worker("a", in_flight=2), worker("b", in_flight=1)) == ["b", "a"]


def test_a_slow_worker_waits_until_the_others_are_busy() -> None:
    idle = EngineLoad(0, 0, 0.0)
    slow = worker("slow", slowness=10, load=idle)
    assert order(slow, worker("quick", in_flight=5, load=idle)) == ["quick", "slow"]
    assert order(slow, worker("quick", in_flight=6, load=idle)) == ["slow", "quick"]


def test_a_little_slower_is_as_good() -> None:
    idle = EngineLoad(0, 0, 0.0)
    assert order(worker("a", slowness=2.9, load=idle), worker("b", load=idle)) == ["a", "b"]


@given(st.floats(min_value=0, allow_nan=False, allow_subnormal=False))
def test_every_slowness_has_a_score(slowness: float) -> None:
    assert 0 <= quickness(worker("a", slowness=slowness)) <= 1
