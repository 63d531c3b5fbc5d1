"""A worker's state machine and its metrics, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalogue import Variant, WorkerAddress
from app.settings import Relay
from app.workers import worker as transitions
from app.workers.vllm_metrics import EngineLoad, parse_engine_load
from app.workers.worker import Condition, State, Worker

READY = Condition(State.READY, reason="", ready_since=-math.inf)
LIMIT = 3
RULES = Relay(failures_until_ejected=3, ejection_s=10, ejection_max_s=300)


def fails(condition: Condition, now: float = 0.0, *, may_eject: bool = True) -> Condition:
    return transitions.failed(condition, "why", now, RULES, may_eject=may_eject)


STEPS: dict[str, Callable[[Condition], Condition]] = {
    "proven": lambda condition: transitions.proven(condition, 0.0),
    "unproven": lambda condition: transitions.unproven(condition, "why"),
    "probed": transitions.probed,
    "missed": lambda condition: transitions.missed(condition, "why", LIMIT),
    "stalled": lambda condition: transitions.stalled(condition, "why"),
    "refused": lambda condition: transitions.refused(condition, "why"),
    "saturated": lambda condition: transitions.saturated(condition, 0.0, 5.0),
    "failed": fails,
    "succeeded": transitions.succeeded,
    "elapsed": lambda condition: transitions.elapsed(condition, 1000.0),
}


def after(*names: str, start: Condition | None = None) -> Condition:
    condition = start or Condition()
    for name in names:
        condition = STEPS[name](condition)
    return condition


@given(st.lists(st.sampled_from(sorted(STEPS))))
def test_nothing_but_a_token_makes_a_worker_serve(names: list[str]) -> None:
    if "proven" not in names:
        assert not after(*names).serves


@given(st.lists(st.sampled_from(sorted(STEPS))), st.sampled_from(["refused", "stalled"]))
def test_a_worker_that_was_left_must_prove_itself_again(names: list[str], how: str) -> None:
    condition = after(*names, how, "probed")
    assert condition.state is State.UNPROVEN
    assert condition.reason


@given(st.lists(st.sampled_from(sorted(STEPS))))
def test_a_worker_that_is_not_ready_has_a_reason(names: list[str]) -> None:
    condition = after(*names)
    assert (condition.state is State.READY) == (condition.reason == "")


def test_misses_in_a_row_are_a_stall() -> None:
    assert after("missed", "missed", start=READY).state is State.READY
    assert after("missed", "missed", "probed", "missed", "missed", start=READY).state is State.READY
    assert after("missed", "missed", "missed", start=READY).state is State.STALLED


def test_failures_in_a_row_eject() -> None:
    assert after("failed", "failed", "succeeded", "failed", "failed", start=READY).state is State.READY
    assert after("failed", "failed", "failed", start=READY).state is State.EJECTED


def test_a_refused_connection_loses_it_at_once() -> None:
    assert after("refused", start=READY).state is State.LOST


def test_an_ejected_worker_serves_the_whole_time_and_then_proves_itself() -> None:
    ejected = after("failed", "failed", "failed", start=READY)
    assert transitions.elapsed(ejected, 9.9).state is State.EJECTED
    assert transitions.probed(ejected).state is State.EJECTED
    assert transitions.elapsed(ejected, 10.0).state is State.UNPROVEN


def ejected_again(condition: Condition, returned: float, failed: float) -> Condition:
    """A worker that came back, and broke all that it got at one moment."""
    condition = transitions.proven(transitions.elapsed(condition, returned), returned)
    return fails(fails(fails(condition, failed), failed), failed)


def test_every_ejection_that_follows_soon_is_twice_as_long_up_to_a_limit() -> None:
    condition, now, lengths = after("failed", "failed", "failed", start=READY), 0.0, [10.0]
    for _ in range(6):
        now = condition.until
        condition = ejected_again(condition, returned=now, failed=now + 1)
        lengths.append(condition.until - now - 1)
    assert lengths == [10, 20, 40, 80, 160, 300, 300]


def test_an_ejection_is_forgiven_after_as_long_a_time_of_service() -> None:
    first = after("failed", "failed", "failed", start=READY)
    assert ejected_again(first, returned=10, failed=20).until == 20 + 20
    assert ejected_again(first, returned=10, failed=20.1).until == 20.1 + 10


def pool(*states: State) -> list[Worker]:
    address = WorkerAddress("a", "127.0.0.1", 1, "m", 8)
    return [Worker(address, Variant("m", "v", (address,)), Condition(state, "why")) for state in states]


@given(st.lists(st.sampled_from(list(State)), min_size=1, max_size=12))
def test_at_least_half_of_a_pool_is_never_ejected(states: list[State]) -> None:
    workers = pool(*states)
    serving = [worker for worker in workers if worker.condition.serves]
    if transitions.may_eject(workers) and serving:
        assert (len(serving) - 1) / len(workers) >= 0.5


@pytest.mark.parametrize(("ready", "out"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_how_many_of_a_pool_may_be_ejected(ready: int, out: int) -> None:
    workers, ejected = pool(*[State.READY] * ready), 0
    for worker in workers:
        if transitions.may_eject(workers):
            worker.condition = transitions.stalled(worker.condition, "why")
            ejected += 1
    assert ejected == out


def test_who_may_not_be_ejected_goes_on_serving() -> None:
    condition = READY
    for _ in range(10):
        condition = fails(condition, may_eject=False)
    assert (condition.state, condition.failures) == (State.READY, 10)


def test_a_rest_ends_by_itself_and_the_longest_counts() -> None:
    resting = transitions.saturated(transitions.saturated(READY, 0.0, 5.0), 1.0, 1.0)
    assert resting.state is State.RESTING
    assert resting.serves
    assert transitions.elapsed(resting, 4.9).state is State.RESTING
    assert transitions.elapsed(resting, 5.0) == READY


def test_only_a_worker_that_returns_starts_slowly() -> None:
    first = transitions.proven(Condition(), 7.0)
    assert first.ready_since == -math.inf
    assert transitions.proven(transitions.refused(first, "gone"), 9.0).ready_since == 9.0


def test_the_load_in_a_real_metrics_page() -> None:
    page = (Path(__file__).parents[2] / "wire" / "get_metrics.http").read_text(errors="replace")
    load = EngineLoad(running=0, waiting=0, kv_usage=0.0, kv_tokens=182 * 32, generated=519)
    assert parse_engine_load(page) == load


@pytest.mark.parametrize(
    ("page", "load"),
    [
        ('vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 2\n', EngineLoad(5, 0, 0)),
        ('vllm:num_requests_running{a="}"} 1\nvllm:kv_cache_usage_perc{} 7.5\n', EngineLoad(1, 0, 1.0)),
        (
            (
                "vllm:num_requests_running{} 1\n"
                'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0\n'
                'vllm:cache_config_info{num_gpu_blocks="50",hash_block_size="9",block_size="16"} 1.0\n'
            ),
            EngineLoad(1, 0, 0.0, kv_tokens=150 * 16),
        ),
        (
            'vllm:num_requests_running{} 1\nvllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0\n',
            EngineLoad(1, 0, 0.0),
        ),
        ("vllm:num_requests_running{} NaN\n", None),
        ("vllm:num_requests_running{} -1\n", None),
        ("vllm:num_requests_running{}\n", None),
        ("", None),
        ("\x00\xff{", None),
    ],
)
def test_garbage_is_no_load(page: str, load: EngineLoad | None) -> None:
    assert parse_engine_load(page) == load
