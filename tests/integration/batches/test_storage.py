"""Both storages keep the same promises: a directory, and a bucket on a real S3 server."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from app.batches.storage import CHUNK_BYTES, Directory, Missing, Storage
from app.errors import StorageUnavailable


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_of_several_that_create_a_key_one_does(storage: Storage) -> None:
    for key in (f"a/{number}" for number in range(20)):
        told = await asyncio.gather(*(storage.create(key, b"%d" % number) for number in range(8)))
        assert sorted(told) == [False] * 7 + [True]
        assert await storage.read(key) == b"%d" % told.index(True)
        assert not await storage.create(key, b"later")


async def test_parts_of_an_object_can_be_read(storage: Storage) -> None:
    await storage.create("k", b"0123456789")
    assert await storage.read("k", 2, 5) == b"234"
    assert await storage.read("k", 7) == b"789"
    assert await storage.read("k", 0, 500) == b"0123456789"


async def test_a_large_object_comes_back_as_it_was(storage: Storage) -> None:
    parts = [bytes([number]) * (CHUNK_BYTES // 2 + 1) for number in range(30)]
    assert await storage.upload("large", pieces(*parts)) == sum(map(len, parts))
    assert b"".join([chunk async for chunk in storage.stream("large")]) == b"".join(parts)


async def test_names_are_the_next_words(storage: Storage) -> None:
    for key in ("x/b/1", "x/b/2", "x/a", "y/c"):
        await storage.create(key, b".")
    assert await storage.names("x") == ["a", "b"]
    assert await storage.names("none") == []


async def test_what_is_not_there_is_missing(storage: Storage) -> None:
    with pytest.raises(Missing):
        await storage.read("none")
    with pytest.raises(Missing):
        _ = [chunk async for chunk in storage.stream("none")]
    await storage.remove("none")
    await storage.clear("none")


async def test_removed_is_gone(storage: Storage) -> None:
    for key in ("x/b/1", "x/b/2", "x/a", "xy"):
        await storage.create(key, b".")
    await storage.remove("x/a")
    assert await storage.names("x") == ["b"]
    await storage.clear("x")
    assert await storage.names("x") == []
    assert await storage.read("xy") == b"."
    assert await storage.create("x/a", b"again")


async def test_an_upload_that_breaks_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise StorageUnavailable(reason="test")

    with pytest.raises(StorageUnavailable):
        await storage.upload("x/half", broken())
    assert await storage.names("x") == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond a megabyte: a write fails in the middle, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
async def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    directory.open()
    with pytest.raises(StorageUnavailable):
        await directory.upload("x/large", pieces(*[bytes(CHUNK_BYTES)] * 5))
    with pytest.raises(StorageUnavailable):
        await directory.create("x/small", bytes(1024 * 1024 + 1))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert await directory.create("x/small", b"fits")
