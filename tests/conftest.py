"""Fixtures shared by all tests: real Valkey, the fake worker, free ports, and a check that no process is left."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from hypothesis import HealthCheck, settings

from tests.fakes.worker import FakeWorker
from tests.ports import free_port
from tests.processes import Valkey

# The same examples every time, and no judgement of speed: a busy machine is not a bug. `make fuzz` explores.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# A shell's background job is born deaf to SIGINT, and so would be every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = (
    "tests/console/",
    "tests/e2e/",
    "tests/integration/faults/",
    "tests/integration/batches/test_faults.py",
    "tests/integration/admission/test_equivalence.py",
    "tests/integration/admission/test_invariants.py",
    "tests/integration/test_locust.py",
    "tests/hostile/test_openapi_fuzz.py",
    "tests/monitoring/test_series.py",
)
"""What `make check` leaves to `make test`: faults that take their time, long property runs, whole starts."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _no_leftover_processes() -> Iterator[None]:
    """Set up first, so torn down last: every child that any test or fixture started must be gone by then."""
    yield
    left = [f"{child.pid} {child.name()}" for child in psutil.Process().children(recursive=True)]
    assert not left, f"processes left behind: {left}"


@pytest.fixture
def unused_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    return free_port()


@pytest.fixture(scope="session")
def _shared_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def valkey(_shared_valkey: Valkey) -> Valkey:
    """The session's Valkey, emptied of keys and scripts. Tests that break the server take `own_valkey`."""
    with redis.Redis.from_url(_shared_valkey.url) as client:
        client.flushall()
        client.script_flush()
    return _shared_valkey


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A Valkey of this test alone, to be killed, paused and restarted."""
    with Valkey(tmp_path) as server:
        yield server


@pytest.fixture
async def fake_worker() -> AsyncIterator[FakeWorker]:
    """A running fake worker that serves the model `m`."""
    async with FakeWorker("m") as worker:
        yield worker
