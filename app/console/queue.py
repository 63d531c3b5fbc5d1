"""The queue as operators see it. Pure."""

from __future__ import annotations

from collections import defaultdict

from pydantic import BaseModel, Field

from app.admission.fairness import MOVED, RANK, Overview

US = 1_000_000
_BANDS = {MOVED: "moved", **{rank: band.value for band, rank in RANK.items()}}


class FlowRow(BaseModel):
    """What waits of one tenant in one band for one set of workers."""

    band: str = Field(description="`moved`: had a slot, and waits for another after its worker failed")
    tenant: str
    workers: list[str]
    depth: int
    oldest_s: float


class RouteRow(BaseModel):
    """A set of workers that tickets wait for."""

    workers: list[str]
    depth: int
    drain_per_s: float | None = Field(description="tickets granted a second while some wait; null: not known")
    expected_wait_s: dict[str, float] = Field(description="band to the wait of who comes now")


class WorkerRow(BaseModel):
    worker: str
    slots_held: int
    slots: int


class QueueView(BaseModel):
    """The queue of all replicas; of this process alone while Redis is out of reach."""

    flows: list[FlowRow]
    routes: list[RouteRow]
    workers: list[WorkerRow]


def queue_view(overview: Overview) -> QueueView:
    """What the ledger tells, in seconds and by name."""
    flows = [
        FlowRow(
            band=_BANDS[flow.band],
            tenant=flow.tenant,
            workers=sorted(flow.candidates),
            depth=flow.tickets,
            oldest_s=flow.oldest_us / US,
        )
        for flow in overview.flows
    ]
    workers = [WorkerRow(worker=name, slots_held=held, slots=slots) for name, held, slots in sorted(overview.slots)]
    return QueueView(flows=flows, routes=_routes(overview), workers=workers)


def _routes(overview: Overview) -> list[RouteRow]:
    depths: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    workers: dict[str, list[str]] = {}
    for flow in overview.flows:
        depths[flow.route][flow.band] += flow.tickets
        workers[flow.route] = sorted(flow.candidates)
    gaps = {route: gap_us / US for route, gap_us, count in overview.drains if count}
    return [
        RouteRow(
            workers=workers[route],
            depth=sum(depth.values()),
            drain_per_s=1 / gaps[route] if gaps.get(route) else None,
            expected_wait_s={
                name: gaps.get(route, 0.0) * sum(count for band, count in depth.items() if band <= rank)
                for rank, name in _BANDS.items()
            },
        )
        for route, depth in sorted(depths.items())
    ]
