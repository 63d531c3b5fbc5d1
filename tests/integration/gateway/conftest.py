"""One gateway in front of in-process fake workers, shared by all tests of this directory that do not break it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.running import GatewayProcess, model

ROOMY: dict[str, Any] = {
    "limits": {"body_bytes": 1024 * 1024},
    "admission": {"queue_limit": 40},
}


class House:
    """A gateway and the workers behind it, each model with workers of its own.

    `m` and `metered` have one, `narrow` one with a single slot, `strict` one with two slots that refuses more itself,
    `pair` two; `embed` and `score` one each that does not generate.
    """

    def __init__(self) -> None:
        self.worker = FakeWorker("m")
        self.metered = FakeWorker("metered")
        self.narrow = FakeWorker("narrow")
        self.strict = FakeWorker("strict", max_num_queued_reqs=2)
        self.pair = (FakeWorker("pair"), FakeWorker("pair"))
        self.embed = FakeWorker("embed", task="embed")
        self.score = FakeWorker("score", task="score")
        self.gateway: GatewayProcess

    @property
    def workers(self) -> tuple[FakeWorker, ...]:
        return (self.worker, self.metered, self.narrow, self.strict, *self.pair, self.embed, self.score)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _shared_house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    house = House()
    async with AsyncExitStack() as stack:
        for worker in house.workers:
            await stack.enter_async_context(worker)
        models = [
            model("m", house.worker),
            model("metered", house.metered),
            model("narrow", house.narrow, max_concurrency=1),
            model("strict", house.strict, max_concurrency=2),
            model("pair", *house.pair),
            model("embed", house.embed),
            model("score", house.score),
        ]
        house.gateway = await stack.enter_async_context(
            GatewayProcess(tmp_path_factory.mktemp("house"), models, **ROOMY)
        )
        yield house


@pytest_asyncio.fixture(loop_scope="session")
async def house(_shared_house: House) -> AsyncIterator[House]:
    """The shared house: every worker healthy and ready at the start, nothing held at the end."""
    await _shared_house.gateway.ready(*_shared_house.workers)
    yield _shared_house
    for worker in _shared_house.workers:
        worker.heal()
        worker.resume()
    await _shared_house.gateway.idle()


@pytest.fixture
def gateway(house: House) -> GatewayProcess:
    return house.gateway


class ShortTempered:
    """A gateway whose every limit is short, so that tests reach them: `m` has one worker, `pair` two, `narrow` one
    with a single slot.
    """

    def __init__(self) -> None:
        self.worker = FakeWorker("m", max_model_len=1_000_000)
        self.narrow = FakeWorker("narrow")
        self.pair = (FakeWorker("pair"), FakeWorker("pair"))
        self.gateway: GatewayProcess

    @property
    def workers(self) -> tuple[FakeWorker, ...]:
        return (self.worker, self.narrow, *self.pair)


SHORT: dict[str, Any] = {
    "admission": {"queue_timeout_s": 0.3, "no_worker_timeout_s": 0.3},
    "relay": {"first_byte_timeout_s": 1.5, "gap_timeout_s": 0.4, "keepalive_s": 0.3, "client_stall_timeout_s": 0.6},
    "limits": {"body_bytes": 65536, "body_timeout_s": 0.4},
    "health": {"probe_interval_s": 0.1, "canary_timeout_s": 0.5, "probe_misses": 2},
}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _short_tempered(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ShortTempered]:
    short = ShortTempered()
    async with AsyncExitStack() as stack:
        for worker in short.workers:
            await stack.enter_async_context(worker)
        models = [
            model("m", short.worker),
            model("narrow", short.narrow, max_concurrency=1),
            model("pair", *short.pair, max_concurrency=2),
        ]
        short.gateway = await stack.enter_async_context(
            GatewayProcess(tmp_path_factory.mktemp("short"), models, admin=True, **SHORT)
        )
        yield short


@pytest_asyncio.fixture(loop_scope="session")
async def short(_short_tempered: ShortTempered) -> AsyncIterator[ShortTempered]:
    """The gateway with short limits: every worker healthy and ready at the start, nothing held at the end."""
    await _short_tempered.gateway.ready(*_short_tempered.workers)
    yield _short_tempered
    for worker in _short_tempered.workers:
        worker.heal()
        worker.resume()
    await _short_tempered.gateway.idle()
