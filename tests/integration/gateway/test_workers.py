"""Which workers are used: the least loaded ones that have proven themselves with a token, and no others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.conftest import SHORT
from tests.integration.gateway.running import PATIENCE_S, GatewayProcess, model, until

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Stable:
    """A gateway whose workers are broken and mended: `m` has three, `odd` one with a trouble that a test chooses."""

    def __init__(self) -> None:
        self.pool = tuple(FakeWorker("m") for _ in range(3))
        self.odd = FakeWorker("odd")
        self.gateway: GatewayProcess


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def _stable(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stable]:
    stable = Stable()
    async with AsyncExitStack() as stack:
        for worker in (*stable.pool, stable.odd):
            await stack.enter_async_context(worker)
        models = [model("m", *stable.pool, max_concurrency=4), model("odd", stable.odd)]
        settings: dict[str, Any] = {
            # A worker whose load could not be read comes after the others: a machine that stands still is no such case.
            "health": {**SHORT["health"], "slow_start_s": 0, "probe_timeout_s": 10},
            "admission": {"no_worker_timeout_s": 0.5},
        }
        stable.gateway = await stack.enter_async_context(
            GatewayProcess(tmp_path_factory.mktemp("stable"), models, **settings)
        )
        yield stable


@pytest_asyncio.fixture(loop_scope="session")
async def stable(_stable: Stable) -> AsyncIterator[Stable]:
    workers = (*_stable.pool, _stable.odd)
    await _stable.gateway.ready(*workers)
    yield _stable
    for worker in workers:
        worker.heal()
        worker.resume()
        if worker.crashed:
            await worker.start()
    await _stable.gateway.idle()


async def ask(stable: Stable, name: str = "m", **fields: Any) -> httpx.Response:
    return await stable.gateway.http.post(CHAT, json=chat(model=name, **fields))


async def is_in(stable: Stable, worker: FakeWorker, state: str, reason: str = "") -> None:
    """Wait until `/readyz` shows the worker in a state and gives this reason."""

    async def shows() -> bool:
        told = (await stable.gateway.workers())[f"127.0.0.1:{worker.port}"]
        return told["state"] == state and reason in told["reason"]

    await until(shows, f"{worker.url} {state}: {reason}")


async def test_load_is_spread_over_the_pool(stable: Stable) -> None:
    for worker in stable.pool:
        worker.hold()
    asking = [asyncio.create_task(ask(stable)) for _ in range(9)]
    for worker in stable.pool:
        await worker.wait_for(open=3)
    for worker in stable.pool:
        worker.resume()
    assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 9


async def loads_read(stable: Stable) -> None:
    """Wait until the gateway has read every worker's own count of its work afresh."""
    asked = [worker.probes["/metrics"] for worker in stable.pool]

    async def were_read() -> bool:
        return all(worker.probes["/metrics"] > before + 1 for worker, before in zip(stable.pool, asked, strict=True))

    await until(were_read, "metrics read again")


async def test_a_busy_worker_is_spared(stable: Stable) -> None:
    busy, *idle = stable.pool
    for worker in stable.pool:
        worker.hold()
    asking = [asyncio.create_task(ask(stable)) for _ in range(9)]
    await busy.wait_for(open=3)
    for worker in idle:
        await worker.wait_for(open=3)
        worker.resume()
        await worker.wait_for(open=0)
    await loads_read(stable)
    seen = busy.counts.seen
    for _ in range(20):
        assert (await ask(stable)).status_code == 200
    assert busy.counts.seen == seen
    busy.resume()
    await asyncio.gather(*asking)


async def test_a_pinned_variant_is_the_same_pool(stable: Stable) -> None:
    assert (await ask(stable, "m:v")).status_code == 200
    assert (await ask(stable, "m:w")).json()["error"]["code"] == "model_not_found"


async def test_a_killed_worker_is_left_and_comes_back_by_itself(stable: Stable) -> None:
    killed, *others = stable.pool
    killed.crash()
    for _ in range(6):
        assert (await ask(stable)).status_code == 200
    await is_in(stable, killed, "lost")
    assert [await stable.gateway.state_of(worker) for worker in others] == ["ready", "ready"]
    assert (await stable.gateway.http.get("/readyz")).status_code == 200
    await killed.start()
    await is_in(stable, killed, "ready")
    seen = killed.counts.seen
    for worker in others:
        worker.hold()
    asking = [asyncio.create_task(ask(stable)) for _ in range(3)]
    await killed.wait_for(seen=seen + 1)
    for worker in others:
        worker.resume()
    assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 3


async def test_requests_on_a_killed_worker_go_elsewhere(stable: Stable) -> None:
    killed, *others = stable.pool
    for worker in stable.pool:
        worker.hold()
    asking = [asyncio.create_task(ask(stable, stream=True)) for _ in range(9)]
    for worker in stable.pool:
        await worker.wait_for(open=3)
    killed.crash()
    for worker in others:
        worker.resume()
    answers = await asyncio.gather(*asking)
    assert [answer.status_code for answer in answers] == [200] * 9
    assert all(answer.content.endswith(b"data: [DONE]\n\n") for answer in answers)


async def test_a_worker_that_fails_is_hardly_asked_and_no_client_notices(stable: Stable) -> None:
    failing = stable.pool[0]
    failing.inject("fast_500")
    for number in range(12):
        assert (await ask(stable, nonce=f"failing{number}")).status_code == 200
    assert sum(b"failing" in received.request.body for received in failing.requests) <= 3
    failing.heal()


async def test_a_dead_engine_behind_a_good_health_is_never_ready(stable: Stable) -> None:
    stable.odd.inject("health_ok_engine_dead")
    stable.odd.crash()
    await is_in(stable, stable.odd, "lost")
    await stable.odd.start()
    seen = stable.odd.counts.seen
    await stable.odd.wait_for(seen=seen + 3)  # asked for a token again and again
    assert stable.odd.probes["/health"] > 0
    assert await stable.gateway.state_of(stable.odd) != "ready"
    answer = await ask(stable, "odd")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_healthy_worker")
    stable.odd.heal()
    await is_in(stable, stable.odd, "ready")
    assert (await ask(stable, "odd")).status_code == 200


async def test_a_failing_health_probe_stalls_the_worker(stable: Stable) -> None:
    stable.odd.inject("health_500")
    await is_in(stable, stable.odd, "stalled", "500")
    stable.odd.heal()
    await is_in(stable, stable.odd, "ready")


async def test_a_worker_of_another_model_is_not_ready_and_says_why(stable: Stable) -> None:
    stable.odd.crash()
    await is_in(stable, stable.odd, "lost")
    stable.odd.model = "other"
    await stable.odd.start()
    try:
        await is_in(stable, stable.odd, "unproven", "serves other, not odd")
        answer = await ask(stable, "odd")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_healthy_worker")
    finally:
        stable.odd.model = "odd"
    await is_in(stable, stable.odd, "ready")


async def test_a_worker_that_changes_its_model_unnoticed_answers_nobody_with_it(stable: Stable) -> None:
    """The port and its health stay as they were, so only the worker's own 404 tells."""
    changed, *_ = stable.pool
    changed.model = "other"
    try:
        async with asyncio.timeout(PATIENCE_S):
            while await stable.gateway.state_of(changed) != "unproven":
                answer = await ask(stable)
                assert (answer.status_code, answer.json()["model"]) == (200, "m")
        await is_in(stable, changed, "unproven", "serves other, not m")
    finally:
        changed.model = "m"
    await is_in(stable, changed, "ready")


async def test_no_worker_at_all_is_said_soon(stable: Stable) -> None:
    stable.odd.crash()
    await is_in(stable, stable.odd, "lost")
    for stream in (False, True):
        begun = time.monotonic()
        answer = await ask(stable, "odd", stream=stream)
        assert 0.4 < time.monotonic() - begun < 20  # the queue's own limit is 30 s
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_healthy_worker")
        assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_who_waits_for_a_worker_is_served_when_it_comes_back(stable: Stable) -> None:
    stable.odd.crash()
    await is_in(stable, stable.odd, "lost")
    asking = asyncio.create_task(ask(stable, "odd"))
    await stable.gateway.metric("sluice_queue_depth", 1)
    await stable.odd.start()
    assert (await asking).status_code == 200


@pytest.mark.parametrize("kind", ["nan", "negative", "500", "text", "huge", "endless"])
async def test_bad_metrics_of_a_worker_change_nothing(stable: Stable, kind: str) -> None:
    stable.odd.inject(f"metrics_garbage:{kind}")
    asked = stable.odd.probes["/metrics"]

    async def was_read_again() -> bool:
        return stable.odd.probes["/metrics"] > asked + 1

    await until(was_read_again, "metrics read again")
    assert await stable.gateway.state_of(stable.odd) == "ready"
    assert (await ask(stable, "odd")).status_code == 200


async def test_models_say_whether_they_are_ready_and_how_long_their_context_is(stable: Stable) -> None:
    listed = {entry["id"]: entry for entry in (await stable.gateway.http.get("/v1/models")).json()["data"]}
    assert set(listed) == {"m", "m:v", "odd", "odd:v"}
    assert listed["m"]["variants"] == ["m:v"]
    assert (listed["m:v"]["parent"], listed["m:v"]["variant"]) == ("m", "v")
    assert all(entry["ready"] and entry["max_model_len"] == 2048 for entry in listed.values())
    assert "root" not in listed["m"]
    stable.odd.crash()
    await is_in(stable, stable.odd, "lost")
    assert (await stable.gateway.http.get("/v1/models/odd:v")).json()["ready"] is False
