"""Files: what clients upload, and what batches write.

    files/<owner>/<file id>/<random>    the bytes
    files/<owner>/<file id>/record      what is said about them, written last: with it the file exists

The owner is a hash of the tenant's name, so that an id of another tenant's leads nowhere and no name becomes a path.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection
from hashlib import sha256

import msgspec

from app.batches.storage import Missing, Storage
from app.errors import ObjectNotFound

HALF_MADE_S = 24 * 3600
"""An upload takes less. What has no record after that never will."""
LINGERS_S = 3600
"""Between a file's end for clients and its being taken away: who found it just before may have made it an input."""
RECORD = "record"
PURPOSES = frozenset({"batch", "batch_output"})

FILE_ID = re.compile(r"file-[0-9a-f]{44}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{44}")

_encode = msgspec.json.Encoder().encode


class FileRecord(msgspec.Struct, frozen=True):
    """A file. Times are wall time in seconds; `blob` is the word under which its bytes are stored."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None
    blob: str


_decode = msgspec.json.Decoder(FileRecord).decode


def new_id(kind: str, now: float) -> str:
    """`file-…` or `batch_…`: 48 bits of milliseconds, so that ids sort by age, and 128 random ones."""
    return f"{kind}{int(now * 1000):012x}{secrets.token_hex(16)}"


def made_at(object_id: str) -> float:
    """When an id was made, wall time in seconds."""
    return int(object_id[-44:-32], 16) / 1000


def owner_of(tenant: str) -> str:
    """The word for a tenant in keys: 128 bits of a hash, so that any name is a harmless one."""
    return sha256(tenant.encode()).hexdigest()[:32]


class Files:
    """All files of all tenants. Methods raise ObjectNotFound and StorageUnavailable; `now` is wall time in seconds."""

    def __init__(self, storage: Storage, now: Callable[[], float]) -> None:
        self._storage = storage
        self._now = now

    async def add(
        self, tenant: str, parts: AsyncIterator[bytes], *, filename: str, purpose: str, kept_s: int | None
    ) -> FileRecord:
        """A new file. It is there, whole, from the moment this returns, and not at all before."""
        return await self.publish(tenant, new_id("file-", self._now()), parts, filename, purpose, kept_s)

    async def publish(
        self, tenant: str, file_id: str, parts: AsyncIterator[bytes], filename: str, purpose: str, kept_s: int | None
    ) -> FileRecord:
        """The file of this id. Of several that publish it one does, and all get what that one wrote."""
        place, blob = _place(tenant, file_id), secrets.token_hex(16)
        size = await self._storage.upload(f"{place}/{blob}", parts)
        now = int(self._now())
        record = FileRecord(file_id, size, now, filename, purpose, None if kept_s is None else now + kept_s, blob)
        if await self._storage.create(f"{place}/{RECORD}", _encode(record)):
            return record
        await self._storage.remove(f"{place}/{blob}")
        return await self.find(tenant, file_id)

    async def find(self, tenant: str, file_id: str) -> FileRecord:
        record = await self._read(tenant, file_id) if FILE_ID.fullmatch(file_id) else None
        if record is None:
            raise ObjectNotFound(f"No such File object: {file_id[:64]}", param="id")
        return record

    async def find_input(self, tenant: str, file_id: str) -> FileRecord:
        """Like `find`, also when it has expired since: a batch that has begun is run to its end."""
        record = await self._stored(tenant, file_id)
        if record is None:
            raise ObjectNotFound(f"No such File object: {file_id[:64]}", param="id")
        return record

    def content(self, tenant: str, record: FileRecord) -> AsyncIterator[bytes]:
        """Its bytes, in chunks. Raises Missing if it is deleted meanwhile."""
        return self._storage.stream(f"{_place(tenant, record.id)}/{record.blob}")

    async def part(self, tenant: str, record: FileRecord, start: int, end: int) -> bytes:
        return await self._storage.read(f"{_place(tenant, record.id)}/{record.blob}", start, end)

    async def delete(self, tenant: str, file_id: str) -> None:
        record = await self.find(tenant, file_id)
        await self._take_away(tenant, record)

    async def page(
        self, tenant: str, *, after: str | None, limit: int, purpose: str | None, newest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        """A page of files by age, those behind `after`, and whether there are more."""
        names = sorted(await self._storage.names(f"files/{owner_of(tenant)}"), reverse=newest_first)
        page: list[FileRecord] = []
        for name in beyond(names, after, newest_first=newest_first):
            record = await self._read(tenant, name)
            if record is not None and purpose in (None, record.purpose):
                if len(page) == limit:
                    return page, True
                page.append(record)
        return page, False

    async def sweep(self, inputs: Collection[str]) -> int:
        """Take away what has expired and what was never finished, but for `inputs`, which are in use; how many."""
        taken = 0
        for owner in await self._storage.names("files"):
            for name in await self._storage.names(f"files/{owner}"):
                if name not in inputs:
                    taken += await self._sweep(f"files/{owner}/{name}", made_at(name))
        return taken

    async def _sweep(self, place: str, made: float) -> bool:
        now = self._now()
        try:
            record = _decode(await self._storage.read(f"{place}/{RECORD}"))
            is_over = record.expires_at is not None and record.expires_at + LINGERS_S <= now
        except Missing:
            is_over = now - made > HALF_MADE_S
        if is_over:
            await self._storage.remove(f"{place}/{RECORD}")
            await self._storage.clear(place)
        return is_over

    async def _read(self, tenant: str, file_id: str) -> FileRecord | None:
        """The record, unless there is none or it has expired."""
        record = await self._stored(tenant, file_id)
        is_over = record is not None and record.expires_at is not None and record.expires_at <= self._now()
        return None if is_over else record

    async def _stored(self, tenant: str, file_id: str) -> FileRecord | None:
        try:
            return _decode(await self._storage.read(f"{_place(tenant, file_id)}/{RECORD}"))
        except Missing:
            return None

    async def _take_away(self, tenant: str, record: FileRecord) -> None:
        place = _place(tenant, record.id)
        await self._storage.remove(f"{place}/{RECORD}")
        await self._storage.clear(place)


def beyond(names: list[str], after: str | None, *, newest_first: bool) -> list[str]:
    """Those of the sorted ids that come after the cursor; all without one."""
    if after is None:
        return names
    return [name for name in names if (name < after if newest_first else name > after)]


def _place(tenant: str, file_id: str) -> str:
    return f"files/{owner_of(tenant)}/{file_id}"
