"""One gateway in front of in-process fake workers, shared by all tests of this directory that do not break it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.running import GatewayProcess, model


class House:
    """A gateway and the workers behind it, each model with workers of its own: `m` and `metered` have one,
    `narrow` one with a single slot, `pair` two, `embed` and `score` one that has no chat.
    """

    def __init__(self) -> None:
        self.worker = FakeWorker("m")
        self.metered = FakeWorker("metered")
        self.narrow = FakeWorker("narrow")
        self.pair = (FakeWorker("pair"), FakeWorker("pair"))
        self.embed = FakeWorker("embed", task="embed")
        self.score = FakeWorker("score", task="score")
        self.gateway: GatewayProcess

    @property
    def workers(self) -> tuple[FakeWorker, ...]:
        return (self.worker, self.metered, self.narrow, *self.pair, self.embed, self.score)


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
            model("pair", *house.pair),
            model("embed", house.embed),
            model("score", house.score),
        ]
        house.gateway = await stack.enter_async_context(
            GatewayProcess(tmp_path_factory.mktemp("house"), models, limits={"body_bytes": 1024 * 1024})
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
