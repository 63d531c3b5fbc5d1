"""The two workers that the contract suite runs against."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.contract.real_worker import real_worker
from tests.processes import FakeWorkerProcess

MODEL = "m"
# As many slots as `sluice up` gives a worker; a step takes long enough for a probe to see requests running.
FAKE_OPTIONS = ("--prompt-tokens-details", "--max-num-seqs", "8")
VLLM = pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(600)])


@pytest.fixture(scope="session", params=["fake", VLLM])
def worker_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a worker that serves the model `m` with a context of 2,048 tokens and 8 slots."""
    if request.param == "vllm":
        with real_worker(MODEL) as url:
            yield url
    else:
        with FakeWorkerProcess(MODEL, *FAKE_OPTIONS) as worker:
            yield worker.url


@pytest.fixture
async def client(worker_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=worker_url, timeout=60) as client:
        yield client
