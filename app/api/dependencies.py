"""What endpoints ask for by type."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.api.inference import TENANT_HEADER, tenant_named
from app.batches.batches import Batches
from app.errors import RouteNotFound
from app.runtime import Runtime
from app.tenant import Tenant


def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.state.runtime
    return runtime


RuntimeOf = Annotated[Runtime, Depends(_runtime)]


def _batches(runtime: RuntimeOf) -> Batches:
    if runtime.batches is None:
        raise RouteNotFound("This gateway keeps no files: its settings name no batches.directory or batches.bucket.")
    return runtime.batches


def _tenant(request: Request, runtime: RuntimeOf) -> Tenant:
    given = request.headers.get(TENANT_HEADER.decode())
    if given is None or not runtime.settings.admission.trust_tenant_header:
        return runtime.tenants.anonymous
    return runtime.tenants.get(tenant_named(given.encode("latin-1")))


BatchesOf = Annotated[Batches, Depends(_batches)]
TenantOf = Annotated[Tenant, Depends(_tenant)]
