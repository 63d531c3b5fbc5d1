"""Rows F27 and F31 of the fault matrix: servers that come back from an older file, a damaged one, or find no room."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from app.errors import DependencyUnavailable
from tests.integration.admission.fleet import (
    PATIENCE_S,
    Dump,
    gauge,
    granted_in_time,
    is_told,
    queued,
    replica,
    soon,
    ticket,
    until,
)
from tests.processes import Valkey

APPENDING = ("--appendonly", "yes")
CUT_BYTES = 100


def saved(server: Valkey, directory: Path) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.save()
    shutil.copy(directory / "dump.rdb", directory.parent / "kept")


def appended(server: Valkey, directory: Path) -> None:
    """Every answered call has been written to the file already, if not yet to the disk."""
    shutil.copytree(directory / "appendonlydir", directory.parent / "kept")


def put_back(directory: Path) -> None:
    kept = directory.parent / "kept"
    if kept.is_dir():
        shutil.rmtree(directory / "appendonlydir")
        shutil.copytree(kept, directory / "appendonlydir")
    else:
        shutil.copy(kept, directory / "dump.rdb")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where a server keeps its files."""
    place = tmp_path / "server"
    place.mkdir()
    return place


# F27


@pytest.mark.parametrize(("keep", "options"), [(saved, ()), (appended, APPENDING)], ids=["snapshot", "log"])
async def test_a_server_restarted_on_an_older_copy_is_put_right(
    directory: Path, keep: Callable[[Valkey, Path], None], options: tuple[str, ...]
) -> None:
    """What was granted in the lost window is held, what was given back in it is not, and nothing is granted twice."""
    limits: dict[str, Any] = {"replicas": 2, "lease_s": 3}
    with Valkey(directory, *options) as server:
        async with replica(server.url, 4, **limits) as one, replica(server.url, 4, **limits) as two:
            gone, kept = await one.admit(ticket()), await two.admit(ticket())
            await asyncio.to_thread(keep, server, directory)
            gone.release()
            lost = [await one.admit(ticket()), await two.admit(ticket()), await two.admit(ticket())]
            await until(lambda: is_told(server.url, one, two))
            await asyncio.to_thread(server.kill)
            put_back(directory)
            await until(lambda: one.is_degraded and two.is_degraded)
            (waiting,) = await queued(two, ticket())  # whose part of the slots is held
            epoch = one._ledger.epoch
            await asyncio.to_thread(server.start)
            await until(lambda: not (one.is_degraded or two.is_degraded))
            await until(lambda: is_told(server.url, one, two))
            await until(lambda: one._ledger.epoch != epoch)  # it was seen that the server went back
            assert Dump(server.url).held["w"] == {kept.id, *(lease.id for lease in lost)}
            assert not waiting.done()
            kept.release()
            await soon(waiting)
            assert len(Dump(server.url).held["w"]) == 4


# F31


async def test_a_server_whose_log_was_cut_starts_with_a_stated_loss_and_is_put_right(directory: Path) -> None:
    with Valkey(directory, *APPENDING) as server:
        async with replica(server.url, 3, without_redis="refuse") as one:
            held = [await one.admit(ticket()) for _ in range(3)]
            held.pop().release()
            held.append(await one.admit(ticket()))
            await until(lambda: is_told(server.url, one))
            await asyncio.to_thread(server.kill)
            (log,) = (directory / "appendonlydir").glob("*.incr.aof")
            os.truncate(log, log.stat().st_size - CUT_BYTES)
            epoch = one._ledger.epoch
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(server.process.wait_for_line, "Truncating the AOF")
            await until(lambda: not one.is_degraded)
            await until(lambda: is_told(server.url, one))
            await until(lambda: one._ledger.epoch != epoch)  # it was seen that something was lost
            assert Dump(server.url).held["w"] == {lease.id for lease in held}
            held[0].release()
            await granted_in_time(one, ticket())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"may not mount here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(ballast: Path) -> None:
    """Take all the room that is left."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_a_server_without_room_for_its_log_is_out_of_reach_until_it_has(small_disk: Path) -> None:
    with Valkey(small_disk, *APPENDING) as server:
        async with replica(server.url, without_redis="refuse") as one:
            (await one.admit(ticket())).release()
            ballast = small_disk / "ballast"
            fill(ballast)
            async with asyncio.timeout(PATIENCE_S):
                while not one.is_degraded:  # up to here its writes fit into the last page
                    try:
                        (await one.admit(ticket())).release()
                    except DependencyUnavailable:
                        break
            with pytest.raises(DependencyUnavailable) as refused:
                await soon(one.admit(ticket()))
            assert (refused.value.status, refused.value.retry_after_s) == (503, 2)
            assert gauge(one, "sluice_admission_degraded") == 1
            ballast.unlink()
            await until(lambda: not one.is_degraded)
            await granted_in_time(one, ticket())
            assert gauge(one, "sluice_admission_degraded") == 0
