"""What operators ask: who waits, how long, and for what."""

from __future__ import annotations

from collections import defaultdict

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.admission.fairness import MOVED, RANK, Overview
from app.admission.quota import NOTHING, Metered, Usage, claims_of
from app.api.dependencies import RuntimeOf
from app.errors import ConfigurationError, InvalidValue
from app.tenant import Limits

routes = APIRouter(prefix="/admin", tags=["operations"])

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


class LimitRow(BaseModel):
    """One limit of a tenant, over all replicas."""

    limit: str
    most: int
    used: int
    reset_s: float = Field(description="until all that is used has come back")


class LimitsRow(BaseModel):
    tenant: str
    concurrent: int = Field(description="requests that wait or run now")
    concurrent_most: int | None
    limits: list[LimitRow]


class LimitsView(BaseModel):
    """What the configured tenants have used of their limits; of this process' share while Redis is out of reach."""

    tenants: list[LimitsRow]


class ReloadView(BaseModel):
    outcome: str = Field(description="`applied` or `unchanged`; other processes of the gateway follow by themselves")


@routes.post("/reload", summary="Read the configuration again; 400 and the reason if it is refused")
async def reload(runtime: RuntimeOf) -> ReloadView:
    try:
        return ReloadView(outcome=await runtime.reload.now())
    except ConfigurationError as error:
        raise InvalidValue(f"The configuration is refused, and the old one kept: {error}") from None


@routes.get("/limits", summary="Limits: what each tenant has used of its windows, and how much runs at once")
async def limits(runtime: RuntimeOf) -> LimitsView:
    tenants = [runtime.tenants.get(name) for name in runtime.tenants.named]
    limited = {tenant.name: tenant.limits for tenant in tenants if not tenant.limits.is_unlimited}
    metered = [Metered(name, claims_of(of, NOTHING, NOTHING)) for name, of in limited.items()]
    overview = await runtime.admission.overview(metered)
    usages = {usage.tenant: usage for usage in overview.usages}
    return LimitsView(tenants=[_limits(made, usages[made.tenant], limited[made.tenant]) for made in metered])


def _limits(metered: Metered, usage: Usage, limits: Limits) -> LimitsRow:
    rows = [
        LimitRow(limit=claim.limit, most=claim.most, used=reading.used, reset_s=reading.reset_us / US)
        for claim, reading in zip(metered.claims, usage.readings, strict=True)
    ]
    return LimitsRow(tenant=metered.tenant, concurrent=usage.live, concurrent_most=limits.concurrent, limits=rows)


@routes.get("/queue", summary="The queue: what waits, how fast it drains, which slots are held")
async def queue(runtime: RuntimeOf) -> QueueView:
    overview = await runtime.admission.overview()
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
