"""The registry: every worker of the catalogue and what is known about it, and who is told when that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from app.catalogue import Catalogue, Variant, WorkerAddress
from app.telemetry.logs import Log
from app.workers import worker as transitions
from app.workers.worker import LATENCY_FADING, Condition, Pace, Worker, penalised, smoothed

Listener = Callable[[Worker], None]


class Follower(Protocol):
    """Who keeps something of its own for each worker."""

    def joined(self, worker: Worker) -> None:
        """It is new, or reached in another way from now on."""

    def left(self, worker: Worker) -> None:
        """It gets no new work; what it holds goes on."""

    def forgotten(self, worker: Worker) -> None:
        """It holds nothing any more, and nobody will name it again."""


class Registry:
    """Owns the workers' records. Only `change` alters a condition, so that every listener hears of it; only the
    registry knows a worker's pool, so it is what compares latencies.
    """

    def __init__(self, catalogue: Catalogue, log: Log) -> None:
        self._log = log
        self._listeners: list[Listener] = []
        self._followers: list[Follower] = []
        self._pools: dict[str, tuple[Worker, ...]] = {}
        self._by_id: dict[str, Worker] = {}
        self._leaving: dict[str, Worker] = {}
        self.adopt(catalogue)

    def __iter__(self) -> Iterator[Worker]:
        return (worker for pool in self._pools.values() for worker in pool)

    def __getitem__(self, worker_id: str) -> Worker:
        return self._by_id[worker_id]

    def find(self, worker_id: str) -> Worker | None:
        """As `[]`, for those who may ask late: None for a worker that is forgotten."""
        return self._by_id.get(worker_id)

    def pool(self, variants: Iterable[Variant]) -> tuple[Worker, ...]:
        """The workers of `variants`, in the variants' order."""
        return tuple(worker for variant in variants for worker in self._pools.get(variant.public_name, ()))

    @property
    def any_ready(self) -> bool:
        return any(worker.condition.serves for worker in self)

    def follow(self, follower: Follower) -> None:
        """Have `follower` told of every worker that there is, and of each that comes and goes from now on."""
        self._followers.append(follower)
        for worker in self:
            follower.joined(worker)

    def adopt(self, catalogue: Catalogue) -> None:
        """Have the workers of `catalogue`, in one step. Those that stay are what they were, with all that is known."""
        before = {worker.id: worker for worker in self}
        self._pools = {variant.public_name: self._pool(variant) for variant in catalogue.variants}
        after = {worker.id for worker in self}
        for worker_id, worker in before.items():
            if worker_id not in after:
                self._leaving[worker_id] = worker
                self.change(worker, transitions.leaving(worker.condition))
                for follower in self._followers:
                    follower.left(worker)

    def forget(self, is_named: Callable[[Worker], bool]) -> None:
        """Let go of the workers that leave and hold nothing, unless `is_named` says that somebody may still ask."""
        for worker in [one for one in self._leaving.values() if not one.in_flight and not is_named(one)]:
            del self._leaving[worker.id], self._by_id[worker.id]
            for follower in self._followers:
                follower.forgotten(worker)

    def listen(self, listener: Listener) -> None:
        """Have `listener` called, synchronously, after each change of a worker's state."""
        self._listeners.append(listener)

    def change(self, worker: Worker, condition: Condition) -> None:
        """Give `worker` a new condition."""
        before, worker.condition = worker.condition, condition
        if condition.state is before.state:
            return
        if not condition.serves:
            worker.load = None
        elif not before.serves:
            worker.latency_s = 0.0  # what it was like before says nothing about a worker that returns
        self._log.info(
            "worker state",
            worker=worker.id,
            variant=worker.variant.public_name,
            before=before.state.value,
            state=condition.state.value,
            reason=condition.reason,
        )
        for listener in self._listeners:
            listener(worker)

    def doubt(self, worker: Worker, doubt: str | None) -> None:
        """Tell the operator what there is to know about a worker; once, for as long as it stays so."""
        if doubt is not None and doubt != worker.doubt:
            self._log.warning("worker in doubt", worker=worker.id, variant=worker.variant.public_name, doubt=doubt)
        worker.doubt = doubt

    def took(self, worker: Worker, latency_s: float) -> None:
        """An attempt on `worker` got its first byte after this time."""
        self._learn(worker, smoothed(worker.latency_s, latency_s))

    def penalise(self, worker: Worker) -> None:
        """An attempt on `worker` failed."""
        others = (other for other in self._pool_of(worker) if other is not worker)
        self._learn(worker, penalised(worker.latency_s, _quickest_s(others)))

    def fade(self, worker: Worker) -> None:
        """Time passed: what was slow is worth another try, after a while without any."""
        self._learn(worker, worker.latency_s * (1.0 if worker.is_latency_fresh else LATENCY_FADING))
        worker.is_latency_fresh = False

    def _learn(self, worker: Worker, latency_s: float) -> None:
        worker.latency_s = latency_s
        worker.is_latency_fresh = True
        pool = self._pool_of(worker)
        if len(pool) > 1:  # with one there is nobody to compare it with
            worker.pace.quickest_s = _quickest_s(pool)

    def _pool_of(self, worker: Worker) -> tuple[Worker, ...]:
        return self._pools.get(worker.variant.public_name, ())

    def _pool(self, variant: Variant) -> tuple[Worker, ...]:
        pace = next((worker.pace for worker in self._pools.get(variant.public_name, ())), Pace())
        return tuple(self._worker(address, variant, pace) for address in variant.workers)

    def _worker(self, address: WorkerAddress, variant: Variant, pace: Pace) -> Worker:
        """The worker at `address`: the one that is known there, also if it was leaving, or a new one."""
        worker = self._by_id.get(address.id)
        if worker is None:
            worker = self._by_id[address.id] = Worker(address, variant, pace=pace)
            self._announce(worker)
            return worker
        known, is_other = worker.address, worker.variant.public_name != variant.public_name
        worker.address, worker.variant, worker.pace = address, variant, pace
        has_returned = self._leaving.pop(worker.id, None) is not None
        if has_returned or is_other or known.served_model != address.served_model:
            self.change(worker, transitions.unproven(worker.condition, "newly configured, no token yet"))
        if has_returned or known != address:
            self._announce(worker)
        return worker

    def _announce(self, worker: Worker) -> None:
        for follower in self._followers:
            follower.joined(worker)


def _quickest_s(workers: Iterable[Worker]) -> float:
    return min([worker.latency_s for worker in workers if worker.latency_s], default=0.0)
