"""Redis over TLS: used when its certificate holds, out of reach when it does not, and never spoken to in clear."""

from __future__ import annotations

import asyncio
import re
import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis

from app import settings
from app.admission.ledger import Ledger, LedgerGone, Scripts, SharedRules
from app.admission.roster import rules_of
from app.batches.claims import RedisClaims
from app.errors import DependencyUnavailable
from app.redis_server import RedisServer
from app.tenancy.keys import Pepper, issue
from app.tenancy.stores import KeysUnreadable, RedisKeys
from tests.certificates import Authority
from tests.fakes.fault_proxy import FaultProxy
from tests.integration.admission.fleet import replica, ticket
from tests.processes import ROOT, Valkey

HERE = "127.0.0.1"
RULES = SharedRules(rules_of(settings.Admission()), lease_us=1_500_000, settle_us=0, replicas=1)


def trusting(ours: Authority, **more: str) -> settings.Tls:
    return settings.Tls(ca_file=ours.ca_file, **more)


async def test_leases_are_granted_over_tls(valkey: Valkey, tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    async with FaultProxy(valkey.port, ours.strict_server(HERE)) as server:
        redis = settings.Redis(url=server.url, tls=trusting(ours, **ours.client()))
        async with replica(redis) as admission:
            assert not admission.is_degraded
            with await admission.admit(ticket()) as lease:
                assert lease.worker_id == "w"


async def test_keys_are_kept_over_tls(valkey: Valkey, tmp_path: Path) -> None:
    """With a certificate of its own, as the ledger; a server that is not trusted is told nothing."""
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    issued = issue(Pepper(b""), "acme", datetime(2026, 1, 1, tzinfo=UTC))
    async with FaultProxy(valkey.port, ours.strict_server(HERE)) as server:
        store = RedisKeys(settings.Redis(url=server.url, tls=trusting(ours, **ours.client())))
        assert server.url.startswith("rediss://")
        await store.put(issued.key)
        assert await store.read() == [issued.key]
        assert await store.read() is None
        await store.note_used([issued.key.id], "2026-01-01T00:00Z")
        assert await store.used() == {issued.key.id: "2026-01-01T00:00Z"}
        await store.aclose()
    distrusted = [
        (ours.strict_server(HERE), trusting(ours)),
        (theirs.server(HERE), trusting(ours)),
        (ours.server("other"), trusting(ours)),
        (ours.server(HERE), None),
    ]
    for context, tls in distrusted:
        async with FaultProxy(valkey.port, context) as server:
            store = RedisKeys(settings.Redis(url=server.url, tls=tls))
            with pytest.raises(KeysUnreadable):
                await store.read()
            await store.aclose()
    async with FaultProxy(valkey.port, ours.server("other")) as server:
        store = RedisKeys(settings.Redis(url=server.url, tls=trusting(ours, verify="chain")))
        assert await store.read() == [issued.key]
        await store.aclose()


async def test_claims_are_made_over_tls(valkey: Valkey, tmp_path: Path) -> None:
    """With the configured authorities, and no others."""
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    for context, trusted in ((ours.strict_server(HERE), True), (theirs.server(HERE), False)):
        async with FaultProxy(valkey.port, context) as server:
            redis = settings.Redis(url=server.url, tls=trusting(ours, **ours.client()))
            claims = RedisClaims(redis, 15, asyncio.get_running_loop().time)
            if trusted:
                await claims.check()
            else:
                with pytest.raises(DependencyUnavailable):
                    await claims.check()
            await claims.close()


async def reason(server: FaultProxy, tls: settings.Tls | None) -> str:
    """Why the ledger is out of reach."""
    ledger = Ledger(settings.Redis(url=server.url, tls=tls), "r", RULES, Scripts())
    try:
        with pytest.raises(LedgerGone) as gone:
            await ledger.open()
    finally:
        await ledger.close()
    return str(gone.value)


async def test_a_server_whose_certificate_does_not_hold_is_out_of_reach(valkey: Valkey, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    told = {
        "TLS: unable to get local issuer certificate": (theirs.server(HERE), trusting(ours)),
        "TLS: self-signed certificate in certificate chain": (ours.server(HERE), None),
        "TLS: certificate has expired": (ours.server(HERE, expired=True), trusting(ours)),
        "TLS: IP address mismatch, certificate is not valid for '127.0.0.1'.": (ours.server("other"), trusting(ours)),
    }
    for expected, (context, tls) in told.items():
        async with FaultProxy(valkey.port, context) as server:
            got = await reason(server, tls)
            assert got == expected or (tls is None and got.startswith("TLS: "))


async def test_nothing_is_said_in_clear(tmp_path: Path) -> None:
    """A server without TLS at a rediss address hears a handshake, and never a command or a password."""
    heard = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.read(4096))
        writer.transport.abort()

    async with await asyncio.start_server(listen, HERE, 0) as server:
        url = f"rediss://user:canary@{HERE}:{server.sockets[0].getsockname()[1]}/0"
        ledger = Ledger(settings.Redis(url=url), "r", RULES, Scripts())
        with pytest.raises(LedgerGone):
            await ledger.open()
    assert heard[:2] == b"\x16\x03"
    assert b"canary" not in heard


def test_the_oldest_protocol_is_tls_1_2(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    context = RedisServer(settings.Redis(url="rediss://x", tls=trusting(ours)))._options["tls"]
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_REQUIRED


async def test_the_user_that_is_advised_can_do_what_is_needed_and_no_more(own_valkey: Valkey) -> None:
    """S20: the rights in SECURITY.md, on a real server."""
    (line,) = re.findall(r"(?m)^ACL SETUSER .*$", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    with redis.Redis.from_url(own_valkey.url) as operator:
        operator.execute_command(*line.replace("PASSWORD", "p").split())
        operator.set("mine", "1")
    url = own_valkey.url.replace("redis://", "redis://sluice:p@")
    async with replica(url) as one, replica(url) as two:
        with await one.admit(ticket()):
            waiting = asyncio.create_task(two.admit(ticket()))
        (await waiting).release(None)
        assert not one.is_degraded
        assert not two.is_degraded
    with redis.Redis.from_url(url) as user:
        for command in (
            "GET mine",
            "FLUSHALL",
            "CONFIG GET *",
            "KEYS *",
            "SCRIPT FLUSH",
            "SET other 1",
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.execute_command(*command.split())
