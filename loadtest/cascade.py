"""`python -m loadtest cascade`: a small variant that knows when it is unsure, on two real vLLM workers.

Each question of the evaluation tasks is answered by both variants through the gateway, the small one with its
log-probabilities: what a cascade would do at any threshold follows from these. At one threshold the gateway's own
cascade is then asked, and compared with what follows.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from app.card import TaskName, Uncertainty, UncertaintyStep
from app.catalogue import Cascade, Variant
from app.evaluation.tasks import ANSWER_TOKENS, STOP, TASKS, Item, items
from app.launcher.machine import inspect_machine
from app.relay.doubt import doubt_of, tokens_of
from app.uncertainty import TOP_LOGPROBS, WINDOW_TOKENS
from loadtest.client import Address
from loadtest.processes import ProcessError, free_address, running, until_workers_ready
from loadtest.report import circumstances, table
from loadtest.vllm_worker import MODEL, until_proven, vllm_worker

COMPLETIONS = "/v1/completions"
READY_S = 120.0
REQUEST_S = 300.0
KV_MIB = 128
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class CascadePlan:
    """What is asked: `count` questions of each task. `share` is what the gateway's own cascade is to escalate."""

    small: str = "w8a8"
    large: str = "dense"
    count: int = 40
    seed: int = 1
    share: float = 0.3
    tasks: tuple[TaskName, ...] = TASKS


@dataclass
class Answered:
    """One question: who was right, how unsure the small variant was (`measure` to value), seconds of each answer."""

    task: TaskName
    small_right: bool = False
    large_right: bool = False
    doubts: dict[str, float] = field(default_factory=dict)
    small_s: float = 0.0
    large_s: float = 0.0


@dataclass(frozen=True)
class Point:
    """What escalating above a threshold brings: of all questions. Cost is worker seconds by those of large only."""

    threshold: float
    escalated: float
    right: float
    cost: float


@dataclass
class Found:
    """`seen` is what the gateway's own cascade did at `threshold`, by `measure`: shares escalated and right."""

    answered: list[Answered]
    measure: str
    threshold: float
    escalated: float
    right: float


def point(answered: Sequence[Answered], measure: str, threshold: float) -> Point:
    """Where the cascade stands at one threshold. Pure."""
    escalated = [one for one in answered if one.doubts[measure] > threshold]
    right = sum(one.large_right if one.doubts[measure] > threshold else one.small_right for one in answered)
    cost_s = sum(one.small_s for one in answered) + sum(one.large_s for one in escalated)
    count, large_s = len(answered), sum(one.large_s for one in answered)
    return Point(threshold, len(escalated) / count, right / count, cost_s / large_s)


def threshold_for(answered: Sequence[Answered], measure: str, share: float) -> float:
    """The one above which about this share is escalated; below all where it is all of them. Pure."""
    doubts = sorted((one.doubts[measure] for one in answered), reverse=True)
    at = round(share * len(doubts))
    return doubts[at] if at < len(doubts) else -1.0


async def measure(plan: CascadePlan) -> Found:
    """Raises ProcessError when a worker or a gateway does not start, httpx.HTTPError for an answer that fails."""
    asked = [(task, item) for task in plan.tasks for item in items(task, plan.count, plan.seed)]
    with tempfile.TemporaryDirectory(prefix="sluice-cascade-") as name:
        directory = Path(name)
        async with _workers(directory, plan) as workers, httpx.AsyncClient(timeout=REQUEST_S) as client:
            async with _gateway(directory, workers, plan, client, 0.0) as door:
                answered = [await _both(client, door, plan, task, item) for task, item in asked]
            measured = _best(answered, plan.share)
            threshold = threshold_for(answered, measured, plan.share)
            async with _gateway(directory, workers, plan, client, max(0.0, threshold), measured) as door:
                own = [await _own(client, door, item) for _, item in asked]
    escalated, right = ([pair[place] for pair in own] for place in (0, 1))
    return Found(answered, measured, threshold, sum(escalated) / len(own), sum(right) / len(own))


def _best(answered: Sequence[Answered], share: float) -> str:
    """The measure that keeps more right answers at this share."""
    return max(
        ("entropy", "margin"), key=lambda name: point(answered, name, threshold_for(answered, name, share)).right
    )


def _body(item: Item, model: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": model, "prompt": item.prompt, "max_tokens": ANSWER_TOKENS, "stop": STOP, "temperature": 0, **fields,
    }  # fmt: skip


async def _both(client: httpx.AsyncClient, door: Address, plan: CascadePlan, task: TaskName, item: Item) -> Answered:
    one = Answered(task)
    began = time.perf_counter()
    body = _body(item, f"{MODEL}:{plan.small}", logprobs=TOP_LOGPROBS)
    answer = (await client.post(door.url + COMPLETIONS, json=body)).raise_for_status()
    one.small_s, one.small_right = time.perf_counter() - began, item.is_right(_text(answer))
    tokens = tokens_of(answer.content)
    one.doubts = {name: doubt_of(tokens, _calibrated(name)) for name in ("entropy", "margin")}
    began = time.perf_counter()
    answer = (await client.post(door.url + COMPLETIONS, json=_body(item, f"{MODEL}:{plan.large}"))).raise_for_status()
    one.large_s, one.large_right = time.perf_counter() - began, item.is_right(_text(answer))
    return one


async def _own(client: httpx.AsyncClient, door: Address, item: Item) -> tuple[bool, bool]:
    """Whether the gateway's cascade escalated, and whether it was right."""
    body = _body(item, MODEL, sluice={"policy": "cascade"})
    answer = (await client.post(door.url + COMPLETIONS, json=body)).raise_for_status()
    return answer.headers["x-sluice-variant-reason"] == "unsure", item.is_right(_text(answer))


def _text(answer: httpx.Response) -> str:
    text: str = json.loads(answer.content)["choices"][0]["text"]
    return text


def _calibrated(name: str) -> Cascade:
    step = UncertaintyStep(threshold=0, escalated_share=0, expected_quality=0, agreement=0)
    calibrated = Uncertainty.model_validate(
        {"measure": name, "window_tokens": WINDOW_TOKENS, "top_logprobs": TOP_LOGPROBS, "items": 1, "table": (step,)}
    )
    nobody = Variant(MODEL, "", ())
    return Cascade(nobody, nobody, calibrated, 0.0, WINDOW_TOKENS)


@asynccontextmanager
async def _workers(directory: Path, plan: CascadePlan) -> AsyncIterator[dict[str, Address]]:
    """The large variant on one core and the small one on another, each proven by a token."""
    machine = inspect_machine()
    if len(machine.cores) < 2:
        raise ProcessError("two workers need two cores")
    addresses = {plan.large: free_address(), plan.small: free_address()}
    names = {variant: f"{MODEL}:{variant}" for variant in addresses}
    large, small = (
        vllm_worker(directory, address, core, KV_MIB, machine, names[variant], variant)
        for core, (variant, address) in zip(machine.cores, addresses.items(), strict=False)
    )
    async with large, small:
        await asyncio.gather(*(until_proven(address, names[variant]) for variant, address in addresses.items()))
        yield addresses


@asynccontextmanager
async def _gateway(
    directory: Path,
    workers: Mapping[str, Address],
    plan: CascadePlan,
    client: httpx.AsyncClient,
    threshold: float,
    measured: str = "entropy",
) -> AsyncIterator[Address]:
    address = free_address()
    cascade = {"small": plan.small, "large": plan.large, "threshold": threshold, "measure": measured}
    variants = [{"name": name, "workers": [{"url": worker.url}]} for name, worker in workers.items()]
    config = {
        "listen": {"host": address.host, "port": address.port},
        "models": [{"name": MODEL, "variants": variants, "cascade": cascade}],
        "drain_notice_s": 0,
    }
    file = directory / f"{address.port}.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [sys.executable, "-m", "app", "gateway", "--config", str(file)]
    async with running(argv, os.sched_getaffinity(0), directory / f"{address.port}.log"):
        await until_workers_ready(client, address, READY_S)
        yield address


def figures(found: Found) -> str:
    """Each variant alone, and the cascade at shares of questions escalated by either measure."""
    answered = found.answered
    count = len(answered)
    small_s, large_s = sum(one.small_s for one in answered), sum(one.large_s for one in answered)
    rows = [
        [
            "small only",
            "",
            "0.0%",
            f"{sum(one.small_right for one in answered) / count:.1%}",
            f"{small_s / large_s:.2f}",
        ],
        ["large only", "", "100.0%", f"{sum(one.large_right for one in answered) / count:.1%}", "1.00"],
    ]
    for name in ("entropy", "margin"):
        for share in SHARES:
            at = point(answered, name, threshold_for(answered, name, share))
            rows.append([name, f"{at.threshold:.3f}", f"{at.escalated:.1%}", f"{at.right:.1%}", f"{at.cost:.2f}"])
    own = ["the gateway's own", f"{found.threshold:.3f}", f"{found.escalated:.1%}", f"{found.right:.1%}", ""]
    return table(["", "threshold", "escalated", "right", "worker s, × large only"], [*rows, own])


def section(found: Found, plan: CascadePlan, versions: Mapping[str, str]) -> str:
    """The results as a section of RESULTS.md."""
    where = circumstances(versions)
    tasks = {task: [one for one in found.answered if one.task == task] for task in plan.tasks}
    by_task = "; ".join(
        f"{task}: {sum(one.small_right for one in seen)} and {sum(one.large_right for one in seen)} of {len(seen)}"
        for task, seen in tasks.items()
    )
    return f"""\
# A cascade of two real variants: {plan.small}, then {plan.large}

Commit {where.commit}, {where.date}. {where.processor}, Linux {where.kernel}, Python {where.python}; load average at the
end {where.load_average:.2f}.

{figures(found)}
Two vLLM workers on one core each, one question at a time, greedy, at most {ANSWER_TOKENS} tokens; the tasks of
`sluice evaluate`, {plan.count} questions of each, seed {plan.seed}. Right answers of the small and the large one alone:
{by_task}. Uncertainty: the highest mean of {WINDOW_TOKENS} tokens in a row, of {TOP_LOGPROBS} alternatives. The rows of
a measure follow from both variants' answers to all questions; the last row is what the gateway's policy `cascade` did
with the same questions ({found.measure}). Worker seconds include the small variant's for every question.
"""
