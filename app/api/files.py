"""`/v1/files`: upload, list, retrieve, content, delete."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.api.access import key_id_of
from app.api.client import ClientGone, ClientWatch
from app.api.dependencies import BatchesOf, RuntimeOf, TenantOf
from app.api.protocol import connection_of
from app.batches.files import FileRecord
from app.batches.storage import CHUNK_BYTES, Missing
from app.errors import InvalidValue, ObjectNotFound, RequestTooLarge, StorageUnavailable, UnsupportedMediaType
from app.served import Served
from app.settings import Batches as Limits

routes = APIRouter(prefix="/v1/files", tags=["batches"])

FORM_BYTES = 64 * 1024
"""Of a form besides the file: boundaries, names, small fields."""
FIELDS = 8
FIELD_BYTES = 4096
FILENAME_CHARS = 255
KEPT_MIN_S, KEPT_MAX_S = 3600, 30 * 86400
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None

    @classmethod
    def of(cls, file: FileRecord) -> FileObject:
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=file.created_at,
            expires_at=file.expires_at,
            filename=file.filename,
            purpose=file.purpose,
        )


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": KEPT_MIN_S, "maximum": KEPT_MAX_S},
                    },
                }
            }
        },
    }
}


@routes.post("", summary="Upload a file", openapi_extra=_FORM)
async def upload(request: Request, batches: BatchesOf, tenant: TenantOf) -> FileObject:
    limit = batches.limits.file_bytes
    async with _Form(request, limit + FORM_BYTES) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidValue("The form has no file.", param="file")
        if purpose != "batch":
            raise InvalidValue("Invalid value for 'purpose': expected 'batch'.", param="purpose")
        if (file.size or 0) > limit:
            raise _too_large(batches.limits)
        record = await batches.files.add(
            tenant.name,
            _chunks(file),
            filename=_harmless(file.filename or "file"),
            purpose=purpose,
            kept_s=_kept_s(form) or batches.limits.files_kept_s,
        )
    return FileObject.of(record)


@routes.get("", summary="Files, the newest first")
async def list_files(
    batches: BatchesOf,
    tenant: TenantOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FileList:
    page, has_more = await batches.files.page(
        tenant.name, after=after, limit=limit, purpose=purpose, newest_first=order == "desc"
    )
    data = [FileObject.of(file) for file in page]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, first_id=first, last_id=last, has_more=has_more)


@routes.get("/{file_id}", summary="One file")
async def one_file(file_id: str, batches: BatchesOf, tenant: TenantOf) -> FileObject:
    return FileObject.of(await batches.files.find(tenant.name, file_id))


@routes.delete("/{file_id}", summary="Delete a file")
async def delete_file(file_id: str, batches: BatchesOf, tenant: TenantOf) -> FileDeleted:
    return FileDeleted(id=(await batches.delete_file(tenant.name, file_id)).id)


@routes.get("/{file_id}/content", summary="The bytes of a file", response_class=Response)
async def content(file_id: str, runtime: RuntimeOf, batches: BatchesOf, tenant: TenantOf) -> Response:
    record = await batches.files.find(tenant.name, file_id)
    chunks = batches.files.content(tenant.name, record)
    return _Content(record, chunks, runtime.settings.relay.client_stall_timeout_s, runtime.served)


class _Form:
    """The fields of a form and its file, which lies on the disk while this is open. Raises GatewayError."""

    def __init__(self, request: Request, limit: int) -> None:
        self._request = request
        self._limit = limit
        self._form: FormData | None = None

    async def __aenter__(self) -> FormData:
        if not self._request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise UnsupportedMediaType("A file is sent as content-type: multipart/form-data.")
        declared = self._request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._limit:
            raise RequestTooLarge(f"The upload is larger than {self._limit} bytes.")
        parser = MultiPartParser(
            self._request.headers, self._bounded(), max_files=1, max_fields=FIELDS, max_part_size=FIELD_BYTES
        )
        try:
            self._form = await parser.parse()
        except MultiPartException as error:
            raise InvalidValue(f"The form cannot be read: {error.message}") from None
        except ClientDisconnect:
            raise ClientGone from None
        except OSError as error:
            raise StorageUnavailable(reason=type(error).__name__) from error
        return self._form

    async def __aexit__(self, *_: object) -> None:
        if self._form is not None:
            await self._form.close()

    async def _bounded(self) -> AsyncGenerator[bytes, None]:
        size = 0
        async for chunk in self._request.stream():
            size += len(chunk)
            if size > self._limit:
                raise RequestTooLarge(f"The upload is larger than {self._limit} bytes.")
            yield chunk


class _Content(Response):
    """A file on the wire. A client that leaves or stops to read is noticed as on any other route."""

    def __init__(self, record: FileRecord, chunks: AsyncIterator[bytes], stall_s: float, served: Served) -> None:
        super().__init__(media_type="application/octet-stream")
        self.headers["content-length"] = str(record.bytes)
        self._chunks = chunks
        self._stall_s = stall_s
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ClientWatch(connection_of(scope), self._stall_s, self._served, key_id_of(scope)):
            try:
                first = await anext(self._chunks, b"")
            except Missing:
                raise ObjectNotFound("The file was deleted.", param="id") from None
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(CHUNK_BYTES):
        yield chunk


def _too_large(limits: Limits) -> RequestTooLarge:
    return RequestTooLarge(f"The file is larger than {limits.file_bytes} bytes.", param="file")


def _harmless(filename: str) -> str:
    """A name to show, never one to open: without folders and control characters, and not endless."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return UNPRINTABLE.sub("", last)[:FILENAME_CHARS] or "file"


def _kept_s(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidValue("Invalid value: expected 'created_at'.", param="expires_after.anchor")
    if not isinstance(seconds, str) or not seconds.isascii() or not seconds.isdigit():
        raise InvalidValue("Invalid value: expected a number of seconds.", param="expires_after.seconds")
    if not KEPT_MIN_S <= int(seconds[:9]) <= KEPT_MAX_S:
        raise InvalidValue(f"Expected {KEPT_MIN_S} to {KEPT_MAX_S} seconds.", param="expires_after.seconds")
    return int(seconds)
