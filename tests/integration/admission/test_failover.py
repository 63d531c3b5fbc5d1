"""Rows F26, F27 and F34: the primary is another one, as Sentinels or a cluster say, and nothing is granted twice."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from app import settings
from app.admission.controller import RedisAdmission
from app.admission.ledger import Ledger, LedgerGone, Scripts, SharedRules, check
from app.batches.claims import RedisClaims
from app.errors import ConfigurationError
from app.redis_server import RedisServer
from app.tenancy.keys import Pepper, issue
from app.tenancy.stores import KeysUnreadable, RedisKeys
from tests.certificates import Authority
from tests.fakes.fault_proxy import FaultProxy
from tests.integration.admission.driving import RULES
from tests.integration.admission.fleet import (
    PATIENCE_S,
    Dump,
    granted_in_time,
    is_told,
    parked,
    queued,
    replica,
    restore,
    snapshot,
    soon,
    ticket,
    until,
)
from tests.ports import free_port
from tests.processes import ROOT, Valkey
from tests.redis_fleets import HOST, MASTER, Cluster, Guarded, SentinelProcess, talking, told, wait_until

SHARED = SharedRules(RULES, lease_us=1_500_000, settle_us=500_000, replicas=1)
SLOT = key_slot(b"{sluice}")
LONG_S = 40.0
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    with Guarded(tmp_path) as servers:
        yield servers


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as servers:
        yield servers


def watched(nodes: list[str], **more: Any) -> settings.Redis:
    return settings.Redis.model_validate({"sentinel": {"master": MASTER, "nodes": nodes, **more}})


async def healed(*admissions: RedisAdmission) -> None:
    await until(lambda: not any(admission.is_degraded for admission in admissions), LONG_S)


def at_port(admission: RedisAdmission) -> int:
    return port_of(admission._ledger)


def port_of(ledger: Ledger) -> int:
    """Where the server listens that the ledger is connected to; 0 while it is to none."""
    wire = ledger._wire
    return 0 if wire is None else int(wire._transport.get_extra_info("peername")[1])


# Sentinel


async def test_a_promoted_replica_is_used_and_told_what_is_held(guarded: Guarded) -> None:
    way = watched(guarded.nodes)
    async with replica(way, 2, lease_s=9, replicas=2) as one, replica(way, 2, lease_s=9, replicas=2) as two:
        assert at_port(one) == at_port(two) == guarded.primary.port
        held = [await one.admit(ticket()), await two.admit(ticket())]
        (waiting,) = await queued(one, ticket())
        await asyncio.to_thread(guarded.primary.kill)
        await until(lambda: one.is_degraded and two.is_degraded)
        await asyncio.to_thread(guarded.promote)
        await healed(one, two)
        assert at_port(one) == at_port(two) == guarded.replica.port
        await until(lambda: is_told(guarded.replica.url, one, two))
        assert Dump(guarded.replica.url).held["w"] == {lease.id for lease in held}
        assert not waiting.done()
        held[1].release()
        third = await soon(waiting)
        assert third.worker_id == "w"
        await until(lambda: is_told(guarded.replica.url, one, two))
        assert len(Dump(guarded.replica.url).held["w"]) == 2


async def test_what_the_promoted_replica_never_heard_of_is_not_granted_again(guarded: Guarded) -> None:
    """F27: the last grants were not copied. Whoever comes first must not be believed that the slots are free."""
    way = watched(guarded.nodes)
    async with (
        replica(way, 2, lease_s=30, replicas=2, without_redis="refuse") as one,
        replica(way, 2, lease_s=30, replicas=2, without_redis="refuse") as two,
    ):
        await until(lambda: is_told(guarded.primary.url, one, two))
        await one.overview()  # asked and answered: it has nothing more to say for a while
        said, before = one._ledger._answered, snapshot(guarded.primary.url)
        held = [await two.admit(ticket()), await two.admit(ticket())]
        assert one._ledger._answered == said  # so it lost no call, by which it would know
        roads = [way_of(admission, Nowhere()) for admission in (one, two)]
        await asyncio.to_thread(guarded.primary.kill)
        await until(lambda: one.is_degraded and two.is_degraded)
        await asyncio.to_thread(guarded.promote)
        restore(guarded.replica.url, before)
        way_of(one, roads[0])
        await healed(one)
        waiting = asyncio.create_task(one.admit(ticket()))
        await until(lambda: parked(one) == 1 or waiting.done())
        assert not Dump(guarded.replica.url).leases
        way_of(two, roads[1])
        await healed(two)
        await until(lambda: is_told(guarded.replica.url, one, two))
        assert Dump(guarded.replica.url).held["w"] == {lease.id for lease in held}
        assert not waiting.done()
        held[0].release()
        await soon(waiting)


class Nowhere:
    """The way to the server of one who is cut off from it."""

    connect_timeout_s = 1.0

    async def connected(self) -> Any:
        raise ConnectionRefusedError("cut off")


def way_of(admission: RedisAdmission, way: Any) -> Any:
    """Give it another way to the server, from its next connection on; the one that it had."""
    had, admission._ledger._server = admission._ledger._server, way
    return had


async def test_a_primary_that_was_demoted_is_left(guarded: Guarded) -> None:
    """F26: an orderly failover; the old primary lives on, read-only."""
    way = watched(guarded.nodes)
    keys, claims = RedisKeys(way), RedisClaims(way, 15, asyncio.get_running_loop().time)
    issued = issue(Pepper(b""), "acme", NOW)
    await keys.put(issued.key)
    async with replica(way) as one:
        held = await one.admit(ticket())
        await asyncio.to_thread(guarded.wait_for_copies)
        await asyncio.to_thread(guarded.sentinels[0].ask, "FAILOVER", MASTER)
        await asyncio.to_thread(guarded.promote)
        await until(lambda: at_port(one) == guarded.replica.port, LONG_S)
        await until(lambda: is_told(guarded.replica.url, one))
        assert Dump(guarded.replica.url).leases == {held.id}
        await noted(keys, issued.key.id)
        with talking(guarded.replica.port) as client:
            assert client.hgetall("{sluice}:keys:used") == {issued.key.id: "2026-01-01T00:00Z"}
        async with asyncio.timeout(PATIENCE_S):
            while await claims.take(["line"]) != ["line"]:
                await asyncio.sleep(0.05)
    await claims.close()


async def test_a_replica_that_is_named_is_not_used(guarded: Guarded, tmp_path: Path) -> None:
    """As between two words of a Sentinel, or by one that is wrong."""
    with SentinelProcess(tmp_path / "mistaken", guarded.replica.port, 2) as mistaken:
        way = RedisServer(watched([mistaken.node]))
        with pytest.raises(redis.ConnectionError, match="is not a primary"):
            await (await way.connected()).disconnect()
        async with aclosing(way.client(1)) as client:
            with pytest.raises(redis.ConnectionError, match="is not a primary"):
                await client.get("x")


async def noted(keys: RedisKeys, key_id: str) -> None:
    """Write by pooled connections, each of which leads to the old primary still, or was cut by it. Closes them."""
    async with aclosing(keys), asyncio.timeout(LONG_S):
        while True:
            try:
                return await keys.note_used([key_id], "2026-01-01T00:00Z")
            except KeysUnreadable:
                await asyncio.sleep(0)


async def test_the_newest_word_counts_and_silent_sentinels_cost_little(tmp_path: Path) -> None:
    """A Sentinel that was away during a failover still names the old primary, which lives and calls itself one."""
    old, new = Valkey(tmp_path), Valkey(tmp_path)
    with old, new, SentinelProcess(tmp_path / "behind", old.port, 2) as behind:
        with SentinelProcess(tmp_path / "ahead", new.port, 2) as ahead:
            ahead.ask("SET", MASTER, "quorum", "2")
            await asyncio.to_thread(_renew_epoch, ahead, new.port)
            async with FaultProxy(old.port) as silent:
                silent.fall_silent()
                dumb, dead = f"{HOST}:{silent.port}", f"{HOST}:{free_port()}"
                for nodes in ([behind.node, dumb, ahead.node], [ahead.node, dead, behind.node]):
                    way = watched(nodes).model_copy(update={"call_timeout_s": 4.0})
                    ledger = Ledger(way, "r", SHARED, Scripts())
                    await ledger.open()
                    assert port_of(ledger) == new.port
                    await ledger.close()


def _renew_epoch(sentinel: SentinelProcess, port: int) -> None:
    """As after a failover: what this Sentinel says is newer."""
    sentinel.process.stop()
    config = sentinel._config.read_text()
    sentinel._config.write_text(config.replace(f"config-epoch {MASTER} 0", f"config-epoch {MASTER} 7"))
    sentinel.__enter__()
    facts = sentinel.ask("MASTER", MASTER)
    assert dict(zip(facts[::2], facts[1::2], strict=True))["config-epoch"] == "7"
    assert int(sentinel.ask("GET-MASTER-ADDR-BY-NAME", MASTER)[1]) == port


async def test_sentinels_and_the_server_ask_for_passwords_over_tls(own_valkey: Valkey, tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    for name, secret in (("server", "one"), ("sentinel", "two"), ("wrong", "three")):
        (tmp_path / name).write_text(secret)
    with talking(own_valkey.port) as operator:
        told(operator, "ACL", "SETUSER", "sluice", "on", ">one", "allkeys", "allchannels", "+@all")
        operator.config_set("requirepass", "zero")
    async with FaultProxy(own_valkey.port, ours.server(HOST)) as server:
        with SentinelProcess(tmp_path / "s", server.port, 1, password="two") as sentinel:
            async with FaultProxy(sentinel.port, ours.server(HOST)) as asked:
                given = {"username": "sluice", "password_file": tmp_path / "server", "tls": {"ca_file": ours.ca_file}}

                def way(password: str) -> settings.Redis:
                    node = f"{HOST}:{asked.port}"
                    guide = {"master": MASTER, "nodes": [node], "password_file": tmp_path / password}
                    return settings.Redis.model_validate({"sentinel": guide, **given})

                async with replica(way("sentinel")) as one:
                    await healed(one)
                    await granted_in_time(one, ticket())
                ledger = Ledger(way("wrong"), "r", SHARED, Scripts())
                with pytest.raises(LedgerGone, match="no word of the primary") as gone:
                    await ledger.open()
                assert "three" not in str(gone.value)


async def test_a_mistaken_name_or_a_server_that_is_no_sentinel_ends_the_start(guarded: Guarded) -> None:
    wrong = settings.Redis.model_validate({"sentinel": {"master": "legder", "nodes": guarded.nodes}})
    with pytest.raises(ConfigurationError, match=r"redis\.sentinel: .* knows no primary named 'legder'"):
        await check(wrong)
    no_sentinel = watched([f"{HOST}:{guarded.primary.port}"])
    with pytest.raises(ConfigurationError, match=r"redis\.sentinel: 127\.0\.0\.1:\d+ is no Sentinel"):
        await check(no_sentinel)
    with pytest.raises(ConfigurationError, match=r"redis\.cluster: 127\.0\.0\.1:\d+ is in no cluster"):
        await check(settings.Redis(cluster=(f"{HOST}:{guarded.primary.port}",)))
    await check(watched([f"{HOST}:{free_port()}"]))  # out of reach: it may come back


# Cluster


async def test_in_a_cluster_everything_is_in_one_slot(cluster: Cluster) -> None:
    """Ledger, keys and claims; whichever node is asked first."""
    for nodes in ([node] for node in cluster.nodes):
        way = settings.Redis(cluster=tuple(nodes))
        await check(way)
        async with replica(way) as one, replica(way) as two:
            await healed(one, two)
            with await one.admit(ticket()):
                (waiting,) = await queued(two, ticket())
            (await soon(waiting)).release()
            with talking(cluster.members[0].port) as client:
                channels = told(client, "PUBSUB", "CHANNELS")
            assert len(channels) == 2
            assert all(name.startswith("{sluice}:") for name in channels)
    await check_keys_and_claims(settings.Redis(cluster=tuple(cluster.nodes)))
    names = [name for at in range(3) for name in cluster.ask(at, "KEYS", "*")]
    assert {name.rsplit(":", 1)[-1] for name in names} >= {"keys", "version", "used", "line", "state"}
    assert {key_slot(name.encode()) for name in names} == {SLOT}


async def check_keys_and_claims(way: settings.Redis) -> None:
    keys, claims = RedisKeys(way), RedisClaims(way, 1, asyncio.get_running_loop().time)
    issued = issue(Pepper(b""), "acme", NOW)
    await keys.put(issued.key)
    await keys.note_used([issued.key.id], "2026-01-01T00:00Z")
    assert await keys.read() == [issued.key]
    await claims.check()
    async with asyncio.timeout(PATIENCE_S):
        while await claims.take(["line", "other"], 2) != ["line", "other"]:
            await asyncio.sleep(0.05)
    await claims.renew()
    assert claims.holds("line")
    await claims._redis.aclose()  # what it claimed stays, to be seen
    await keys.aclose()


async def test_a_slot_that_moves_is_followed_and_nothing_is_granted_twice(cluster: Cluster) -> None:
    way = settings.Redis(cluster=tuple(cluster.nodes))
    keys = RedisKeys(way)
    issued = issue(Pepper(b""), "acme", NOW)
    await keys.put(issued.key)
    async with replica(way, 2, lease_s=9, replicas=2) as one, replica(way, 2, lease_s=9, replicas=2) as two:
        held = [await one.admit(ticket()), await two.admit(ticket())]
        (waiting,) = await queued(one, ticket())
        await asyncio.to_thread(cluster.move, SLOT, 0, 1)
        await until(lambda: {at_port(one), at_port(two)} == {cluster.members[1].port}, LONG_S)
        await healed(one, two)
        url = cluster.members[1].url
        await until(lambda: is_told(url, one, two))
        assert Dump(url).held["w"] == {lease.id for lease in held}
        assert not waiting.done()
        held[0].release()
        await soon(waiting)
        await noted(keys, issued.key.id)


async def test_a_failover_in_a_cluster_is_followed(cluster: Cluster) -> None:
    """An orderly one, with a client's connection to the old primary open; then the new one dies, and nobody is left."""
    await asyncio.to_thread(cluster.follow, 2, 0)
    way = settings.Redis(cluster=tuple(cluster.nodes))
    async with replica(way, lease_s=9) as one:
        held = await one.admit(ticket())
        cluster.ask(2, "CLUSTER", "FAILOVER")
        await asyncio.to_thread(wait_until, lambda: cluster.owner(SLOT, 1) == 2)
        await until(lambda: at_port(one) == cluster.members[2].port, LONG_S)
        await healed(one)
        await until(lambda: is_told(cluster.members[2].url, one))
        assert Dump(cluster.members[2].url).leases == {held.id}
        cluster.members[2].kill()
        await until(lambda: one.is_degraded)
        assert held.worker_id == "w"


async def test_in_a_cluster_the_advised_user_needs_one_right_more(cluster: Cluster, tmp_path: Path) -> None:
    (line,) = re.findall(r"(?m)^ACL SETUSER .*$", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    (tmp_path / "password").write_text("p")
    way = settings.Redis(cluster=tuple(cluster.nodes), username="sluice", password_file=tmp_path / "password")
    for at in range(3):
        cluster.ask(at, *line.replace("PASSWORD", "p").split())
    with pytest.raises(ConfigurationError, match="does not let its user ask for the primary"):
        await check(way)
    for at in range(3):
        cluster.ask(at, "ACL", "SETUSER", "sluice", "+cluster|slots")
    async with replica(way) as one:
        await healed(one)
        await granted_in_time(one, ticket())


async def test_a_cluster_behind_a_url_ends_the_start(cluster: Cluster) -> None:
    with pytest.raises(ConfigurationError, match="cluster mode; name its nodes in redis"):
        await check(settings.Redis(url=cluster.members[0].url))
