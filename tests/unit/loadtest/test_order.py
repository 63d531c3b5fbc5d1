"""The simulation behind the order's default, in small."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.order import MIXES, Job, OrderFigures, OrderPlan, Simulation, capacity_per_s, jobs, rules

PLAN = OrderPlan(requests=1000)


def run(mix: str, load: float, order_s: float, seed: int = 1) -> list[Job]:
    asked = jobs(MIXES[mix], PLAN, load * capacity_per_s(MIXES[mix], PLAN), seed)
    Simulation(PLAN, rules(order_s), patience_s=PLAN.patience_s).run(asked)
    return asked


def test_a_job_alone_takes_what_its_steps_take() -> None:
    (job,) = asked = jobs(MIXES["alike"], replace(PLAN, requests=1), 1.0, seed=1)
    simulation = Simulation(PLAN, rules(0), patience_s=1.0)
    simulation.run(asked)
    prefill_s = PLAN.step_s + PLAN.step_s_per_prompt_token * job.demand.prompt
    assert job.ttft_s == pytest.approx(prefill_s)
    decoding_s = (job.demand.output - 1) * (PLAN.step_s + PLAN.step_s_per_sequence)
    assert simulation.ended_s == pytest.approx(job.arrived_s + prefill_s + decoding_s)


def test_below_capacity_all_are_served_and_hardly_wait() -> None:
    figures = OrderFigures.of(run("alike", 0.5, 0.0))
    assert figures.unserved == 0
    assert figures.most_s < 1.0


@pytest.mark.parametrize("mix", ["documents", "limited"])
def test_shortest_first_is_sooner_where_requests_differ(mix: str) -> None:
    by_arrival, shortest = (OrderFigures.of(run(mix, 2.0, order_s)) for order_s in (0.0, 0.01))
    assert shortest.mean_s < 0.9 * by_arrival.mean_s
    assert shortest.jain > 0.97


def test_nobody_waits_beyond_its_patience() -> None:
    asked = run("documents", 3.0, 0.03)
    slowest_step_s = PLAN.step_s + PLAN.slots * PLAN.step_s_per_sequence + 2048 * PLAN.step_s_per_prompt_token
    served = [job for job in asked if job.first_s is not None]
    assert len(served) < len(asked)
    most_prompts = PLAN.slots * 16_384 / PLAN.prompt_tokens_per_step
    assert max(job.ttft_s for job in served) <= PLAN.patience_s + most_prompts * slowest_step_s
