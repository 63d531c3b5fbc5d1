"""Pools of fake workers for the rows of the fault matrix."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from tests.fakes.worker import FakeWorker
from tests.integration.faults.asking import Pool


@pytest.fixture
async def pool() -> AsyncIterator[Callable[[int], Pool]]:
    """Makes the test's workers: `await pool(3)`."""
    async with AsyncExitStack() as stack:

        async def made(count: int) -> list[FakeWorker]:
            return [await stack.enter_async_context(FakeWorker("m")) for _ in range(count)]

        yield made
