"""The registry: every worker of the catalogue and what is known about it, and who is told when that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from app.catalogue import Catalogue, Variant
from app.telemetry.logs import Log
from app.workers.worker import LATENCY_FADING, Condition, Pace, Worker, penalised, smoothed

Listener = Callable[[Worker], None]


class Registry:
    """Owns the workers' records. Only `change` alters a condition, so that every listener hears of it; only the
    registry knows a worker's pool, so it is what compares latencies.
    """

    def __init__(self, catalogue: Catalogue, log: Log) -> None:
        self._log = log
        self._listeners: list[Listener] = []
        self._pools: dict[str, tuple[Worker, ...]] = {
            variant.public_name: _pool(variant) for variant in catalogue.variants
        }
        self._by_id = {worker.id: worker for worker in self}

    def __iter__(self) -> Iterator[Worker]:
        return (worker for pool in self._pools.values() for worker in pool)

    def __getitem__(self, worker_id: str) -> Worker:
        return self._by_id[worker_id]

    def pool(self, variants: Iterable[Variant]) -> tuple[Worker, ...]:
        """The workers of `variants`, in the variants' order."""
        return tuple(worker for variant in variants for worker in self._pools[variant.public_name])

    @property
    def any_ready(self) -> bool:
        return any(worker.condition.serves for worker in self)

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
        return self._pools[worker.variant.public_name]


def _quickest_s(workers: Iterable[Worker]) -> float:
    return min([worker.latency_s for worker in workers if worker.latency_s], default=0.0)


def _pool(variant: Variant) -> tuple[Worker, ...]:
    pace = Pace()
    return tuple(Worker(address, variant, pace=pace) for address in variant.workers)
