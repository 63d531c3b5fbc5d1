"""What the official clients talk to: a gateway process in front of a fake worker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.clients.conversations import Served
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.running import GatewayProcess, issue_keys, model


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fake() -> AsyncIterator[FakeWorker]:
    async with FakeWorker("m") as worker:
        yield worker


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def narrow() -> AsyncIterator[FakeWorker]:
    """The worker of the model `narrow`, which has one slot."""
    async with FakeWorker("narrow") as worker:
        yield worker


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served(
    fake: FakeWorker, narrow: FakeWorker, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    async with FakeWorker("embed", task="embed") as embedder:
        models = [model("smollm2", fake), model("embed", embedder), model("narrow", narrow, max_concurrency=1)]
        directory = tmp_path_factory.mktemp("clients")
        keys = await issue_keys(directory / "keys.yaml", "acme", admin="operators")
        auth = {"enabled": True, "key_files": [str(directory / "keys.yaml")]}
        batches = {"directory": str(directory / "kept"), "tick_s": 0.05, "commit_interval_s": 0.02}
        async with GatewayProcess(
            directory, models, key=keys["acme"], admin_key=keys["operators"], auth=auth, batches=batches
        ) as gateway:
            await gateway.ready(fake, embedder, narrow)
            yield Served(gateway, "smollm2", "smollm2:v", fake.url, keys["acme"])


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with served.client() as client:
        yield client
