"""`/v1/batches`: create, list, retrieve, cancel."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.api.client import read_body
from app.api.dependencies import BatchesOf, RuntimeOf, TenantOf
from app.api.schemas import Open
from app.batches.batch import Batch, Progress, Status
from app.batches.batches import Asked
from app.errors import InvalidJson, InvalidValue

routes = APIRouter(prefix="/v1/batches", tags=["batches"])

KEY_HEADER = "idempotency-key"
KEY = re.compile(r"[\x21-\x7e]{1,255}")
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ExpiresAfter(BaseModel):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=30 * 86400)


class BatchRequest(BaseModel):
    """What a batch is made from."""

    model_config = ConfigDict(strict=True)

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    output_expires_after: ExpiresAfter | None = None


class BatchFault(BaseModel):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchFaults(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchFault]


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchUsage(Open):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class BatchObject(BaseModel):
    """A batch. Times are wall time in seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchFaults | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, batch: Batch, progress: Progress) -> BatchObject:
        created, closing, closed = batch.created, batch.closing, batch.closed
        faults = [BatchFault(code=f.code, line=f.line, message=f.message, param=f.param) for f in batch.faults]
        since = batch.since
        return cls(
            id=batch.id,
            endpoint=created.endpoint,
            model=batch.model or None,
            errors=BatchFaults(data=faults) if faults else None,
            input_file_id=created.input_file_id,
            completion_window=created.completion_window,
            status=batch.status,
            output_file_id=closing.output_file_id if closing and closed and closed.has_output else None,
            error_file_id=closing.error_file_id if closing and closed and closed.has_errors else None,
            created_at=created.at,
            in_progress_at=since.get(Status.IN_PROGRESS),
            expires_at=created.expires_at,
            finalizing_at=since.get(Status.FINALIZING),
            completed_at=since.get(Status.COMPLETED),
            failed_at=since.get(Status.FAILED),
            expired_at=since.get(Status.EXPIRED),
            cancelling_at=since.get(Status.CANCELLING),
            cancelled_at=since.get(Status.CANCELLED),
            request_counts=RequestCounts(total=batch.total, completed=progress.completed, failed=progress.failed),
            usage=_usage(progress),
            metadata=created.metadata,
        )


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": BatchRequest.model_json_schema()}},
    }
}


@routes.post("", summary="Create a batch", openapi_extra=_BODY)
async def create(request: Request, runtime: RuntimeOf, batches: BatchesOf, tenant: TenantOf) -> BatchObject:
    body = await read_body(request.scope, request.receive, runtime.settings.limits)
    key = request.headers.get(KEY_HEADER)
    if key is not None and not KEY.fullmatch(key):
        raise InvalidValue("The header Idempotency-Key is expected to be 1 to 255 visible characters.")
    asked = _asked(body)
    expires = asked.output_expires_after
    batch = await batches.create(
        tenant.name,
        Asked(
            input_file_id=asked.input_file_id,
            endpoint=asked.endpoint,
            completion_window=asked.completion_window,
            metadata=asked.metadata,
            outputs_kept_s=expires.seconds if expires else None,
            body=body,
            key=key,
        ),
    )
    return BatchObject.of(*await batches.find(tenant.name, batch.id))


@routes.get("", summary="Batches, the newest first")
async def list_batches(
    batches: BatchesOf,
    tenant: TenantOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    page, has_more = await batches.page(tenant.name, after=after, limit=limit)
    data = [BatchObject.of(batch, progress) for batch, progress in page]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return BatchList(data=data, first_id=first, last_id=last, has_more=has_more)


@routes.get("/{batch_id}", summary="One batch")
async def one_batch(batch_id: str, batches: BatchesOf, tenant: TenantOf) -> BatchObject:
    return BatchObject.of(*await batches.find(tenant.name, batch_id))


@routes.post("/{batch_id}/cancel", summary="Cancel a batch: what is finished is kept")
async def cancel(batch_id: str, batches: BatchesOf, tenant: TenantOf) -> BatchObject:
    return BatchObject.of(*await batches.cancel(tenant.name, batch_id))


def _asked(body: bytes) -> BatchRequest:
    try:
        return BatchRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise InvalidJson("We could not parse the JSON body of your request.") from None
        param = ".".join(str(part) for part in first["loc"]) or None
        raise InvalidValue(first["msg"], param=param) from None


def _usage(progress: Progress) -> BatchUsage:
    return BatchUsage(
        input_tokens=progress.input_tokens,
        input_tokens_details={"cached_tokens": progress.cached_tokens},
        output_tokens=progress.output_tokens,
        output_tokens_details={"reasoning_tokens": progress.reasoning_tokens},
        total_tokens=progress.input_tokens + progress.output_tokens,
    )
