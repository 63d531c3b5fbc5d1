"""The registry: every worker of the catalogue and what is known about it, and who is told when that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from app.catalogue import Catalogue, Variant
from app.telemetry.logs import Log
from app.workers.worker import Condition, Worker

Listener = Callable[[Worker], None]


class Registry:
    """Owns the workers' records. Only `change` alters a condition, so that every listener hears of it."""

    def __init__(self, catalogue: Catalogue, log: Log) -> None:
        self._log = log
        self._listeners: list[Listener] = []
        self._pools: dict[str, tuple[Worker, ...]] = {
            variant.public_name: tuple(Worker(address, variant) for address in variant.workers)
            for variant in catalogue.variants
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
