"""Where files and batches are kept: objects that are written once, read in part, and taken away whole.

Everything durable rests on one promise, which a directory and a bucket both keep: of several that create the same key,
exactly one does, and what it wrote is there, whole, after any crash. That is the fence of every commit here, so that no
lock has to be trusted.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, ParamSpec, Protocol, TypeVar

from app import settings
from app.errors import ConfigurationError, StorageUnavailable

CHUNK_BYTES = 256 * 1024
ABANDONED_S = 24 * 3600.0

P = ParamSpec("P")
T = TypeVar("T")


class Missing(Exception):
    """There is no such object."""


class Storage(Protocol):
    """Keys are words of letters, digits and `-_.`, parted by `/`. All methods raise StorageUnavailable."""

    async def create(self, key: str, data: bytes) -> bool:
        """Store a small object, unless there is one of this key already: then nothing happens, and False."""

    async def upload(self, key: str, parts: AsyncIterator[bytes]) -> int:
        """Store an object of any size under a key that nobody else uses; its bytes. It appears whole, or never."""

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes from `start` to `end`, or to the object's end. Raises Missing."""

    def stream(self, key: str) -> AsyncIterator[bytes]:
        """All of it, in chunks. Raises Missing."""

    async def names(self, prefix: str) -> list[str]:
        """The next words of the keys that begin with `prefix/`, sorted, each once."""

    async def remove(self, key: str) -> None:
        """Take an object away, if it is there."""

    async def clear(self, prefix: str) -> None:
        """Take away every object whose key begins with `prefix/`."""


class Directory:
    """A local directory, or one that several machines mount: see Storage.

    An object is written beside, synced to the disk, and only then linked to its name; the name is synced as well.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._unfinished = root / "unfinished"
        self._lock: BinaryIO | None = None

    def open(self, *, is_alone: bool = False) -> None:
        """Make the directory, and take away what crashes left. Raises ConfigurationError.

        Who `is_alone` locks it, for as long as the process lives.
        """
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True, mode=0o700)
            if is_alone:
                self._lock = (self._root / "lock").open("ab")
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self._unfinished.iterdir():
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink(missing_ok=True)
        except BlockingIOError:
            raise ConfigurationError(
                f"batches.directory: {self._root}: another gateway uses it; several need redis to share it"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"batches.directory: {self._root}: {error.strerror or error}") from None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    async def create(self, key: str, data: bytes) -> bool:
        return await _off_loop(self._create, self._path(key), data)

    async def upload(self, key: str, parts: AsyncIterator[bytes]) -> int:
        path, unfinished = self._path(key), self._beside()
        size = 0
        try:
            file = await _off_loop(open, unfinished, "xb", 0)
            try:
                async for part in parts:
                    size += len(part)
                    await _off_loop(_write_all, file, part)
                await _off_loop(os.fsync, file.fileno())
            finally:
                file.close()
            await _off_loop(self._publish, unfinished, path)
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        return size

    async def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return await _off_loop(_read, self._path(key), start, end)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        file: BinaryIO = await _off_loop(open, self._path(key), "rb", 0)
        try:
            while chunk := await _off_loop(file.read, CHUNK_BYTES):
                yield chunk
        finally:
            file.close()

    async def names(self, prefix: str) -> list[str]:
        return await _off_loop(_names, self._path(prefix))

    async def remove(self, key: str) -> None:
        await _off_loop(_remove, self._path(key))

    async def clear(self, prefix: str) -> None:
        await _off_loop(_clear, self._path(prefix))

    def _path(self, key: str) -> Path:
        return self._root / "objects" / key

    def _beside(self) -> Path:
        return self._unfinished / secrets.token_hex(16)

    def _create(self, path: Path, data: bytes) -> bool:
        if path.exists():
            return False
        unfinished = self._beside()
        try:
            with unfinished.open("xb", 0) as file:
                _write_all(file, data)
                os.fsync(file.fileno())
            self._publish(unfinished, path)
        except FileExistsError:
            return False
        finally:
            unfinished.unlink(missing_ok=True)
        return True

    def _publish(self, unfinished: Path, path: Path) -> None:
        """Give a whole file its name; a link, unlike a rename, never replaces."""
        _make_directory(path.parent)
        os.link(unfinished, path)
        _sync(path.parent)


def open_storage(limits: settings.Batches, *, is_alone: bool) -> Storage | None:
    """The storage that is configured, if any. Raises ConfigurationError.

    Who `is_alone` shares it with nobody: without Redis two gateways would do all the work twice.
    """
    if limits.bucket is not None:
        from app.batches.bucket import Bucket  # the largest of all libraries, loaded where it is used

        return Bucket(limits.bucket)
    if limits.directory is None:
        return None
    directory = Directory(limits.directory)
    directory.open(is_alone=is_alone)
    return directory


async def _off_loop(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    return await told(asyncio.to_thread(work, *arguments, **named))


async def told(work: Awaitable[T]) -> T:
    """Its outcome, with the operating system's errors as this module's."""
    try:
        return await work
    except (FileNotFoundError, NotADirectoryError):
        raise Missing from None
    except OSError as error:
        raise StorageUnavailable(reason=errno.errorcode.get(error.errno or 0, type(error).__name__)) from error


def _write_all(file: BinaryIO, data: bytes) -> None:
    """An unbuffered write may take less than all, as when the disk is about to be full."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _make_directory(path: Path) -> None:
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True, mode=0o700)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path, start: int, end: int | None) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else max(0, end - start))


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(path)
