"""One snapshot of a gateway, as the console shows it: made of its parts, purely. Seconds; wall-clock times.

Every list is bounded: by the configuration, or by ROWS_SHOWN with the number of those left out beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from app.batches.batch import Batch, Progress
from app.card import Card
from app.catalogue import Model, Variant
from app.console.board import Record
from app.console.history import Pace, Steps, Traffic, added, pace_of, step_at, traffic
from app.console.queue import QueueView
from app.telemetry.refusals import Count, Kind
from app.workers.worker import Worker

ROWS_SHOWN = 100


class CardRow(msgspec.Struct, frozen=True):
    """What `sluice evaluate` measured, as far as it did; `quality` is 1 for the dense sibling, speed is of one worker
    under its most streams."""

    quality: float | None
    size_bytes: int
    tokens_per_s: float | None
    streams: int | None
    passes: bool | None


class VariantRow(msgspec.Struct, frozen=True):
    """`ready` of its `workers` serve; `pace` is the last minute's."""

    name: str
    public_name: str
    quantization: str | None
    context_length: int | None
    ready: int
    workers: int
    pace: Pace
    card: CardRow | None


class ModelRow(msgspec.Struct, frozen=True):
    name: str
    variants: list[VariantRow]


class WorkerRow(msgspec.Struct, frozen=True):
    """`slots_held` are those of all replicas. `slots` is how many it is offered now, `slots_most` as configured or
    found. `running`, `waiting` and `kv_usage` (0..1) are its engine's own word, None while it does not tell."""

    id: str
    variant: str
    state: str
    reason: str
    doubt: str | None
    slots_held: int
    slots: int
    slots_most: int
    running: int | None
    waiting: int | None
    kv_usage: float | None


class BatchRow(msgspec.Struct, frozen=True):
    """An unfinished batch; `total` lines is 0 until its input has been read."""

    id: str
    tenant: str
    status: str
    model: str
    total: int
    completed: int
    failed: int
    created_at: int
    expires_at: int


class RefusalRow(msgspec.Struct, frozen=True):
    """So many requests that ended alike, the last of them at `last_at`."""

    outcome: str
    code: str
    model: str
    tenant: str
    band: str
    count: int
    first_at: float
    last_at: float


class Snapshot(msgspec.Struct, frozen=True):
    """`at` is when it was made. `processes` are those of this gateway; `degraded` is the want of the ledger it should
    have. `queue` and `batches` are None where they cannot be told (`batches` also where there are none to keep)."""

    at: float
    started: float
    status: str
    degraded: bool
    guarded: bool
    processes: int
    in_flight: int
    traffic: Traffic
    models: list[ModelRow]
    workers: list[WorkerRow]
    queue: dict[str, Any] | None
    queue_left_out: int
    batches: list[BatchRow] | None
    refusals: list[RefusalRow]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a snapshot is made of; `records` of this process and of the others."""

    at: float
    started: float
    status: str
    degraded: bool
    guarded: bool
    models: Sequence[Model]
    workers: Collection[Worker]
    queue: QueueView | None
    batches: Sequence[tuple[Batch, Progress]] | None
    records: Sequence[Record]


def snapshot(parts: Parts) -> Snapshot:
    """What an operator sees at this moment."""
    last = step_at(parts.at) - 1  # the present step is not over
    steps = added(record.steps for record in parts.records)
    flows = parts.queue.flows if parts.queue else []
    return Snapshot(
        at=parts.at,
        started=parts.started,
        status=parts.status,
        degraded=parts.degraded,
        guarded=parts.guarded,
        processes=len(parts.records),
        in_flight=sum(record.in_flight for record in parts.records),
        traffic=traffic(steps, last),
        models=[_model(model, parts.workers, steps, last) for model in parts.models],
        workers=_workers(parts.workers, parts.queue),
        queue=_queue(parts.queue),
        queue_left_out=max(0, len(flows) - ROWS_SHOWN),
        batches=None if parts.batches is None else [_batch(*batch) for batch in parts.batches[:ROWS_SHOWN]],
        refusals=_refusals(parts.records),
    )


def _model(model: Model, workers: Collection[Worker], steps: Steps, last: int) -> ModelRow:
    return ModelRow(model.name, [_variant(variant, workers, steps, last) for variant in model.variants])


def _variant(variant: Variant, workers: Iterable[Worker], steps: Steps, last: int) -> VariantRow:
    pool = [worker for worker in workers if worker.variant.public_name == variant.public_name]
    lengths = [worker.context_length for worker in pool if worker.context_length is not None]
    return VariantRow(
        name=variant.name,
        public_name=variant.public_name,
        quantization=variant.quantization,
        context_length=min(lengths, default=variant.context_length),
        ready=sum(worker.is_ready for worker in pool),
        workers=len(pool),
        pace=pace_of(variant.public_name, steps, last),
        card=_card(variant.card) if variant.card else None,
    )


def _card(card: Card) -> CardRow:
    fastest = card.speed[-1] if card.speed else None
    return CardRow(
        quality=card.relative_quality,
        size_bytes=card.size_bytes,
        tokens_per_s=fastest.tokens_per_s if fastest else None,
        streams=fastest.streams if fastest else None,
        passes=card.gate.passed if card.gate else None,
    )


def _workers(workers: Iterable[Worker], queue: QueueView | None) -> list[WorkerRow]:
    slots = {row.worker: (row.slots_held, row.slots) for row in queue.workers} if queue else {}
    return [_worker(worker, *slots.get(worker.id, (0, 0))) for worker in workers]


def _worker(worker: Worker, held: int, slots: int) -> WorkerRow:
    load = worker.load
    return WorkerRow(
        id=worker.id,
        variant=worker.variant.public_name,
        state=worker.condition.state.value,
        reason=worker.condition.reason,
        doubt=worker.doubt,
        slots_held=held,
        slots=slots,
        slots_most=worker.slots,
        running=load.running if load else None,
        waiting=load.waiting if load else None,
        kv_usage=load.kv_usage if load else None,
    )


def _queue(queue: QueueView | None) -> dict[str, Any] | None:
    """The longest waits first: these are what somebody looks for."""
    if queue is None:
        return None
    flows = sorted(queue.flows, key=lambda flow: -flow.oldest_s)[:ROWS_SHOWN]
    return {
        "flows": [flow.model_dump() for flow in flows],
        "routes": [route.model_dump() for route in queue.routes[:ROWS_SHOWN]],
    }


def _batch(batch: Batch, progress: Progress) -> BatchRow:
    return BatchRow(
        id=batch.id,
        tenant=batch.tenant,
        status=batch.status.value,
        model=batch.model,
        total=batch.total,
        completed=progress.completed,
        failed=progress.failed,
        created_at=batch.created.at,
        expires_at=batch.created.expires_at,
    )


def _refusals(records: Iterable[Record]) -> list[RefusalRow]:
    counts: dict[Kind, Count] = {}
    for record in records:
        for kind, count in record.refusals:
            counts[kind] = counts[kind] + count if kind in counts else count
    latest = sorted(counts.items(), key=lambda found: -found[1].last)[:ROWS_SHOWN]
    return [
        RefusalRow(
            kind.outcome.value,
            kind.code,
            kind.model,
            kind.tenant,
            kind.band.value,
            count.count,
            count.first,
            count.last,
        )
        for kind, count in latest
    ]
