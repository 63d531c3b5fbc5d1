"""The cast of one gateway process: built here, owned here, closed here in reverse order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass

from app.admission.controller import RedisAdmission
from app.admission.local import LocalAdmission
from app.admission.roster import QueuedAdmission
from app.admission.slots import AdaptiveSlots
from app.batches.batches import Batches
from app.batches.claims import Claims, LocalClaims, RedisClaims
from app.batches.files import Files
from app.batches.journal import Journal
from app.batches.line_runs import LineRuns
from app.batches.meter import Meter
from app.batches.runner import Runner, Shelf
from app.batches.storage import open_storage
from app.catalogue import Catalogue
from app.console.board import Board
from app.console.console import Console, Sources
from app.credentials import server_secret
from app.drain import Drain
from app.errors import KeyRevoked, ModelNotFound
from app.gateway import Gateway
from app.relay.relay import Relay
from app.reload import Reload, Source
from app.routing.chooser import Chooser
from app.routing.router import Router
from app.served import Served
from app.settings import Health, Settings, is_loopback
from app.shadow import Shadows
from app.telemetry.account import Accounts, RequestsLog
from app.telemetry.logs import Log, open_audit, open_log
from app.telemetry.metrics import Metrics, open_metrics
from app.telemetry.refusals import Refusals
from app.telemetry.tracing import exported, open_tracing
from app.tenancy.authentication import Identification, KeyIdentification, OpenDoor
from app.tenancy.directory import Directory
from app.tenancy.failures import Failures
from app.tenancy.keys import Pepper
from app.tenancy.registrar import Registrar
from app.tenancy.stores import RedisKeys, stores_of
from app.tenancy.tenants import Tenants
from app.tenant import Band
from app.workers.capacity import open_slots
from app.workers.discovery import Found, expanded
from app.workers.monitor import Monitor
from app.workers.registry import Registry
from app.workers.worker import State, Worker

GAUGES_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the API needs of a running gateway."""

    settings: Settings
    catalogue: Catalogue
    registry: Registry
    gateway: Gateway
    tenants: Tenants
    identification: Identification
    directory: Directory
    registrar: Registrar | None
    admission: QueuedAdmission
    served: Served
    drain: Drain
    reload: Reload
    is_ailing: Callable[[], bool]
    gauges: Gauges
    metrics: Metrics
    log: Log
    audit: Log
    started: float
    batches: Batches | None
    refusals: Refusals
    console: Console


@asynccontextmanager
async def open_runtime(
    settings: Settings, source: Source | None = None, is_ailing: Callable[[], bool] = lambda: False
) -> AsyncIterator[Runtime]:
    """A running gateway, whose settings are followed to `source`. Raises ConfigurationError."""
    clock = time.monotonic
    log = open_log(settings.logs)
    secret = server_secret(settings.auth)
    tenants = Tenants(settings.tenants, settings.default_tenant, secret)
    metrics = open_metrics()
    metrics.show_tenants(tenants.named, tenants.weight_of)
    tenants.listen(lambda: metrics.show_tenants(tenants.named, tenants.weight_of))
    # Those whose addresses are known; `reload` finds the others before anybody is served.
    catalogue = Catalogue.of(expanded(settings.models, Found()))
    registry = Registry(catalogue, log)
    admission = _admission(settings, metrics, log)
    capacity = Capacity(admission, settings.health, clock)
    registry.listen(capacity.offer)
    router = Router(settings.routing)
    registry.listen(router.changed)
    relay = Relay(registry, settings.relay, metrics, clock)
    tracing = open_tracing(settings.tracing)
    accounts = Accounts(metrics, RequestsLog(log, settings.logs.requests), clock, tracing)
    chooser = Chooser(catalogue, registry, accounts.paces, metrics, clock, time.time)
    shadows = Shadows(lambda: len(admission.roster.waiting), metrics, clock)
    gateway = Gateway(chooser, registry, router, admission, relay, accounts, shadows, clock)
    gauges = Gauges(metrics, registry, admission, capacity)
    registry.follow(capacity)
    registry.follow(gauges)
    reload = Reload(
        settings, source, catalogue, registry, tenants, lambda worker: admission.names(worker.id), metrics, log
    )
    # In a shared ledger other gateways' requests hold slots already; they are no strangers, and only it knows of them.
    held = admission.held if settings.redis is None else None
    monitor = Monitor(registry, settings.health, clock, offer=capacity.offer, held=held)
    served = Served()
    drain = Drain(admission.turn_away, served, log)
    pepper = Pepper(secret)
    stores = stores_of(settings) if settings.is_guarded else []
    ends = Revocations(served, log)
    directory = Directory(stores, tenants, settings.auth.stale_s, log, clock, time.time, ends.revoked)
    tenants.listen(directory.look_up_tenants)
    identification = _identification(settings, directory, pepper, tenants, metrics)
    registrar = Registrar(RedisKeys(settings.redis), pepper, time.time) if settings.redis else None
    if not settings.is_guarded:
        _say_open(settings, metrics, log)
    meter = Meter(catalogue, registry, admission, accounts.ttfts, clock)
    batches = _batches(settings, gateway, meter, catalogue, tenants, drain, metrics, log)
    looks_at = catalogue, registry, admission, metrics, accounts.refusals, batches, drain
    sources = Sources(*looks_at, is_guarded=settings.is_guarded, started=time.time())
    console = Console(sources, Board(metrics.shared_directory))
    runtime = Runtime(
        settings,
        catalogue,
        registry,
        gateway,
        tenants,
        identification,
        directory,
        registrar,
        admission,
        served,
        drain,
        reload,
        is_ailing,
        gauges,
        metrics,
        log,
        audit=open_audit(settings.logs),
        started=sources.started,
        batches=batches,
        refusals=accounts.refusals,
        console=console,
    )
    try:
        async with (
            exported(tracing),
            directory.running(),
            admission.running(),
            reload.running(),
            monitor.running(),
            gauges.refreshed(),
            _running(batches),
            shadows.running(gateway.serve),
            console.running(),
        ):
            yield runtime
    finally:
        if registrar is not None:
            await registrar.aclose()
        relay.close()
        metrics.close()


class Revocations:
    """Ends what revoked keys have begun: those who wait are turned away, and streams end in an error event."""

    def __init__(self, served: Served, log: Log) -> None:
        self._served = served
        self._log = log

    def revoked(self, key_ids: Set[str]) -> None:
        ended = self._served.cut_of(key_ids, KeyRevoked("This API key was revoked."))
        self._log.info("keys revoked", keys=sorted(key_ids), requests_ended=ended)


class Capacity:
    """Tells the admission how many slots each worker has, whenever that changes."""

    def __init__(self, admission: QueuedAdmission, rules: Health, clock: Callable[[], float]) -> None:
        self._admission = admission
        self._rules = rules
        self._clock = clock
        self._adaptive: dict[str, AdaptiveSlots] = {}
        self._offered: dict[str, tuple[int, bool, int | None]] = {}

    def offer(self, worker: Worker) -> None:
        if worker.address.adapts:
            self._adapt(worker)
        slots = open_slots(worker, self._clock(), self._rules)
        offered = (slots, worker.condition.serves, worker.limit)
        if self._offered.get(worker.id) != offered:
            self._offered[worker.id] = offered
            self._admission.set_slots(worker.id, slots, is_served=worker.condition.serves, limit=worker.limit)

    def slots(self, worker: Worker) -> int:
        """The slots that were offered last."""
        offered = self._offered.get(worker.id)
        return offered[0] if offered else 0

    def joined(self, worker: Worker) -> None:
        """It has no slots before it has proven itself."""

    def left(self, worker: Worker) -> None:
        """Its state says that it has none any more."""

    def forgotten(self, worker: Worker) -> None:
        self._adaptive.pop(worker.id, None)
        self._offered.pop(worker.id, None)
        self._admission.forget(worker.id)

    def _adapt(self, worker: Worker) -> None:
        adaptive = self._adaptive.setdefault(worker.id, AdaptiveSlots(worker.address.slots))
        if worker.load is not None:
            adaptive.observe(worker.load, self._admission.steered.get(worker.id))
        worker.limit = adaptive.limit


def _identification(
    settings: Settings, directory: Directory, pepper: Pepper, tenants: Tenants, metrics: Metrics
) -> Identification:
    if not settings.is_guarded:
        return OpenDoor(tenants, trusts_header=settings.admission.trust_tenant_header)
    failures = Failures(settings.auth.failures_per_min)
    return KeyIdentification(directory, pepper, failures, metrics, time.monotonic, time.time)


def _say_open(settings: Settings, metrics: Metrics, log: Log) -> None:
    """On loopback that is what everybody expects; anywhere else somebody wrote it out, and may have forgotten."""
    metrics.open_doors.set(1)
    hosts = [settings.listen.host, *([settings.admin.host] if settings.admin else [])]
    if not all(is_loopback(host) for host in hosts):
        log.warning("no keys are asked for", listen=hosts, because="auth.enabled is false")


def _admission(settings: Settings, metrics: Metrics, log: Log) -> QueuedAdmission:
    if settings.redis is None:
        return LocalAdmission(settings.admission, metrics, time.monotonic)
    processes = settings.admission.replicas * settings.listen.processes
    return RedisAdmission(settings.admission, settings.redis, processes, metrics, log, time.monotonic)


def _batches(
    settings: Settings,
    gateway: Gateway,
    meter: Meter,
    catalogue: Catalogue,
    tenants: Tenants,
    drain: Drain,
    metrics: Metrics,
    log: Log,
) -> Batches | None:
    """None where nothing is configured to keep them in."""
    limits = settings.batches
    storage = open_storage(limits, is_alone=settings.redis is None)
    if storage is None:
        return None
    files, journal = Files(storage, time.time), Journal(storage, time.time)
    claims: Claims = LocalClaims()
    if settings.redis is not None:
        claims = RedisClaims(settings.redis, limits.lease_s, time.monotonic)
    runs = LineRuns(gateway, journal, meter, tenants.get, limits, settings.parameters, metrics, log, time.monotonic)

    def knows(tenant: str, model: str) -> bool:
        try:
            variants = catalogue.resolve(model)
        except ModelNotFound:
            return False
        return any(tenants.get(tenant).may_use(variant.model, variant.name) for variant in variants)

    runner = Runner(
        Shelf(files, journal, claims),
        runs,
        knows,
        lambda: drain.is_quiet,
        limits,
        metrics,
        log,
        time.monotonic,
        time.time,
    )
    return Batches(files, journal, claims, runner, limits, time.time)


@asynccontextmanager
async def _running(batches: Batches | None) -> AsyncIterator[None]:
    if batches is None:
        yield
        return
    async with batches.running():
        yield


class Gauges:
    """Writes what stands still between events: slots, queue, states of workers."""

    def __init__(self, metrics: Metrics, registry: Registry, admission: QueuedAdmission, capacity: Capacity) -> None:
        self._metrics = metrics
        self._registry = registry
        self._admission = admission
        self._capacity = capacity

    def write(self) -> None:
        depth, oldest = self._admission.roster.depth(), self._admission.roster.oldest()
        for band in Band:
            self._metrics.queue_depth.labels(band).set(depth[band])
            self._metrics.queue_oldest.labels(band).set(oldest.get(band, 0.0))
        for worker in self._registry:
            self._write_worker(worker)

    def _write_worker(self, worker: Worker) -> None:
        self._metrics.slots_held.labels(worker.id).set(self._admission.held(worker.id))
        self._metrics.slots_capacity.labels(worker.id).set(self._capacity.slots(worker))
        for state in State:
            is_in = worker.condition.state is state
            self._metrics.worker_state.labels(worker.id, worker.variant.public_name, state).set(is_in)

    def joined(self, worker: Worker) -> None:
        """It is written with the others."""

    def left(self, worker: Worker) -> None:
        self._write_worker(worker)

    def forgotten(self, worker: Worker) -> None:
        """Say no more about it; where several processes write, what they said last stays, as zeros."""
        self._write_worker(worker)
        for series in (self._metrics.slots_held, self._metrics.slots_capacity):
            series.remove(worker.id)
        for state in State:
            self._metrics.worker_state.labels(worker.id, worker.variant.public_name, state).set(0)
            self._metrics.worker_state.remove(worker.id, worker.variant.public_name, state)

    @asynccontextmanager
    async def refreshed(self) -> AsyncIterator[None]:
        """Keep them fresh: with several processes a scrape reads what each process last wrote."""
        task = asyncio.create_task(self._refresh())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _refresh(self) -> None:
        while True:
            self.write()
            await asyncio.sleep(GAUGES_INTERVAL_S)
