"""Probes and metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app.api.dependencies import RuntimeOf
from app.runtime import Runtime
from app.telemetry.metrics import CONTENT_TYPE

probes = APIRouter(tags=["operations"])
routes = APIRouter(tags=["operations"])


@probes.head("/healthz", include_in_schema=False)
@probes.get("/healthz", summary="Alive: the process answers")
async def alive() -> dict[str, str]:
    return {"status": "ok"}


@probes.head("/readyz", include_in_schema=False)
@probes.get("/readyz", summary="Ready: at least one worker has proven itself with a token", response_model=None)
async def ready(runtime: RuntimeOf, request: Request) -> Response:
    workers = {
        worker.id: {
            "variant": worker.variant.public_name,
            "state": worker.condition.state.value,
            "reason": worker.condition.reason,
        }
        for worker in runtime.registry
    }
    status = _status(runtime)
    return JSONResponse({"status": status, "workers": workers}, status_code=200 if status == "ready" else 503)


@probes.head("/health", include_in_schema=False)
@probes.get("/health", summary="vLLM's probe, which its clients ask before they start: 200 when ready, nothing more")
async def health(runtime: RuntimeOf) -> Response:
    return Response(status_code=200 if _status(runtime) == "ready" else 503)


@routes.get("/metrics", summary="All series, in Prometheus' text format", response_class=Response)
async def metrics(runtime: RuntimeOf) -> Response:
    runtime.gauges.write()
    # Reading several processes' files takes milliseconds, which streams should not notice.
    return Response(await asyncio.to_thread(runtime.metrics.exposition), media_type=CONTENT_TYPE)


def _status(runtime: Runtime) -> str:
    if runtime.drain.is_quiet:
        return "draining"
    if runtime.is_ailing():
        return "ailing"  # its processes keep dying
    return "ready" if runtime.registry.any_ready else "not ready"
