"""The two workers that the contract suite runs against."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.contract.real_worker import real_worker
from tests.processes import FakeWorkerProcess

MODEL = "m"
# As many slots as `sluice up` gives a worker.
FAKE_OPTIONS = ("--prompt-tokens-details", "--max-num-seqs", "8")
VLLM = pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(1800)])


@pytest.fixture(scope="session")
def fake_url() -> Iterator[str]:
    """URL of a fake worker with the options of the real one."""
    with FakeWorkerProcess(MODEL, *FAKE_OPTIONS) as worker:
        yield worker.url


@pytest.fixture(scope="session")
def vllm_url() -> Iterator[str]:
    """URL of a real vLLM, started once. Fails when its environment is missing."""
    with real_worker(MODEL) as url:
        yield url


@pytest.fixture(scope="session", params=["fake", VLLM])
def worker_url(request: pytest.FixtureRequest) -> str:
    """URL of a worker that serves the model `m` with a context of 2,048 tokens and 8 slots."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
async def client(worker_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=worker_url, timeout=60) as client:
        yield client
