"""What operators ask: who waits, how long, and for what."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.admission.quota import NOTHING, Metered, Usage, claims_of
from app.api.dependencies import RuntimeOf
from app.console.queue import QueueView, queue_view
from app.errors import ConfigurationError, InvalidValue
from app.tenant import Limits

routes = APIRouter(prefix="/admin", tags=["operations"])

US = 1_000_000


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
    return queue_view(await runtime.admission.overview())
