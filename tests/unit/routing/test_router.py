"""Ranking: least loaded first, ready before not, every candidate with its reason."""

from __future__ import annotations

from app.catalogue import Variant, WorkerAddress
from app.routing.router import rank
from app.workers.vllm_metrics import EngineLoad
from app.workers.worker import Condition, State, Worker


def worker(
    name: str, *, in_flight: int = 0, slots: int = 8, ready: bool = True, load: EngineLoad | None = None
) -> Worker:
    address = WorkerAddress(name, "127.0.0.1", 1, "m", slots)
    condition = Condition(State.READY, "") if ready else Condition(State.LOST, "refused")
    return Worker(address, Variant("m", "v", (address,)), condition, load, in_flight=in_flight)


def order(*pool: Worker) -> list[str]:
    return [candidate.worker_id for candidate in rank(pool)]


def test_the_least_loaded_comes_first() -> None:
    assert order(worker("a", in_flight=5), worker("b", in_flight=1), worker("c", in_flight=3)) == ["b", "c", "a"]


def test_load_is_relative_to_slots() -> None:
    assert order(worker("small", in_flight=2, slots=2), worker("large", in_flight=8, slots=64)) == ["large", "small"]


def test_equal_workers_keep_the_catalogues_order() -> None:
    assert order(worker("a"), worker("b"), worker("c")) == ["a", "b", "c"]


def test_what_other_gateways_send_counts_too() -> None:
    assert order(worker("a", load=EngineLoad(4, 2, 0.5)), worker("b", in_flight=1)) == ["b", "a"]


def test_a_worker_that_is_not_ready_stays_a_candidate_and_comes_last_with_its_reason() -> None:
    ranking = rank([worker("dead", ready=False), worker("full", in_flight=99)])
    assert [(candidate.worker_id, candidate.reason) for candidate in ranking] == [
        ("full", "ready"),
        ("dead", "refused"),
    ]
