"""Batches as they are stored: lists of events, and of segments with the records of lines. Nothing is ever changed.

    batches/<owner>/<batch id>/events/<number>            what happened to it
    batches/<owner>/<batch id>/lines/<range>-<number>     records of some lines of a range
    active/<batch id>                                     the owner: this one is not finished
    keys/<owner>/<hash>                                   a client's Idempotency-Key, and the batch it made

A list grows by creating the next number, which one writer of several gets through. So who appends must have read all
that is there, and no line can get two records, whatever happened to leases and clocks. A sealed range takes no more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256

import msgspec

from app.batches import batch as states
from app.batches.batch import AnyEvent, Batch, Created, Progress
from app.batches.files import BATCH_ID, beyond, made_at, new_id, owner_of
from app.batches.lines import HEAD_BYTES, Head, Record, head_of, records_of, segment
from app.batches.storage import Missing, Storage
from app.errors import IdempotencyMismatch, ObjectNotFound

HEADS_KNOWN = 65_536
CHANGES_TRIED = 16
FIRST = f"{1:06d}"

_encode = msgspec.json.Encoder().encode
_decode_event = msgspec.json.Decoder(AnyEvent).decode


class Overtaken(Exception):
    """Somebody else has written what was about to be written: read again."""


class Sealed(Exception):
    """The range takes no more records."""


RecordsBeside = Callable[[set[int]], list[Record]]
"""Records for a range of which these lines have one already."""


class _Reserved(msgspec.Struct, frozen=True):
    digest: str
    batch_id: str


class RangeLog:
    """The records of one range, as far as they were read or written here."""

    __slots__ = ("done", "head", "segments")

    def __init__(self) -> None:
        self.segments = 0
        self.head = Head(Progress())
        self.done: set[int] = set()


class Journal:
    """All batches of all tenants. Methods raise StorageUnavailable."""

    def __init__(self, storage: Storage, now: Callable[[], float]) -> None:
        self._storage = storage
        self._now = now
        self._heads: OrderedDict[str, Head] = OrderedDict()

    # batches

    async def reserve(self, tenant: str, key: str | None, body: bytes) -> str:
        """The id for a new batch; with an idempotency key the same for the same body. Raises IdempotencyMismatch."""
        batch_id = new_id("batch_", self._now())
        if key is None:
            return batch_id
        place = f"keys/{owner_of(tenant)}/{sha256(key.encode()).hexdigest()}"
        reserved = _Reserved(sha256(body).hexdigest(), batch_id)
        if not await self._storage.create(place, _encode(reserved)):
            found = msgspec.json.decode(await self._storage.read(place), type=_Reserved)
            if found.digest != reserved.digest:
                raise IdempotencyMismatch("This Idempotency-Key was used with another request.")
            return found.batch_id
        return batch_id

    async def create(self, created: Created) -> Batch:
        """The batch exists, for good, from the moment this returns; made twice it is the same."""
        place = _place(created.tenant, created.id)
        # First that it is not finished: a mark without a batch is swept, a batch without a mark would never run.
        # And once more after it, as an id that was reserved long ago may have been swept in between.
        mark, owner = f"active/{created.id}", owner_of(created.tenant).encode()
        await self._storage.create(mark, owner)
        is_new = await self._storage.create(f"{place}/events/{FIRST}", _encode(created))
        await self._storage.create(mark, owner)
        return Batch(created) if is_new else await self.find(created.tenant, created.id)

    async def find(self, tenant: str, batch_id: str) -> Batch:
        """Raises ObjectNotFound."""
        found = await self._read(owner_of(tenant), batch_id) if BATCH_ID.fullmatch(batch_id) else None
        if found is None:
            raise ObjectNotFound(f"No batch found with id '{batch_id[:64]}'.", param="id")
        return found

    async def page(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """A page of batches, the newest first, those older than `after`, and whether there are more."""
        owner = owner_of(tenant)
        names = sorted(await self._storage.names(f"batches/{owner}"), reverse=True)
        page: list[Batch] = []
        for name in beyond(names, after, newest_first=True):
            found = await self._read(owner, name)
            if found is not None:
                if len(page) == limit:
                    return page, True
                page.append(found)
        return page, False

    async def active(self) -> list[str]:
        """The ids of batches that are not finished, oldest first."""
        return await self._storage.names("active")

    async def refresh(self, batch: Batch) -> Batch:
        """The same batch, if nothing happened to it."""
        place = f"{_place(batch.tenant, batch.id)}/events"
        for name in (await self._storage.names(place))[batch.events :]:
            batch = states.follow(batch, _decode_event(await self._storage.read(f"{place}/{name}")))
        return batch

    async def find_active(self, batch_id: str) -> Batch | None:
        try:
            owner = (await self._storage.read(f"active/{batch_id}")).decode()
        except Missing:
            return None
        return await self._read(owner, batch_id)

    async def count_active(self, tenant: str) -> int:
        owner = owner_of(tenant)
        marks = [await self._owner(batch_id) for batch_id in await self.active()]
        return marks.count(owner)

    async def append(self, batch: Batch, event: AnyEvent) -> Batch:
        """The batch after `event`. Raises IllegalEvent, or Overtaken if more happened to it than `batch` knows."""
        after = states.follow(batch, event)
        key = f"{_place(batch.tenant, batch.id)}/events/{after.events:06d}"
        if not await self._storage.create(key, _encode(event)):
            raise Overtaken
        return after

    async def happen(self, batch: Batch, event: AnyEvent) -> Batch:
        """Like `append`, on whatever the batch is by now. Raises IllegalEvent."""
        for _ in range(CHANGES_TRIED):
            try:
                return await self.append(batch, event)
            except Overtaken:
                batch = await self.find(batch.tenant, batch.id)
        raise Overtaken

    async def retire(self, batch: Batch) -> None:
        """The batch is finished: forget its segments, which are in its files now, and that it was active."""
        await self._storage.clear(f"{_place(batch.tenant, batch.id)}/lines")
        await self.forget(batch.id)

    async def forget(self, batch_id: str) -> None:
        await self._storage.remove(f"active/{batch_id}")

    async def sweep(self, kept_s: float, keys_kept_s: float) -> int:
        """Take away batches that ended longer than `kept_s` ago, and keys older than `keys_kept_s`; how many of both.

        A batch that is not at its end keeps its record, and gets back a mark that it may have lost.
        """
        taken = 0
        for owner in await self._storage.names("batches"):
            for batch_id in await self._storage.names(f"batches/{owner}"):
                if self._now() - made_at(batch_id) <= kept_s:
                    break  # they come sorted by age
                taken += await self._sweep(owner, batch_id, kept_s)
        for owner in await self._storage.names("keys"):
            for name in await self._storage.names(f"keys/{owner}"):
                taken += await self._sweep_key(f"keys/{owner}/{name}", keys_kept_s)
        return taken

    async def _sweep(self, owner: str, batch_id: str, kept_s: float) -> bool:
        found = await self._read(owner, batch_id)
        if found is not None and not found.status.is_final:
            await self._storage.create(f"active/{batch_id}", owner.encode())
            return False
        if found is not None and self._now() - max(found.since.values()) <= kept_s:
            return False
        # Without its first event it is gone, whatever a crash leaves of the rest.
        await self._storage.remove(f"batches/{owner}/{batch_id}/events/{FIRST}")
        await self._storage.clear(f"batches/{owner}/{batch_id}")
        return True

    async def _sweep_key(self, place: str, kept_s: float) -> bool:
        with suppress(Missing):
            reserved = msgspec.json.decode(await self._storage.read(place), type=_Reserved)
            if self._now() - made_at(reserved.batch_id) > kept_s:
                await self._storage.remove(place)
                return True
        return False

    async def _owner(self, batch_id: str) -> str:
        try:
            return (await self._storage.read(f"active/{batch_id}")).decode()
        except Missing:
            return ""

    async def _read(self, owner: str, batch_id: str) -> Batch | None:
        place = f"batches/{owner}/{batch_id}/events"
        names = await self._storage.names(place)
        if names[:1] != [FIRST]:
            return None
        try:
            stored = [await self._storage.read(f"{place}/{name}") for name in names]
        except Missing:  # it is being taken away
            return None
        return states.of_events(map(_decode_event, stored))

    # lines

    async def heads(self, batch: Batch) -> dict[int, Head]:
        """The head of each range that has records."""
        latest: dict[int, str] = {}
        for name in await self._storage.names(f"{_place(batch.tenant, batch.id)}/lines"):
            latest[int(name.partition("-")[0])] = name  # they come sorted: the last one stays
        found: dict[int, Head] = {}
        for run, name in latest.items():
            with suppress(Missing):  # the batch is finished by now
                found[run] = await self._head(batch, name)
        return found

    async def view(self, batch: Batch) -> tuple[Batch, Progress]:
        """The batch as it is now, and how far it is."""
        while batch.closed is None and batch.ranges:
            heads = await self.heads(batch)
            later = await self.refresh(batch)
            if later is batch:  # if not, its segments may have been on their way out
                return batch, sum((head.progress for head in heads.values()), Progress())
            batch = later
        return batch, batch.closed.progress if batch.closed is not None else Progress()

    async def read_range(self, batch: Batch, run: int, known: RangeLog | None = None) -> RangeLog:
        """What is recorded of a range."""
        log = known or RangeLog()
        while True:
            try:
                stored = await self._storage.read(_segment_key(batch, run, log.segments))
            except Missing:
                return log
            log.done.update(record.index for record in records_of(stored))
            log.head = head_of(stored)
            log.segments += 1

    async def commit(
        self, batch: Batch, run: int, log: RangeLog, records: RecordsBeside, *, seal: bool = False
    ) -> list[Record]:
        """Append to a range what `records` makes of the lines that have a record; returns what was written.

        They count from now on. When somebody else was quicker, that is read first, and `records` is asked again: so
        none is ever a second one. Raises Sealed.
        """
        while not log.head.is_sealed:
            added = records(log.done)
            head = Head(sum((record.cost for record in added), log.head.progress), is_sealed=seal)
            if not (added or seal):
                return added
            if await self._storage.create(_segment_key(batch, run, log.segments), segment(head, added)):
                log.done.update(record.index for record in added)
                log.head = head
                log.segments += 1
                return added
            await self.read_range(batch, run, log)
        raise Sealed

    async def records(self, batch: Batch, run: int) -> list[Record]:
        """All records of a range, in the order of the input."""
        found: list[Record] = []
        number = 0
        while True:
            try:
                found.extend(records_of(await self._storage.read(_segment_key(batch, run, number))))
            except Missing:
                return sorted(found, key=lambda record: record.index)
            number += 1

    async def _head(self, batch: Batch, name: str) -> Head:
        key = f"{batch.id}/{name}"
        head = self._heads.get(key)
        if head is None:
            stored = await self._storage.read(f"{_place(batch.tenant, batch.id)}/lines/{name}", 0, HEAD_BYTES)
            head = self._heads[key] = head_of(stored)
            if len(self._heads) > HEADS_KNOWN:
                self._heads.popitem(last=False)
        return head


def _place(tenant: str, batch_id: str) -> str:
    return f"batches/{owner_of(tenant)}/{batch_id}"


def _segment_key(batch: Batch, run: int, number: int) -> str:
    return f"{_place(batch.tenant, batch.id)}/lines/{run:06d}-{number:06d}"
