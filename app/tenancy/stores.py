"""Where keys are kept: in Redis, where every replica sees a change, or in a file, which needs no server."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import msgspec
import yaml
from redis.exceptions import RedisError

from app import settings
from app.errors import ConfigurationError, SluiceError
from app.redis_server import RedisServer
from app.tenancy.keys import Key

CONNECTIONS = 2
FILE_MAX_BYTES = 16 * 1024 * 1024
MOST_KEYS = 100_000
REMEMBERED = timedelta(days=30)
"""How long a key that has ended is still listed."""


class KeysUnreadable(SluiceError):
    """The keys are out of reach, or not what they must be; the message is one line."""


class KeyStore(Protocol):
    """Keys, kept somewhere. All calls are one at a time."""

    @property
    def name(self) -> str:
        """What an operator calls it."""

    async def read(self) -> Sequence[Key] | None:
        """All keys; None if they are what the last call returned. Raises KeysUnreadable."""

    async def put(self, *keys: Key) -> None:
        """Add these, or replace those of the same id, all or none. Raises KeysUnreadable."""

    async def used(self) -> Mapping[str, str]:
        """Key ids to the hour in which they were used last. Raises KeysUnreadable."""

    async def note_used(self, ids: Sequence[str], hour: str) -> None:
        """These were used in this hour. Raises KeysUnreadable."""

    async def aclose(self) -> None: ...


class FileKeys:
    """A YAML file of keys, alone in it, to be kept under version control if one likes: it holds digests only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        return str(self._path)

    async def read(self) -> Sequence[Key] | None:
        try:
            found = self._path.stat()
        except OSError as error:
            raise KeysUnreadable(f"{self._path}: {error.strerror or error}") from None
        seen = found.st_mtime_ns, found.st_size, found.st_ino
        if seen == self._seen:
            return None
        keys = self._load()
        self._seen = seen
        return keys

    async def put(self, *keys: Key) -> None:
        kept = {key.id: key for key in (self._load() if self._path.exists() else ())}
        kept.update((key.id, key) for key in keys)
        text = yaml.safe_dump({"keys": [_as_yaml(key) for key in kept.values()]}, sort_keys=False)
        try:
            self._write(text)
        except OSError as error:
            raise KeysUnreadable(f"{self._path}: {error.strerror or error}") from None

    async def used(self) -> Mapping[str, str]:
        return {}

    async def note_used(self, ids: Sequence[str], hour: str) -> None:
        """A file that several gateways read, perhaps from a repository, is not written for this."""

    async def aclose(self) -> None: ...

    def _load(self) -> list[Key]:
        try:
            if self._path.stat().st_size > FILE_MAX_BYTES:
                raise KeysUnreadable(f"{self._path}: larger than {FILE_MAX_BYTES} bytes")
            document = yaml.safe_load(self._path.read_text(encoding="utf-8"))
            return msgspec.convert((document or {}).get("keys") or [], list[Key])
        except OSError as error:
            raise KeysUnreadable(f"{self._path}: {error.strerror or error}") from None
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
            # What the parser says of it quotes the file, and somebody may have put a key itself there.
            raise KeysUnreadable(f"{self._path}: not a YAML mapping of `keys`") from None
        except msgspec.ValidationError as error:
            raise KeysUnreadable(f"{self._path}: {error}") from None

    def _write(self, text: str) -> None:
        """Whole or not at all, and for its owner only."""
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


class RedisKeys:
    """Keys in Redis: a hash of them, and a word that changes with each change, which is all that is read as a rule."""

    def __init__(self, redis: settings.Redis) -> None:
        self._client = RedisServer(redis).client(CONNECTIONS)
        self._keys = f"{{{redis.prefix}}}:keys"
        self._version = f"{self._keys}:version"
        self._used = f"{self._keys}:used"
        self._seen: bytes | None = None

    @property
    def name(self) -> str:
        return "redis"

    async def read(self) -> Sequence[Key] | None:
        """Keys that were there and are gone, version and all, were lost, not revoked: that is unreadable."""
        try:
            version = await self._client.get(self._version)
            if version is None and self._seen is not None:
                raise KeysUnreadable("redis has lost the keys")
            if version is not None and version == self._seen:
                return None
            pipe = self._client.pipeline(transaction=True)
            pipe.get(self._version)
            pipe.hvals(self._keys)
            version, found = await pipe.execute()
            keys = [msgspec.json.decode(value, type=Key) for value in found]
        except (RedisError, OSError) as error:
            raise KeysUnreadable(f"redis: {error}") from None
        except msgspec.DecodeError as error:
            raise KeysUnreadable(f"redis holds what is not a key: {error}") from None
        self._seen = version
        return keys

    async def put(self, *keys: Key) -> None:
        try:
            await self._make_room(keys[0].created)
            pipe = self._client.pipeline(transaction=True)
            for key in keys:
                pipe.hset(self._keys, key.id, msgspec.json.encode(key))
            pipe.set(self._version, secrets.token_hex(8))
            await pipe.execute()
        except (RedisError, OSError) as error:
            raise KeysUnreadable(f"redis: {error}") from None

    async def used(self) -> Mapping[str, str]:
        try:
            found = await self._client.hgetall(self._used)
        except (RedisError, OSError) as error:
            raise KeysUnreadable(f"redis: {error}") from None
        return {_text(name): _text(hour) for name, hour in found.items()}

    async def note_used(self, ids: Sequence[str], hour: str) -> None:
        try:
            await self._client.hset(self._used, mapping=dict.fromkeys(ids, hour))
        except (RedisError, OSError) as error:
            raise KeysUnreadable(f"redis: {error}") from None

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _make_room(self, now: datetime) -> None:
        """Forget what ended long ago; refuse to keep more than can be looked through."""
        found = [msgspec.json.decode(value, type=Key) for value in await self._client.hvals(self._keys)]
        past = [key.id for key in found if not key.is_valid(now - REMEMBERED)]
        if past:
            await self._client.hdel(self._keys, *past)
            await self._client.hdel(self._used, *past)
        if len(found) - len(past) >= MOST_KEYS:
            raise KeysUnreadable(f"there are {MOST_KEYS} keys already")


def stores_of(configured: settings.Settings) -> list[KeyStore]:
    """All that the settings name, those that can be written to by commands last."""
    files: list[KeyStore] = [FileKeys(path) for path in configured.auth.key_files]
    return files if configured.redis is None else [*files, RedisKeys(configured.redis)]


def writable_store(configured: settings.Settings, file: Path | None) -> KeyStore:
    """Where commands keep keys: in `file`, in the settings' Redis, or in their one file. Raises ConfigurationError."""
    if file is not None:
        return FileKeys(file)
    if configured.redis is not None:
        return RedisKeys(configured.redis)
    if len(configured.auth.key_files) == 1:
        return FileKeys(configured.auth.key_files[0])
    raise ConfigurationError("where are the keys? Name --file FILE, or a --config with a redis or one key file")


async def require_keys(configured: settings.Settings) -> None:
    """Raises ConfigurationError unless somebody can get in; a Redis that is out of reach may hold keys."""
    found = 0
    for store in stores_of(configured):
        try:
            found += len(await store.read() or ())
        except KeysUnreadable as error:
            if isinstance(store, FileKeys):
                raise ConfigurationError(str(error)) from None
            return
        finally:
            await store.aclose()
    if not found:
        raise ConfigurationError(
            "auth is on and there is no key: `sluice keys create --tenant NAME` makes one (with --config FILE, or "
            "--file FILE named in auth.key_files); `auth: {enabled: false}` lets everybody in"
        )


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def _as_yaml(key: Key) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(key)
    return {name: value for name, value in fields.items() if value is not None}
