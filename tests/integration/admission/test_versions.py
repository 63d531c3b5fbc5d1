"""Rows F33 and F34 of the fault matrix: scripts of several versions on one server, and servers that are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

import pytest
import redis

from app.admission.ledger import LAYOUT, Scripts
from app.errors import ConfigurationError
from tests.integration.admission.fleet import (
    PREFIX,
    Dump,
    granted_in_time,
    is_told,
    queued,
    replica,
    soon,
    ticket,
    until,
)
from tests.integration.gateway.running import start_gateway
from tests.ports import free_port
from tests.processes import Valkey

CLOCK = resources.files("app.admission").joinpath("scripts/clock.lua").read_text()
COMMENTED = Scripts(CLOCK + "-- as another release has it\n")
NEXT_LAYOUT = Scripts(layout=LAYOUT + 1)


# F33


async def test_forgotten_scripts_are_loaded_again(valkey: Valkey) -> None:
    async with replica(valkey.url, 2) as one:
        held = await one.admit(ticket())
        with redis.Redis.from_url(valkey.url) as client:
            client.script_flush()
        held.release()
        await granted_in_time(one, ticket())
        assert not one.is_degraded


async def test_two_versions_of_the_scripts_share_one_ledger(valkey: Valkey) -> None:
    """A rolling update: slots are exact, and grants cross over, both ways."""
    assert not set(COMMENTED.digest.values()) & set(Scripts().digest.values())
    async with replica(valkey.url, 3) as old, replica(valkey.url, 3, COMMENTED) as new:
        held = [await old.admit(ticket()), await new.admit(ticket()), await old.admit(ticket())]
        waiting = [*await queued(new, ticket()), *await queued(old, ticket()), *await queued(new, ticket())]
        assert Dump(valkey.url).held["w"] == {lease.id for lease in held}
        for lease in held:
            lease.release()
        taken = [await soon(task) for task in waiting]
        await until(lambda: is_told(valkey.url, old, new))
        assert Dump(valkey.url).held["w"] == {lease.id for lease in taken}
        assert not old.is_degraded
        assert not new.is_degraded


async def test_an_old_replica_that_leaves_hands_its_place_to_a_new_one(valkey: Valkey) -> None:
    """At once, although its lease lives on: it says that it leaves."""
    async with replica(valkey.url, 1, COMMENTED, lease_s=60) as new:
        async with replica(valkey.url, 1, lease_s=60) as old:
            await old.admit(ticket())
            (waiting,) = await queued(new, ticket())
        await soon(waiting)
        await until(lambda: is_told(valkey.url, new))


async def test_another_layout_is_another_ledger_that_this_one_does_not_touch(valkey: Valkey) -> None:
    """What a release that changes the layout must know: neither counts the other's leases."""
    async with replica(valkey.url, 1) as old, replica(valkey.url, 1, NEXT_LAYOUT) as new:
        held = await old.admit(ticket())
        (waiting,) = await queued(old, ticket())
        with redis.Redis.from_url(valkey.url) as client:
            before = {name: client.dump(name) for name in [*client.keys(f"{PREFIX}held:*"), f"{PREFIX}tickets"]}
            lease = await granted_in_time(new, ticket())
            (behind,) = await queued(new, ticket())
            lease.release()
            await soon(behind)
            assert {name: client.dump(name) for name in before} == before
            prefixes = {name.rsplit(b":", 1)[0].split(b":")[1] for name in client.keys("{sluice}:*")}
        assert prefixes == {b"%d" % LAYOUT, b"%d" % (LAYOUT + 1)}
        assert Dump(valkey.url).leases == {held.id}
        held.release()
        await soon(waiting)


# F34


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_an_evicting_server_is_refused_in_one_line(own_valkey: Valkey, policy: str) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        client.config_set("maxmemory-policy", policy)
    await is_refused(own_valkey.url, policy)


async def test_a_cluster_is_refused_in_one_line(tmp_path: Path) -> None:
    with Valkey(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        await is_refused(server.url, "cluster")


@pytest.mark.parametrize("version", ["2.8.24", "6.2.14"])
async def test_a_server_that_is_too_old_is_refused_in_one_line(version: str) -> None:
    async with server_of(version) as url:
        await is_refused(url, rf"Redis {version}; 7\.0 or newer")


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_gateway_does_not_start_on_a_server_that_is_too_old(tmp_path: Path, processes: int) -> None:
    """The exit code is that of a wrong configuration, all that it says is one line."""
    configuration = tmp_path / "gateway.yaml"
    async with server_of("6.2.14") as url:
        listen = f"listen: {{port: {free_port()}, processes: {processes}}}\n"
        configuration.write_text(f"{listen}redis: {{url: {url}}}\n", encoding="utf-8")
        with start_gateway("--config", str(configuration)) as process:
            code = await asyncio.to_thread(process.wait, 30)
    assert code == 2
    (line,) = process.output.splitlines()
    assert "Redis 6.2.14; 7.0 or newer" in line


async def is_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as refused:
        async with replica(url):
            pass
    assert "\n" not in str(refused.value)


@asynccontextmanager
async def server_of(version: str) -> AsyncIterator[str]:
    """A server that says this version and agrees to everything else."""
    info = f"# Server\r\nredis_version:{version}\r\nrole:master\r\nmaxmemory_policy:noeviction\r\n".encode()

    serving: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(serve(reader, writer)))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while count := (await reader.readline())[1:]:
            words = []
            for _ in range(int(count)):
                size = int((await reader.readline())[1:])
                words.append((await reader.readexactly(size + 2))[:-2])
            is_info = words[0].upper() == b"INFO"
            writer.write(b"$%d\r\n%b\r\n" % (len(info), info) if is_info else b"+OK\r\n")
        writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        await asyncio.gather(*serving)
