"""Row F20: a request that kills whoever holds it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from app.errors import NoHealthyWorker, RequestQuarantined
from app.inference import InferenceRequest, Route
from app.relay.quarantine import cell_of
from app.workers import worker as transitions
from app.workers.worker import State
from tests.fakes.worker import FakeWorker
from tests.integration.faults.asking import Client, MakePool, attempts
from tests.integration.house import House, Told, house, request

KILLER = "kill_me_prompt"
LONG: dict[str, Any] = {"max_tokens": 100, "x_timing": {"decode_s": 0.02}}


async def revived(home: House, workers: Sequence[FakeWorker]) -> list[FakeWorker]:
    """Start those that died again; returns them."""
    dead = [worker for worker in workers if worker.crashed]
    for worker in dead:
        await worker.stop()
        await worker.start()
    for worker in workers:
        await home.becomes(worker, State.READY)
    return dead


async def test_f20_at_most_two_workers_die_of_one_request(pool: MakePool) -> None:
    workers = await pool(3)
    async with house(*workers) as home:
        told = await home.ask(KILLER)
        assert isinstance(told.error, RequestQuarantined)
        assert told.error.status == 500
        assert (b"x-should-retry", b"false") in told.error.headers()
        assert sum(worker.crashed for worker in workers) == 2
        assert len(await revived(home, workers)) == 2
        again = await home.ask(KILLER)
        assert isinstance(again.error, RequestQuarantined)
        assert not any(worker.crashed for worker in workers)
        assert (await home.ask("harmless")).ok


async def test_f20_a_worker_that_is_found_dead_twice_died_once(pool: MakePool) -> None:
    """While it dies its port may take connections and say nothing, so that it is lost, silent and lost again."""
    first, second = await pool(2)
    async with house(first, second) as home:
        worker, blame = home.known(first), home.gateway._relay._blame
        await first.stop()
        await home.becomes(first, State.LOST)
        home.runtime.registry.change(worker, transitions.missed(worker.condition, "silent", 1))
        await home.becomes(first, State.LOST)
        assert blame._deaths[worker.id] == 1
        await first.start()
        await home.becomes(first, State.READY)
        await first.stop()
        await home.becomes(first, State.LOST)
        assert blame._deaths[worker.id] == 2


async def test_f20_a_request_that_kills_within_its_stream_is_remembered_too(pool: MakePool) -> None:
    workers = await pool(3)
    async with house(*workers) as home:
        for worker in workers[:2]:
            for other in workers:
                home.known(other).latency_s = 0.0 if other is worker else 60.0
            client = Client(home, request("slowly", stream=True, **LONG))
            await client.parts(2)
            assert attempts(worker, "slowly") == 1
            worker.crash()
            assert (await client.answered()).code == "worker_lost"
            await home.becomes(worker, State.LOST, State.STALLED)
        third = await home.ask("slowly", stream=True, **LONG)
        assert isinstance(third.error, RequestQuarantined)
        assert attempts(workers[2], "slowly") == 0


async def test_f20_the_third_such_request_confines_its_tenant_to_one_worker(pool: MakePool) -> None:
    workers = await pool(3)
    async with house(*workers, admission={"no_worker_timeout_s": 0.1}) as home:
        for number in range(3):
            assert isinstance((await home.ask(f"{KILLER} {number}", tenant="t")).error, RequestQuarantined)
            await revived(home, workers)
        cell = cell_of("t", tuple(home.known(worker).id for worker in workers))
        for _ in range(5):
            assert (await home.ask("harmless", tenant="t")).ok
        assert [attempts(worker, "harmless") for worker in workers] == [
            5 if home.known(worker).id == cell else 0 for worker in workers
        ]
        fourth = await home.ask(f"{KILLER} 4", tenant="t")
        assert isinstance(fourth.error, NoHealthyWorker)
        assert [home.known(worker).id for worker in workers if worker.crashed] == [cell]


async def test_f20_requests_without_a_tenant_are_not_confined_by_one_of_them(pool: MakePool) -> None:
    workers = await pool(3)
    async with house(*workers) as home:
        for number in range(3):
            assert isinstance((await home.ask(f"{KILLER} {number}")).error, RequestQuarantined)
            await revived(home, workers)
        assert len(home.runtime.gateway._relay.screen(request("harmless"), ("a", "b", "c"))) == 3


async def test_f20_the_same_words_in_another_body_are_another_request(pool: MakePool) -> None:
    workers = await pool(3)
    async with house(*workers) as home:
        await home.ask(KILLER)
        await revived(home, workers)
        other = {"model": "m", "messages": [{"role": "user", "content": "not that"}]}
        told = Told()
        await home.read(
            InferenceRequest.parse(json.dumps(other).encode(), request_id="o", route=Route.CHAT, arrived=0.0), told
        )
        assert told.ok
