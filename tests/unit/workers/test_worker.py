"""A worker's state machine and its metrics, as pure functions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.workers import worker as transitions
from app.workers.vllm_metrics import EngineLoad, parse_engine_load
from app.workers.worker import Condition, State

READY = Condition(State.READY, reason="")
LIMIT = 3

STEPS = {
    "proven": transitions.proven,
    "unproven": lambda condition: transitions.unproven(condition, "why"),
    "probed": transitions.probed,
    "missed": lambda condition: transitions.missed(condition, "why", LIMIT),
    "refused": lambda condition: transitions.refused(condition, "why"),
    "failed": lambda condition: transitions.failed(condition, "why"),
    "succeeded": transitions.succeeded,
}


def after(*names: str, start: Condition | None = None) -> Condition:
    condition = start or Condition()
    for name in names:
        condition = STEPS[name](condition)
    return condition


@given(st.lists(st.sampled_from(sorted(STEPS))))
def test_nothing_but_a_token_makes_a_worker_ready(names: list[str]) -> None:
    if "proven" not in names:
        assert after(*names).state is not State.READY


@given(st.lists(st.sampled_from(sorted(STEPS))))
def test_a_lost_worker_must_prove_itself_again(names: list[str]) -> None:
    condition = after(*names, "refused", "probed")
    assert condition.state is State.UNPROVEN
    assert condition.reason


@given(st.lists(st.sampled_from(sorted(STEPS))))
def test_a_worker_that_is_not_ready_has_a_reason(names: list[str]) -> None:
    condition = after(*names)
    assert (condition.state is State.READY) == (condition.reason == "")


def test_misses_lose_a_ready_worker_only_in_a_row() -> None:
    assert after("missed", "missed", start=READY).state is State.READY
    assert after("missed", "missed", "probed", "missed", "missed", start=READY).state is State.READY
    assert after("missed", "missed", "missed", start=READY).state is State.LOST


def test_failures_lose_a_worker_only_in_a_row() -> None:
    assert after("failed", "failed", "succeeded", "failed", "failed", start=READY).state is State.READY
    assert after("failed", "failed", "failed", start=READY).state is State.LOST


def test_a_refused_connection_loses_it_at_once() -> None:
    assert after("refused", start=READY).state is State.LOST


def test_the_load_in_a_real_metrics_page() -> None:
    page = (Path(__file__).parents[2] / "wire" / "get_metrics.http").read_text(errors="replace")
    assert parse_engine_load(page) == EngineLoad(running=0, waiting=0, kv_usage=0.0, kv_tokens=182 * 32)


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
