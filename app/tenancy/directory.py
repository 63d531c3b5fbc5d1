"""The keys of all stores, in memory: what a request is looked up in, without asking anybody.

Every store is asked for changes twice a second, so a key that was made or revoked anywhere is so everywhere within a
second. A store that does not answer leaves its keys as they were last seen, for `stale_s` at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from app.telemetry.logs import Log
from app.tenancy.keys import Key, Scope, revoked, whole_second
from app.tenancy.stores import KeyStore, KeysUnreadable
from app.tenancy.tenants import Tenants
from app.tenant import Tenant

REFRESH_S = 0.5
NOTE_USED_S = 60.0
HOUR = "%Y-%m-%dT%H:00Z"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and by which key; none where nobody is asked for one."""

    tenant: Tenant
    is_admin: bool
    key: Key | None = None
    expires_s: float = float("inf")


@dataclass(slots=True)
class _Shelf:
    """What was last read of a store, and when, in monotonic seconds."""

    store: KeyStore
    keys: Sequence[Key] = ()
    read_at: float | None = None
    trouble: str = ""


class Directory:
    """Callers by the digest of their key. Enter `running` before use."""

    def __init__(
        self,
        stores: Sequence[KeyStore],
        tenants: Tenants,
        stale_s: float,
        log: Log,
        clock: Callable[[], float],
        wall: Callable[[], float],
        on_revoked: Callable[[Set[str]], object] = lambda key_ids: None,
    ) -> None:
        """`on_revoked` is told the ids of keys that somebody has ended, from then on."""
        self._shelves = [_Shelf(store) for store in stores]
        self._tenants = tenants
        self._stale_s = stale_s
        self._log = log
        self._clock = clock
        self._wall = wall
        self._on_revoked = on_revoked
        self._revoked: set[str] = set()
        self._callers: dict[bytes, Caller] = {}
        self._used: set[str] = set()

    def find(self, digest: bytes) -> Caller | None:
        """Whose key this is the digest of, whether it has ended or not."""
        return self._callers.get(digest)

    @property
    def is_complete(self) -> bool:
        """Whether every store has been read: only then an unknown key is known to be none."""
        return all(shelf.read_at is not None for shelf in self._shelves)

    @property
    def stores(self) -> list[KeyStore]:
        return [shelf.store for shelf in self._shelves]

    def kept(self) -> list[tuple[KeyStore, Key]]:
        """All keys, as last read, and where each is kept."""
        return [(shelf.store, key) for shelf in self._shelves for key in shelf.keys]

    def note_used(self, key: Key) -> None:
        self._used.add(key.id)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the stores."""
        await self.refresh()
        tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._tell_used())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for shelf in self._shelves:
                await shelf.store.aclose()

    async def refresh(self) -> None:
        """Read what has changed. A store in trouble keeps no other from being read."""
        changed = [await self._read(shelf) for shelf in self._shelves]
        if any(changed):
            self.look_up_tenants()
        if self._revoked:
            ended, self._revoked = self._revoked, set()
            self._on_revoked(ended)

    def look_up_tenants(self) -> None:
        """From now on keys stand for tenants as they are now."""
        self._callers = {bytes.fromhex(key.digest): self._caller(key) for shelf in self._shelves for key in shelf.keys}

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await self.refresh()

    async def _read(self, shelf: _Shelf) -> bool:
        """Whether its keys are others now."""
        try:
            keys = await shelf.store.read()
        except KeysUnreadable as error:
            return self._keep(shelf, str(error))
        if shelf.trouble:
            self._log.warning("keys can be read again", store=shelf.store.name)
            shelf.trouble = ""
        shelf.read_at = self._clock()
        if keys is None:
            return False
        self._revoked |= revoked(shelf.keys, keys, datetime.fromtimestamp(self._wall(), UTC))
        shelf.keys = keys
        return True

    def _keep(self, shelf: _Shelf, trouble: str) -> bool:
        """The last known keys go on working, but not for ever."""
        if not shelf.trouble:
            self._log.warning(
                "keys cannot be read",
                store=shelf.store.name,
                reason=trouble,
                known=len(shelf.keys),
                for_s=self._stale_s,
            )
        shelf.trouble = trouble
        if not shelf.keys or shelf.read_at is None or self._clock() - shelf.read_at < self._stale_s:
            return False
        self._log.error("keys are too old to be believed", store=shelf.store.name, dropped=len(shelf.keys))
        shelf.keys = ()
        return True

    def _caller(self, key: Key) -> Caller:
        expires_s = float("inf") if key.expires is None else key.expires.timestamp()
        return Caller(self._tenants.get(key.tenant), key.scope is Scope.ADMIN, key, expires_s)

    async def _tell_used(self) -> None:
        """To the hour: enough to find keys that nobody needs, and next to nothing to write."""
        while True:
            await asyncio.sleep(NOTE_USED_S)
            await self.tell_used(whole_second(self._wall()).strftime(HOUR))

    async def tell_used(self, hour: str) -> None:
        """Let the stores know which keys were used since the last call."""
        used, self._used = self._used, set()
        for shelf in self._shelves:
            ids = [key.id for key in shelf.keys if key.id in used]
            try:
                if ids:
                    await shelf.store.note_used(ids, hour)
            except KeysUnreadable:
                self._used.update(ids)
