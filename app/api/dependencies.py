"""What endpoints ask for by type."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.api.access import caller_of
from app.batches.batches import Batches
from app.errors import RouteNotFound
from app.runtime import Runtime
from app.tenant import Tenant


def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.state.runtime
    return runtime


def _tenant(request: Request) -> Tenant:
    return caller_of(request.scope).tenant


RuntimeOf = Annotated[Runtime, Depends(_runtime)]


def _batches(runtime: RuntimeOf) -> Batches:
    if runtime.batches is None:
        raise RouteNotFound("This gateway keeps no files: its settings name no batches.directory or batches.bucket.")
    return runtime.batches


BatchesOf = Annotated[Batches, Depends(_batches)]
TenantOf = Annotated[Tenant, Depends(_tenant)]
