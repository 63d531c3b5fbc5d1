"""What is over is taken away after a while, and nothing that somebody still needs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from app.batches.batch import Batch, Cancelled, Closed, Closing, Created, Progress, Status, Validated
from app.batches.files import LINGERS_S, Files
from app.batches.journal import Journal
from app.batches.storage import Storage
from app.errors import ObjectNotFound

TENANT = "t"
KEPT_S, KEYS_KEPT_S = 30 * 86400, 86400


@dataclass
class Shelf:
    storage: Storage
    wall: float = 1_790_000_000.0
    files: Files = field(init=False)
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.files, self.journal = Files(self.storage, self._now), Journal(self.storage, self._now)

    def _now(self) -> float:
        return self.wall

    async def batch(self, key: str | None = None) -> Batch:
        batch_id = await self.journal.reserve(TENANT, key, b"body")
        at = int(self.wall)
        return await self.journal.create(
            Created(
                at=at,
                id=batch_id,
                tenant=TENANT,
                endpoint="/v1/chat/completions",
                input_file_id="file-",
                completion_window="24h",
                expires_at=at + 86400,
                metadata=None,
                outputs_kept_s=3600,
            )
        )

    async def end(self, batch: Batch) -> Batch:
        at = int(self.wall)
        batch = await self.journal.append(batch, Validated(at=at, model="m", ranges=()))
        batch = await self.journal.append(batch, Cancelled(at=at))
        closing = Closing(at=at, outcome=Status.CANCELLED, output_file_id="a", error_file_id="b")
        batch = await self.journal.append(batch, closing)
        closed = Closed(at=at, progress=Progress(), has_output=False, has_errors=False)
        batch = await self.journal.append(batch, closed)
        await self.journal.retire(batch)
        return batch

    async def sweep(self) -> int:
        return await self.journal.sweep(KEPT_S, KEYS_KEPT_S)


@pytest.fixture
def shelf(storage: Storage) -> Shelf:
    return Shelf(storage)


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_a_batch_is_told_of_for_so_long_after_its_end(shelf: Shelf) -> None:
    batch = await shelf.batch()
    shelf.wall += 2 * KEPT_S
    batch = await shelf.end(batch)  # age counts from the end, not from the beginning
    assert await shelf.sweep() == 0
    shelf.wall += KEPT_S - 10
    assert await shelf.sweep() == 0
    assert (await shelf.journal.find(TENANT, batch.id)).status is Status.CANCELLED
    shelf.wall += 20
    assert await shelf.sweep() == 1
    with pytest.raises(ObjectNotFound):
        await shelf.journal.find(TENANT, batch.id)
    assert await shelf.journal.page(TENANT, after=None, limit=10) == ([], False)


async def test_a_batch_half_taken_away_is_none(shelf: Shelf) -> None:
    batch = await shelf.end(await shelf.batch())
    owner = (await shelf.storage.names("batches"))[0]
    await shelf.storage.remove(f"batches/{owner}/{batch.id}/events/000001")
    assert await shelf.journal.page(TENANT, after=None, limit=10) == ([], False)
    shelf.wall += 2 * KEPT_S
    await shelf.sweep()
    assert await shelf.storage.names(f"batches/{owner}/{batch.id}/events") == []


async def test_an_unfinished_batch_stays_and_is_found_again(shelf: Shelf) -> None:
    batch = await shelf.batch()
    await shelf.journal.forget(batch.id)  # as a crash at a bad moment would have it
    shelf.wall += 2 * KEPT_S
    assert await shelf.sweep() == 0
    assert await shelf.journal.active() == [batch.id]


async def test_a_key_stands_for_its_batch_for_a_while(shelf: Shelf) -> None:
    batch = await shelf.batch(key="once")
    shelf.wall += KEYS_KEPT_S - 10
    await shelf.sweep()
    assert await shelf.journal.reserve(TENANT, "once", b"body") == batch.id
    shelf.wall += 20
    assert await shelf.sweep() == 1
    assert await shelf.journal.reserve(TENANT, "once", b"body") != batch.id


async def test_expired_files_go_but_not_the_input_of_a_batch(shelf: Shelf) -> None:
    kept_s = 3600
    used, other = [
        await shelf.files.add(TENANT, pieces(b"{}"), filename="f", purpose="batch", kept_s=kept_s) for _ in range(2)
    ]
    shelf.wall += kept_s + 1
    for file in (used, other):
        with pytest.raises(ObjectNotFound):
            await shelf.files.find(TENANT, file.id)
    assert await shelf.files.sweep({used.id}) == 0, "who found it a moment ago may have begun a batch with it"
    shelf.wall += LINGERS_S
    assert await shelf.files.sweep({used.id}) == 1
    record = await shelf.files.find_input(TENANT, used.id)
    assert await shelf.files.part(TENANT, record, 0, 2) == b"{}"
    with pytest.raises(ObjectNotFound):
        await shelf.files.find_input(TENANT, other.id)
    assert await shelf.files.sweep(()) == 1
