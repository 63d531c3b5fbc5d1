"""Sums over calls, and goals."""

import pytest

from loadtest.pacing import NS
from loadtest.scenarios import summary
from loadtest.scenarios.calls import Call
from loadtest.scenarios.demand import Ask
from loadtest.scenarios.goals import Goal, goals_table


def call(name: str, due_s: float, first_s: float = 0, ended_s: float = 0, tokens: int = 0, code: str = "") -> Call:
    ask = Ask(name, due_s, "default", "t", 10, tokens, 2.0)
    status = 503 if code not in ("", "lost") else 200
    due_ns, first_ns, ended_ns = (round(at * NS) for at in (due_s, first_s, ended_s))
    return Call(ask, due_ns, due_ns, first_ns, ended_ns, status, code, tokens)


CALLS = [
    call("a", 1, 1.5, 3, tokens=10),
    call("b", 1, 2.5, 9, tokens=30),
    call("c", 2, ended_s=2.01, code="overloaded"),
    call("d", 2, ended_s=4, code="queue_timeout"),
    call("e", 2, 3, 4, tokens=5, code="lost"),
    call("f", 3),
]


def test_only_whole_answers_that_ended_in_the_window_are_of_use() -> None:
    assert summary.tokens_per_s(CALLS, 0, 5 * NS) == 2
    assert summary.tokens_per_s(CALLS, 0, 10 * NS) == 4


def test_every_call_ends_in_one_way() -> None:
    assert summary.endings(CALLS) == {"served": 2, "overloaded": 1, "queue_timeout": 1, "lost": 1, "open": 1}
    assert summary.served_share(CALLS) == pytest.approx(2 / 6)
    assert summary.served_share([]) is None


def test_a_refusal_on_arrival_is_not_a_wait_in_vain() -> None:
    assert summary.refusals_s(CALLS) == [pytest.approx(0.01)]


def test_waits_count_from_due_to_the_worker() -> None:
    assert summary.waits_s(CALLS, {"a": round(1.25 * NS), "zz": 0}) == [pytest.approx(0.25)]


def test_late_is_what_reached_an_engine_or_was_granted_after_its_patience() -> None:
    assert summary.late_at_engine(CALLS, {"a": round(3.02 * NS), "b": round(3.2 * NS)}) == 1
    slow = call("s", 1, 4, 5)
    slow.queued_ms = 2051
    assert (summary.granted_late(CALLS), summary.granted_late([*CALLS, slow])) == (0, 1)


def test_jains_index() -> None:
    assert summary.jain([3, 3, 3]) == pytest.approx(1)
    assert summary.jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert summary.jain([0, 0]) == 1


def test_a_goal_without_a_figure_is_missed() -> None:
    goals = [Goal("x", "≥", 95, 95.0, " %", 1), Goal("y", "≤", 5, None), Goal("z", "=", 0, 1)]
    assert [goal.is_met for goal in goals] == [True, False, False]
    assert goals_table(goals).splitlines()[2] == "| x | ≥ 95 % | 95.0 % | met |"
    assert goals_table(goals).count("**missed**") == 2
