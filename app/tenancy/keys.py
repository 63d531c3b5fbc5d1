"""API keys: how they are made, what is kept of them, and until when they work. Pure but for the random bytes."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

PREFIX = "sk-sluice-"
SECRET_BYTES = 32
HINT_CHARS = 4
KEY_MAX_BYTES = 256
SHA256_BLOCK_BYTES = 64

CLOCKS_APART = timedelta(seconds=2)
"""By how much the clocks of two gateways may differ."""

KeyId = Annotated[str, Meta(pattern=r"^key_[0-9a-f]{16}$")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
TenantName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Scope(StrEnum):
    """What a key opens. An admin's opens everything that its tenant's would, too."""

    TENANT = "tenant"
    ADMIN = "admin"


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of a key: enough to recognise it, never enough to use it. `hint` are its last characters.

    A key is revoked by ending it: `expires` is the one thing that ever changes.
    """

    id: KeyId
    digest: Digest
    hint: Annotated[str, Meta(max_length=HINT_CHARS)]
    tenant: TenantName
    scope: Scope = Scope.TENANT
    created: datetime
    expires: datetime | None = None

    def is_valid(self, now: datetime) -> bool:
        return self.expires is None or now < self.expires

    def ending(self, at: datetime) -> Key:
        """The same key, which ends at `at` unless it ends before."""
        return msgspec.structs.replace(self, expires=at if self.expires is None else min(at, self.expires))


class Issued(msgspec.Struct, frozen=True):
    """A new key. `text` is the key itself: it is shown once and kept nowhere."""

    text: str
    key: Key


class Pepper:
    """Digests of keys under the server's secret: HMAC-SHA-256 (RFC 2104), of the whole key.

    Whoever reads the stored digests can neither use nor guess a key, and whoever can write them, but lacks the secret,
    cannot make one. Both halves of the HMAC start from a state computed once: 1.2 us a digest, against 3.2 us for
    `hmac.digest`, which sets both up anew.
    """

    def __init__(self, secret: bytes) -> None:
        key = hmac.digest(secret, b"sluice api keys", "sha256").ljust(SHA256_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in key))

    def digest(self, text: bytes) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text)
        outer.update(inner.digest())
        return outer.digest()


def issue(
    pepper: Pepper, tenant: str, now: datetime, *, scope: Scope = Scope.TENANT, expires: datetime | None = None
) -> Issued:
    """A new key of 256 random bits. Raises msgspec.ValidationError for a tenant's name that is none."""
    text = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    fields = {
        "id": f"key_{secrets.token_hex(8)}",
        "digest": pepper.digest(text.encode()).hex(),
        "hint": text[-HINT_CHARS:],
        "tenant": tenant,
        "scope": scope,
        "created": now,
        "expires": expires,
    }
    return Issued(text, msgspec.convert(fields, Key))


def successor(pepper: Pepper, old: Key, now: datetime) -> Issued:
    """A new key for whom `old` is: the same tenant and scope, and as long a life."""
    expires = None if old.expires is None else now + (old.expires - old.created)
    return issue(pepper, old.tenant, now, scope=old.scope, expires=expires)


def revoked(before: Iterable[Key], after: Iterable[Key], now: datetime) -> set[str]:
    """Ids of the keys that somebody has ended between two readings of a store; not of those whose time was up."""
    left = {key.id: key for key in after}
    return {key.id for key in before if key.is_valid(now) and not _works(left.get(key.id), key, now)}


def _works(left: Key | None, before: Key, now: datetime) -> bool:
    """An end that was put off or is as it was says nothing; one put close to now, by another clock, is now."""
    return left is not None and (left.expires == before.expires or left.is_valid(now + CLOCKS_APART))


def whole_second(now_s: float) -> datetime:
    """Unix seconds as the time that keys are stamped with."""
    return datetime.fromtimestamp(int(now_s), UTC)
