"""Keys and tenants, for operators. Keys in files are shown here and changed where the files come from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from app.api.access import note
from app.api.dependencies import RuntimeOf
from app.errors import DependencyUnavailable, MethodNotAllowed, RouteNotFound
from app.runtime import Runtime
from app.tenancy.keys import Issued, Key, Scope
from app.tenancy.registrar import Registrar, UnknownKey
from app.tenancy.stores import KeysUnreadable
from app.tenant import Tenant

routes = APIRouter(prefix="/admin", tags=["operations"])

YEARS_10_S = 10 * 366 * 86_400
TENANT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class KeyRow(BaseModel):
    """What is known of a key; the key itself is not."""

    id: str
    hint: str = Field(description="its last characters")
    tenant: str
    scope: Scope
    created: datetime
    expires: datetime | None
    is_valid: bool
    last_used: str | None = Field(description="to the hour; null: not lately, or not known")
    store: str


class KeyList(BaseModel):
    data: list[KeyRow]


class NewKey(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenant: str = Field(pattern=TENANT)
    scope: Scope = Scope.TENANT
    expires_s: int | None = Field(None, ge=1, le=YEARS_10_S, description="left out: until it is revoked")


class Rotation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    overlap_s: int = Field(86_400, ge=0, le=YEARS_10_S, description="how long the old key works on")


class IssuedKey(BaseModel):
    """A new key: the only time that it is shown."""

    key: str
    id: str
    hint: str
    tenant: str
    scope: Scope
    expires: datetime | None


class TenantRow(BaseModel):
    """A tenant that the settings name, or that has a key, and its terms."""

    name: str
    keys: int = Field(description="that work now")
    weight: float
    ceiling: str
    models: list[str] | None
    limits: dict[str, int | None]
    max_tokens: int | None
    engine_fields: bool
    resume: bool | None
    degrade: bool


class TenantList(BaseModel):
    data: list[TenantRow]


def _registrar(runtime: RuntimeOf) -> Registrar:
    if runtime.registrar is None:
        raise MethodNotAllowed("Without Redis keys are in files, and only `sluice keys` changes them.", allow="GET")
    return runtime.registrar


RegistrarOf = Annotated[Registrar, Depends(_registrar)]


@routes.get("/keys", summary="All keys, without what they open")
async def list_keys(runtime: RuntimeOf) -> KeyList:
    async with _told():
        used = await runtime.registrar.last_used() if runtime.registrar else {}
        now = datetime.now(UTC)
        rows = [_row(store, key, used.get(key.id), now) for store, key in await _kept(runtime)]
        return KeyList(data=sorted(rows, key=lambda row: (row.created, row.id)))


@routes.post("/keys", summary="Make a key; it is shown this once", status_code=201)
async def create_key(asked: NewKey, request: Request, runtime: RuntimeOf, registrar: RegistrarOf) -> IssuedKey:
    lifetime = None if asked.expires_s is None else timedelta(seconds=asked.expires_s)
    async with _told():
        issued = await registrar.create(asked.tenant, scope=asked.scope, lifetime=lifetime)
        return await _shown(issued, request, runtime)


@routes.post("/keys/{key_id}/rotate", summary="Make a key in place of another, which works on for a while")
async def rotate_key(
    key_id: str, asked: Rotation, request: Request, runtime: RuntimeOf, registrar: RegistrarOf
) -> IssuedKey:
    async with _told():
        issued = await registrar.rotate(key_id, timedelta(seconds=asked.overlap_s))
        return await _shown(issued, request, runtime)


@routes.delete("/keys/{key_id}", summary="End a key now, on all replicas within a second")
async def revoke_key(key_id: str, request: Request, runtime: RuntimeOf, registrar: RegistrarOf) -> KeyRow:
    async with _told():
        ended = await registrar.revoke(key_id)
        note(request.scope, key=ended.id, tenant=ended.tenant)
        await runtime.directory.refresh()
        return _row("redis", ended, None, datetime.now(UTC))


@routes.get("/tenants", summary="The tenants and their terms")
async def list_tenants(runtime: RuntimeOf) -> TenantList:
    now = datetime.now(UTC)
    async with _told():
        counts = dict.fromkeys(runtime.tenants.named, 0)
        for _, key in await _kept(runtime):
            counts[key.tenant] = counts.get(key.tenant, 0) + key.is_valid(now)
    return TenantList(data=[_terms(runtime.tenants.get(name), count) for name, count in sorted(counts.items())])


@asynccontextmanager
async def _told() -> AsyncIterator[None]:
    """What goes wrong with keys, as an answer."""
    try:
        yield
    except UnknownKey:
        raise RouteNotFound("There is no such key.") from None
    except KeysUnreadable:
        raise DependencyUnavailable("The keys are out of reach.", retry_after_s=2) from None


async def _kept(runtime: Runtime) -> list[tuple[str, Key]]:
    """All keys and where they are kept. Without keys being asked for, nobody follows what is in Redis."""
    kept = [(store.name, key) for store, key in runtime.directory.kept()]
    if runtime.registrar is not None and not runtime.directory.stores:
        kept += [("redis", key) for key in await runtime.registrar.keys()]
    return kept


async def _shown(issued: Issued, request: Request, runtime: Runtime) -> IssuedKey:
    key = issued.key
    note(request.scope, key=key.id, tenant=key.tenant, access=key.scope.value)
    await runtime.directory.refresh()
    return IssuedKey(key=issued.text, id=key.id, hint=key.hint, tenant=key.tenant, scope=key.scope, expires=key.expires)


def _row(store: str, key: Key, last_used: str | None, now: datetime) -> KeyRow:
    return KeyRow(
        id=key.id,
        hint=key.hint,
        tenant=key.tenant,
        scope=key.scope,
        created=key.created,
        expires=key.expires,
        is_valid=key.is_valid(now),
        last_used=last_used,
        store=store,
    )


def _terms(tenant: Tenant, keys: int) -> TenantRow:
    fields: dict[str, Any] = asdict(tenant)
    del fields["cache_salt"]
    fields["models"] = None if tenant.models is None else sorted(tenant.models)
    return TenantRow(keys=keys, **fields)
