"""Makes keys and ends them, in one store: what the command line and the admin listener both do."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from app.errors import SluiceError
from app.tenancy.keys import Issued, Key, Pepper, Scope, issue, successor, whole_second
from app.tenancy.stores import KeyStore


class UnknownKey(SluiceError):
    """There is no key of this id."""


class Registrar:
    """All methods raise KeysUnreadable while the store is out of reach; nothing is done then."""

    def __init__(self, store: KeyStore, pepper: Pepper, wall: Callable[[], float]) -> None:
        self._store = store
        self._pepper = pepper
        self._wall = wall
        self._known: dict[str, Key] = {}

    async def create(self, tenant: str, *, scope: Scope = Scope.TENANT, lifetime: timedelta | None = None) -> Issued:
        """A new key; without a lifetime it works until it is revoked."""
        now = whole_second(self._wall())
        expires = None if lifetime is None else now + lifetime
        issued = issue(self._pepper, tenant, now, scope=scope, expires=expires)
        await self._store.put(issued.key)
        return issued

    async def rotate(self, key_id: str, overlap: timedelta) -> Issued:
        """A new key in place of an old one, which works on for `overlap`. Raises UnknownKey."""
        old = await self._find(key_id)
        now = whole_second(self._wall())
        issued = successor(self._pepper, old, now)
        await self._store.put(issued.key, old.ending(now + overlap))
        return issued

    async def revoke(self, key_id: str) -> Key:
        """The key, which has ended now. Raises UnknownKey."""
        ended = (await self._find(key_id)).ending(whole_second(self._wall()))
        await self._store.put(ended)
        return ended

    async def keys(self) -> list[Key]:
        """All keys, those that ended lately among them, oldest first."""
        found = await self._store.read()
        if found is not None:
            self._known = {key.id: key for key in found}
        return sorted(self._known.values(), key=lambda key: (key.created, key.id))

    async def last_used(self) -> dict[str, str]:
        """Key ids to the hour in which they were used last; a file does not know."""
        return dict(await self._store.used())

    async def aclose(self) -> None:
        await self._store.aclose()

    async def _find(self, key_id: str) -> Key:
        await self.keys()
        try:
            return self._known[key_id]
        except KeyError:
            raise UnknownKey(f"there is no key {key_id[:32]!r}") from None
