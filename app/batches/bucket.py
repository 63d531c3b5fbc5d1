"""See `storage.Storage`: kept in object storage that speaks S3, so that gateways on several machines share it.

A key is created with `If-None-Match: *` (S3's conditional write), which is what exactly one of several gets through.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import S3Store

from app import settings
from app.batches.storage import CHUNK_BYTES, Missing, told
from app.errors import StorageUnavailable

SPOOL_BYTES = 1024 * 1024
TIMEOUT_S = 30

T = TypeVar("T")


class Bucket:
    """See `storage.Storage`."""

    def __init__(self, bucket: settings.Bucket) -> None:
        more: dict[str, str] = {}
        if bucket.endpoint is not None:
            more["endpoint"] = bucket.endpoint
        if bucket.region is not None:
            more["region"] = bucket.region
        self._store = S3Store(
            bucket.name,
            prefix=bucket.prefix or None,
            client_options={
                "timeout": f"{TIMEOUT_S} s",
                "allow_http": (bucket.endpoint or "").startswith("http://"),
            },
            **more,  # type: ignore[arg-type]
        )

    async def create(self, key: str, data: bytes) -> bool:
        try:
            await _told(obstore.put_async(self._store, key, data, mode="create", use_multipart=False))
        except AlreadyExistsError:
            return False
        return True

    async def upload(self, key: str, parts: AsyncIterator[bytes]) -> int:
        """Through a spool, whose size is known before the first byte is sent; large ones go in parts, then as one."""
        size = 0
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
            async for part in parts:
                size += len(part)
                spool.write(part)
            spool.seek(0)
            await _told(obstore.put_async(self._store, key, spool))
        return size

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        options: obstore.GetOptions = {}
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        return await _told(_bytes_of(await _told(obstore.get_async(self._store, key, options=options))))

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        found = await _told(obstore.get_async(self._store, key))
        try:
            async for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)
        except BaseError as error:
            raise StorageUnavailable(reason=type(error).__name__) from error

    async def names(self, prefix: str) -> list[str]:
        listed = await _told(obstore.list_with_delimiter_async(self._store, f"{prefix}/"))
        objects = [meta["path"] for meta in listed["objects"]]
        return sorted({path.rstrip("/").rpartition("/")[2] for path in (*objects, *listed["common_prefixes"])})

    async def remove(self, key: str) -> None:
        try:
            await _told(obstore.delete_async(self._store, key))
        except Missing:
            return

    async def clear(self, prefix: str) -> None:
        async for page in self._store.list(f"{prefix}/"):
            await _told(obstore.delete_async(self._store, [meta["path"] for meta in page]))


async def _bytes_of(found: obstore.GetResult) -> bytes:
    return bytes(await found.bytes_async())


async def _told(work: Awaitable[T]) -> T:
    """Its outcome, with the provider's errors as the storage's."""
    try:
        return await told(work)
    except NotFoundError:
        raise Missing from None
    except AlreadyExistsError:
        raise
    except BaseError as error:
        raise StorageUnavailable(reason=type(error).__name__) from error
