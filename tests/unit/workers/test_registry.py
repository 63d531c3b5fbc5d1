"""What the registry learns of its workers' latencies, and when it lets go of them."""

from __future__ import annotations

import pytest

from app import settings
from app.catalogue import Catalogue
from app.telemetry.logs import open_log
from app.workers import worker as transitions
from app.workers.registry import Registry
from app.workers.worker import FAILURE_SLOWNESS, LATENCY_FADING, Worker


@pytest.fixture
def registry() -> Registry:
    """Two workers of one pool."""
    return Registry(catalogue(1, 2), open_log(settings.Logs(level="error")))


def catalogue(*ports: int) -> Catalogue:
    workers = tuple(settings.Worker(url=f"http://127.0.0.1:{port}") for port in ports)
    model = settings.Model(name="m", variants=(settings.Variant(name="v", workers=workers),))
    return Catalogue.of((model,))


def pair(registry: Registry) -> tuple[Worker, Worker]:
    first, second = registry
    return first, second


def test_latency_follows_what_is_seen_and_fades_when_nothing_is(registry: Registry) -> None:
    worker, _ = pair(registry)
    registry.took(worker, 0.1)
    assert worker.latency_s == 0.1
    for _ in range(20):
        registry.took(worker, 1.0)
    assert worker.latency_s == pytest.approx(1.0, rel=0.01)
    registry.fade(worker)
    assert worker.latency_s == pytest.approx(1.0, rel=0.01)
    registry.fade(worker)
    assert worker.latency_s == pytest.approx(LATENCY_FADING, rel=0.01)


def test_slowness_is_beside_the_quickest_of_the_pool(registry: Registry) -> None:
    slow, quick = pair(registry)
    registry.took(slow, 1.0)
    assert slow.slowness == 1.0
    registry.took(quick, 0.1)
    registry.took(slow, 1.0)
    assert quick.slowness == 1.0
    assert slow.slowness == pytest.approx(10.0)


def test_what_is_quick_enough_is_not_compared(registry: Registry) -> None:
    slower, quick = pair(registry)
    registry.took(quick, 0.001)
    registry.took(slower, 0.02)
    assert slower.slowness == 1.0
    registry.took(slower, 1.0)
    assert slower.slowness > 10


def test_a_failure_makes_the_fastest_look_slow(registry: Registry) -> None:
    failing, other = pair(registry)
    registry.took(failing, 0.001)
    registry.took(other, 0.1)
    registry.penalise(failing)
    assert failing.slowness == pytest.approx(FAILURE_SLOWNESS)
    assert other.slowness == 1.0


def test_the_first_failure_of_all_counts_as_soon_as_another_has_answered(registry: Registry) -> None:
    failing, other = pair(registry)
    registry.penalise(failing)
    registry.took(other, 0.1)
    assert failing.slowness == pytest.approx(50)


def test_penalties_of_all_do_not_grow_without_end(registry: Registry) -> None:
    for _ in range(100):
        for worker in registry:
            registry.penalise(worker)
    assert all(worker.latency_s <= 60 for worker in registry)


def test_a_worker_that_returns_has_no_past(registry: Registry) -> None:
    worker, other = pair(registry)
    registry.change(worker, transitions.proven(worker.condition, 0.0))
    registry.took(other, 0.1)
    registry.penalise(worker)
    registry.change(worker, transitions.refused(worker.condition, "gone"))
    registry.change(worker, transitions.proven(worker.condition, 1.0))
    assert (worker.latency_s, worker.slowness) == (0.0, 1.0)


def test_who_leaves_is_known_as_long_as_it_holds_something_or_is_named(registry: Registry) -> None:
    """By a ticket that waits for it, say: a grant must find it."""
    leaving, staying = pair(registry)
    leaving.in_flight = 1
    registry.adopt(catalogue(2))
    assert list(registry) == [staying]
    registry.forget(lambda worker: False)
    assert registry[leaving.id] is leaving
    leaving.in_flight = 0
    registry.forget(lambda worker: worker is leaving)
    assert registry[leaving.id] is leaving
    registry.forget(lambda worker: worker is staying)
    assert registry.find(leaving.id) is None
    assert registry[staying.id] is staying
