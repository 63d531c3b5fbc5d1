"""Who gets in, who does not, and that nobody learns why."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Set
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from app import settings
from app.errors import DependencyUnavailable, GatewayError, InvalidApiKey, RateLimitExceeded
from app.telemetry.logs import open_log
from app.telemetry.metrics import Metrics
from app.tenancy.authentication import KeyIdentification, OpenDoor
from app.tenancy.directory import Directory
from app.tenancy.failures import Failures
from app.tenancy.keys import Pepper
from app.tenancy.registrar import Registrar
from app.tenancy.stores import FileKeys, KeyStore
from app.tenancy.tenants import Tenants

SAMPLES, STRETCH = 20_000, 400
ALLOWED = 0.12
"""Of some five microseconds; what a network adds differs by a hundred times as much from one request to the next."""
PEPPER = Pepper(b"secret")
TENANTS = Tenants((), settings.TenantTerms())


class Clock:
    """Time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Site:
    """Keys in a file, and who looks them up; `stores` are followed beside it."""

    def __init__(self, path: Path, *stores: KeyStore, stale_s: float = 60.0, tenants: Tenants = TENANTS) -> None:
        self.path = path
        self.clock = Clock()
        self.metrics = Metrics(CollectorRegistry())
        log = open_log(settings.Logs(level="error"))
        self.registrar = Registrar(FileKeys(path), PEPPER, self.clock)
        self.ended: list[Set[str]] = []
        self.directory = Directory(
            [FileKeys(path), *stores], tenants, stale_s, log, self.clock, self.clock, self.ended.append
        )

    def door(self, failures_per_min: int = 1_000_000) -> KeyIdentification:
        failures = Failures(failures_per_min)
        return KeyIdentification(self.directory, PEPPER, failures, self.metrics, self.clock, self.clock)


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "keys.yaml")
    await site.registrar.create("somebody")
    await site.directory.refresh()
    return site


def refusal(door: KeyIdentification, key: str) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        door.identify([(b"authorization", f"Bearer {key}".encode())], "10.0.0.1")
    return caught.value


def opens(door: KeyIdentification, key: str) -> str:
    return door.identify([(b"x-api-key", key.encode())], "10.0.0.1").tenant.name


async def test_a_key_ends_when_it_says(site: Site) -> None:
    issued = await site.registrar.create("acme", lifetime=timedelta(seconds=10))
    await site.directory.refresh()
    assert opens(site.door(), issued.text) == "acme"
    site.clock.now += 10
    assert isinstance(refusal(site.door(), issued.text), InvalidApiKey)


async def test_a_store_that_is_gone_leaves_its_keys_for_a_while(site: Site) -> None:
    issued = await site.registrar.create("acme")
    await site.directory.refresh()
    site.path.unlink()
    site.clock.now += 59
    await site.directory.refresh()
    assert opens(site.door(), issued.text) == "acme"
    site.clock.now += 1
    await site.directory.refresh()
    assert isinstance(refusal(site.door(), issued.text), InvalidApiKey)


async def test_a_key_is_not_called_wrong_before_all_stores_were_read(tmp_path: Path) -> None:
    missing = FileKeys(tmp_path / "later.yaml")
    site = Site(tmp_path / "keys.yaml", missing)
    issued = await site.registrar.create("acme")
    await site.directory.refresh()
    assert opens(site.door(), issued.text) == "acme"
    assert isinstance(refusal(site.door(), "unknown"), DependencyUnavailable)
    assert isinstance(refusal(site.door(), ""), InvalidApiKey)
    await Registrar(FileKeys(tmp_path / "later.yaml"), PEPPER, site.clock).create("late")
    await site.directory.refresh()
    assert isinstance(refusal(site.door(), "unknown"), InvalidApiKey)


async def test_wrong_keys_are_limited_and_right_ones_are_not(site: Site) -> None:
    issued = await site.registrar.create("acme")
    await site.directory.refresh()
    door = site.door(failures_per_min=2)
    kinds = [type(refusal(door, "wrong")) for _ in range(3)]
    assert kinds == [InvalidApiKey, InvalidApiKey, RateLimitExceeded]
    assert opens(door, issued.text) == "acme"
    site.clock.now += 30
    assert isinstance(refusal(door, "wrong"), InvalidApiKey)


async def test_which_keys_were_used_is_told_once(site: Site) -> None:
    issued = await site.registrar.create("acme")
    await site.directory.refresh()
    opens(site.door(), issued.text)
    assert site.directory._used == {issued.key.id}
    await site.directory.tell_used("2026-01-01T00:00Z")
    assert site.directory._used == set()


def test_an_open_door_asks_for_nothing_and_trusts_only_whom_it_is_told_to() -> None:
    header = [(b"x-sluice-tenant", b"acme"), (b"authorization", b"Bearer x")]
    assert OpenDoor(TENANTS, trusts_header=False).identify(header, "").tenant.is_anonymous
    assert OpenDoor(TENANTS, trusts_header=True).identify(header, "").tenant.name == "acme"
    assert OpenDoor(TENANTS, trusts_header=True).identify([], "").tenant.is_anonymous
    with pytest.raises(GatewayError):
        OpenDoor(TENANTS, trusts_header=True).identify([(b"x-sluice-tenant", b"a b")], "")


@pytest.mark.slow
async def test_s8_unknown_wrong_and_ended_keys_take_equally_long(site: Site) -> None:
    """20,000 samples each, taken in turn so that whatever disturbs one disturbs all, and as undisturbed as any were."""
    issued = await site.registrar.create("acme")
    ended = await site.registrar.create("acme")
    await site.registrar.revoke(ended.key.id)
    await site.directory.refresh()
    door = site.door()
    keys = {
        "unknown": "sk-sluice-" + "x" * 43,
        "first wrong": "sk-sluice-" + chr(ord(issued.text[10]) ^ 1) + issued.text[11:],
        "last wrong": issued.text[:-1] + chr(ord(issued.text[-1]) ^ 1),
        "ended": ended.text,
    }
    attempts = {name: _attempt(door, key) for name, key in keys.items()}
    took: dict[str, list[int]] = {name: [] for name in attempts}
    for _ in range(SAMPLES):
        for name, attempt in attempts.items():
            took[name].append(attempt())
    usual = {name: quietest(samples) for name, samples in took.items()}
    assert max(usual.values()) - min(usual.values()) < ALLOWED * max(usual.values()), usual


def quietest(samples: list[int]) -> float:
    """The lowest median of any stretch of them."""
    return min(statistics.median(samples[at : at + STRETCH]) for at in range(0, len(samples), STRETCH))


def _attempt(door: KeyIdentification, key: str) -> Callable[[], int]:
    headers = [(b"host", b"x"), (b"authorization", f"Bearer {key}".encode())]

    def attempt() -> int:
        begun = time.perf_counter_ns()
        try:
            door.identify(headers, "10.0.0.1")
        except InvalidApiKey:
            return time.perf_counter_ns() - begun
        raise AssertionError("it got in")

    return attempt


async def test_a_key_stands_for_its_tenant_as_it_is_now(tmp_path: Path) -> None:
    tenants = Tenants((), settings.TenantTerms())
    site = Site(tmp_path / "keys.yaml", tenants=tenants)
    issued = await site.registrar.create("acme")
    await site.directory.refresh()
    tenants.listen(site.directory.look_up_tenants)
    header = [(b"x-api-key", issued.text.encode())]
    door, open_door = site.door(), OpenDoor(tenants, trusts_header=False)
    assert door.identify(header, "").tenant.limits.is_unlimited
    acme = settings.Tenant(name="acme", limits=settings.TenantLimits(requests_per_min=5))
    tenants.change((acme,), settings.TenantTerms(weight=3))
    assert door.identify(header, "").tenant is tenants.get("acme")
    assert door.identify(header, "").tenant.limits.requests_per_min == 5
    assert open_door.identify([], "").tenant.weight == 3


async def test_who_follows_keys_hears_of_those_that_were_ended(site: Site) -> None:
    short = await site.registrar.create("acme", lifetime=timedelta(seconds=10))
    left, rotated, removed = [await site.registrar.create("acme") for _ in range(3)]
    await site.directory.refresh()
    await site.registrar.rotate(rotated.key.id, timedelta(seconds=600))
    site.clock.now += 10  # the short one's time is up
    await site.directory.refresh()
    assert site.ended == []
    await site.registrar.revoke(left.key.id)
    await site.directory.refresh()
    assert site.ended == [{left.key.id}]
    kept = [line for line in site.path.read_text().split("- ") if removed.key.id not in line]
    site.path.write_text("- ".join(kept))
    await site.directory.refresh()
    await site.directory.refresh()
    assert site.ended == [{left.key.id}, {removed.key.id}]
    assert short.key.id not in site.ended[0] | site.ended[1]


async def test_keys_that_are_too_old_to_be_believed_were_not_revoked(site: Site) -> None:
    await site.registrar.create("acme")
    await site.directory.refresh()
    site.path.unlink()
    site.clock.now += 60
    await site.directory.refresh()
    assert site.directory.kept() == []
    assert site.ended == []
