"""The shared ledger: calls of the scripts over one held connection. Only here, and in the scripts, keys are known.

Written through one connection rather than a client: several calls go in one write, and none is ever repeated behind
our back (redis-py's default re-sends a command for a minute). The connection has one user, the controller's task; see
`wire` for what it costs, and for a call that was cut short.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha1
from importlib import resources
from typing import Any, TypeVar

import hiredis
import msgspec
from redis.asyncio import Connection
from redis.exceptions import RedisError, ResponseError

from app.admission.fairness import Debt, Grant, Kind, Overview, Place, Rules, Standing
from app.admission.quota import Claim, Metered, Reading, Settlement
from app.admission.server_versions import doubt_about
from app.admission.wire import Wire
from app.errors import ConfigurationError
from app.redis_server import RedisServer, shown
from app.settings import Redis

LAYOUT = 2
MIN_REDIS = (7, 0)
NEVER_EVICTS = "noeviction"

# A script that may run while the server is out of memory; arrivals must not, so that they are refused whole.
_FLAGS = {
    "arrive": "",
    "depart": " flags=allow-oom",
    "sync": " flags=allow-oom",
    "reap": " flags=allow-oom",
    "look": " flags=no-writes,allow-oom",
    "standing": " flags=no-writes,allow-oom",
}
_READS = frozenset({"look", "standing"})

_encode = msgspec.msgpack.Encoder().encode
T = TypeVar("T")


class LedgerGone(Exception):
    """No answer, or one that says that the server can't work now. Whether a call was executed is not known."""


class LedgerFull(Exception):
    """The server is out of memory: the call changed nothing."""


class LedgerChanged(Exception):
    """The ledger is not as this replica left it (flushed, rolled back, the replica given up for dead): tell it anew."""


class SharedRules(msgspec.Struct, array_like=True, frozen=True):
    """What scripts go by: the order's rules, and the ledger's own.

    `replicas` are how many have to tell what they hold before a ledger that lost it grants again; `settle_us` how long
    that is waited for.
    """

    order: Rules
    lease_us: int
    settle_us: int
    replicas: int


class Arrived(msgspec.Struct, array_like=True, frozen=True):
    """`outcome` is the worker for GRANTED, else the wait in microseconds; `readings` are of the place's claims."""

    kind: Kind
    outcome: str | int
    readings: list[Reading] = []


class Synced(msgspec.Struct, array_like=True, frozen=True):
    """Ids of leases that found no slot, and of tickets that do not wait in the ledger (and have to arrive again).

    `steered` are the limits of adaptive workers that another replica sets: (worker, limit). `replicas` are alive, this
    one included.
    """

    epoch: str
    lost: list[str]
    missing: list[str]
    steered: list[tuple[str, int]] = []
    replicas: int = 1


class Heard(IntEnum):
    """What a replica knows of a live reservation: nothing yet; its claims are taken; it gave them itself."""

    NOTHING = 0
    TAKEN = 1
    GIVEN = 2


class LiveReservation(msgspec.Struct, array_like=True, frozen=True):
    """A reservation that is not settled."""

    reservation: str
    tenant: str
    age_us: int
    claims: tuple[Claim, ...]
    heard: Heard


class LocalTakings(msgspec.Struct, array_like=True, frozen=True):
    """What a replica gave while it could not ask, to requests that have ended: (tenant, limit, window in us, age in us,
    amount). Numbered, so that it is taken once however often it is told.
    """

    number: int
    takings: Sequence[tuple[str, str, int, int, int]]


class Reaped(msgspec.Struct, array_like=True, frozen=True):
    leases: int
    tickets: int
    replicas: int


class _Reply(msgspec.Struct, array_like=True, frozen=True):
    status: int
    opens_in_us: int
    grants: list[tuple[str, str]]
    body: msgspec.Raw


_decode_reply = msgspec.msgpack.Decoder(_Reply).decode
_decode_grants = msgspec.msgpack.Decoder(list[tuple[str, str]]).decode


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a script, not yet sent."""

    script: str
    payload: bytes
    body: type[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call brought: its own body, grants to tickets of this replica, and when grants begin again (0: now)."""

    body: Any
    grants: list[Grant]
    opens_in_s: float


Outcome = Answer | LedgerFull | LedgerChanged


@dataclass(slots=True)
class Departures:
    """Leases to release, tickets to take out and reservations to settle, since the last call."""

    releases: list[tuple[str, str, int, str, float]]
    cancels: list[tuple[str, tuple[str, ...], int, str, float]]
    settlements: list[Settlement]

    @classmethod
    def none(cls) -> Departures:
        return cls([], [], [])

    def __bool__(self) -> bool:
        return bool(self.releases or self.cancels or self.settlements)

    def take(self, limit: int) -> Departures:
        """Take out the first `limit`, leases before tickets: somebody may wait for their slots.

        Settlements go all at once: a sync in between would not name what they settle, and their refund would be lost.
        """
        releases, self.releases = self.releases[:limit], self.releases[limit:]
        left = limit - len(releases)
        cancels, self.cancels = self.cancels[:left], self.cancels[left:]
        settlements, self.settlements = self.settlements, []
        return Departures(releases, cancels, settlements)

    def release(self, lease_id: str, worker_id: str, debt: Debt) -> None:
        self.releases.append((lease_id, worker_id, *debt))

    def cancel(self, ticket_id: str, candidates: tuple[str, ...], refund: Debt) -> None:
        self.cancels.append((ticket_id, candidates, *refund))

    def settle(self, settlement: Settlement) -> None:
        self.settlements.append(settlement)


def arrive(places: Sequence[Place]) -> Call:
    return Call("arrive", _encode(places), list[Arrived])


def depart(departures: Departures) -> Call:
    payload = departures.releases, departures.cancels, departures.settlements
    return Call("depart", _encode(payload), list[int])


def sync(
    leases: Sequence[tuple[str, str]],
    tickets: Sequence[str],
    slots: Sequence[tuple[str, int]],
    new_epoch: str,
    limits: Sequence[tuple[str, int]] = (),
    reservations: Sequence[LiveReservation] = (),
    given: Sequence[LocalTakings] = (),
    run_id: str = "",
) -> Call:
    """All that the replica holds, waits for, sees and has reserved; `new_epoch` is used if the ledger begins anew.

    `limits` are those that it would give to adaptive workers, (worker, limit); `given` is what it gave of tenants'
    limits by itself; `run_id` is the running server (see `Ledger.run_id`), empty where nobody knows.
    """
    return Call("sync", _encode((leases, tickets, slots, new_epoch, limits, reservations, given, run_id)), Synced)


def look(metered: Sequence[Metered] = ()) -> Call:
    return Call("look", _encode(metered), Overview)


def standing(tickets: Sequence[str]) -> Call:
    return Call("standing", _encode(tickets), list[Standing])


def reap() -> Call:
    return Call("reap", _encode(()), Reaped)


class Scripts:
    """The sources of all scripts, and their digests.

    Two versions of a script run side by side on one ledger, each under its own digest, as long as `layout` is the same:
    what the keys hold. It is part of every key, so another layout is another ledger, which counts no lease of this one.
    """

    def __init__(self, clock: str | None = None, layout: int = LAYOUT) -> None:
        self.layout = layout
        folder = resources.files("app.admission").joinpath("scripts")
        parts = (folder.joinpath(name).read_text() for name in ("queue.lua", "quota.lua"))
        common = (clock or folder.joinpath("clock.lua").read_text()) + "".join(parts)
        self._source = {
            name: f"#!lua{flags}\n{common}{folder.joinpath(name + '.lua').read_text()}".encode()
            for name, flags in _FLAGS.items()
        }
        self.digest = {name: sha1(source).hexdigest().encode() for name, source in self._source.items()}  # noqa: S324

    @property
    def sources(self) -> tuple[bytes, ...]:
        return tuple(self._source.values())


class Ledger:
    """One replica's way to the ledger. Open it, then call it, from one task."""

    def __init__(self, redis: Redis, replica: str, rules: SharedRules, scripts: Scripts) -> None:
        self._redis = redis
        self._replica = replica.encode()
        self._given = rules
        self._rules = _encode(rules)
        self._scripts = scripts
        self.prefix = f"{{{redis.prefix}}}:{scripts.layout}:"
        self._channel = f"{self.prefix}grants:{replica}".encode()
        self._server = RedisServer(redis)
        self._wire: Wire | None = None
        self._listener: Connection | None = None
        self._number = 0
        self._answered = -1
        self.epoch = ""
        self.run_id = ""
        """The running server that is held, by its own random id: after a start or a failover it is another."""
        self.doubt: str | None = None

    def expect(self, replicas: int) -> None:
        """So many have to tell what they hold before a ledger that lost it grants again."""
        if replicas != self._given.replicas:
            self._given = msgspec.structs.replace(self._given, replicas=replicas)
            self._rules = _encode(self._given)

    async def open(self) -> None:
        """Connect, check the server, load the scripts, subscribe. Raises LedgerGone, ConfigurationError."""
        await self.close()
        try:
            self._wire = Wire(await _connected(self._server))
            facts = _facts_of(await _info(self._wire, self._until()))
            self.doubt = _check_server(facts, self._redis)
            self.run_id = facts.get("run_id", "")
            await self._load(self._until())
            self._listener = await _connected(self._server)
            async with _bounded(self._redis.call_timeout_s):
                await self._listener.send_packed_command(_packed(b"SUBSCRIBE", self._channel), check_health=False)
                await self._listener.read_response(disable_decoding=True)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Drop both connections, without a word."""
        if self._wire is not None:
            self._wire.close()
        if self._listener is not None:
            with suppress(RedisError, OSError):
                await self._listener.disconnect(nowait=True)
        self._wire = self._listener = None

    async def exchange(self, calls: Sequence[Call]) -> list[Outcome]:
        """Send all calls in one write and read their outcomes. Raises LedgerGone; then nothing is known of any call."""
        outcomes: list[Outcome | None] = [None] * len(calls)
        until = self._until()
        due = await self._send(calls, list(range(len(calls))), outcomes, until)
        if due:
            await self._load(until)
            if await self._send(calls, due, outcomes, until):
                raise LedgerGone("the server forgets scripts as they are loaded")
        return [outcome for outcome in outcomes if outcome is not None]

    async def grants(self) -> AsyncIterator[list[Grant]]:
        """Grants to this replica's tickets that other replicas brought about. Ends with LedgerGone."""
        listener = self._listener
        assert listener is not None  # noqa: S101 - opened
        try:
            while True:
                message = await listener.read_response(disable_decoding=True)
                if message[0] == b"message":
                    yield [Grant(*grant) for grant in _decode_grants(message[2])]
        except (RedisError, OSError) as error:
            raise LedgerGone(str(error)) from None

    async def _send(
        self, calls: Sequence[Call], due: list[int], outcomes: list[Outcome | None], until: float
    ) -> list[int]:
        """Send those that are due; those whose script the server does not know stay due."""
        numbers, commands = [], []
        for index in due:
            self._number += 1
            numbers.append(self._number)
            commands.append(self._packed_call(calls[index]))
        replies = await _asked(self._held(), commands, until)
        unknown = []
        for index, number, reply in zip(due, numbers, replies, strict=True):
            match _code_of(reply):
                case None:
                    outcomes[index] = self._outcome(calls[index], number, reply)
                case "NOSCRIPT":
                    unknown.append(index)
                case "OOM":
                    outcomes[index] = LedgerFull()
                case code:
                    raise LedgerGone(code)
        return unknown

    def _outcome(self, call: Call, number: int, packed: bytes) -> Answer | LedgerChanged:
        reply = _decode_reply(packed)
        if reply.status:
            return LedgerChanged()
        if call.script not in _READS:
            self._answered = number
        body = msgspec.msgpack.decode(reply.body, type=call.body)
        if isinstance(body, Synced):
            self.epoch = body.epoch
        return Answer(body, [Grant(*grant) for grant in reply.grants], reply.opens_in_us / 1e6)

    def _packed_call(self, call: Call) -> bytes:
        return _packed(
            b"EVALSHA",
            self._scripts.digest[call.script],
            b"1",
            self.prefix.encode(),
            self._replica,
            self.epoch.encode(),
            b"%d" % self._number,
            b"%d" % self._answered,
            self._rules,
            call.payload,
        )

    def _held(self) -> Wire:
        if self._wire is None:
            raise LedgerGone("not connected")
        return self._wire

    def _until(self) -> float:
        """When a server that has not answered by then is given up, on the event loop's clock."""
        return asyncio.get_running_loop().time() + self._redis.call_timeout_s

    async def _load(self, until: float) -> None:
        commands = [_packed(b"SCRIPT", b"LOAD", source) for source in self._scripts.sources]
        for reply in await _asked(self._held(), commands, until):
            if (code := _code_of(reply)) is not None:
                raise LedgerGone(code)


async def check(redis: Redis) -> None:
    """Raises ConfigurationError for a server that must not hold a ledger; one that is out of reach may come back."""
    with suppress(LedgerGone):
        wire = Wire(await _connected(RedisServer(redis)))
        try:
            until = asyncio.get_running_loop().time() + redis.call_timeout_s
            _check_server(_facts_of(await _info(wire, until)), redis)
        finally:
            wire.close()


async def _connected(server: RedisServer) -> Connection:
    async with _bounded(server.connect_timeout_s):
        return await server.connected()


async def _asked(wire: Wire, commands: Sequence[bytes], until: float) -> list[Any]:
    """The replies to `commands`. Raises LedgerGone."""
    try:
        return await wire.exchange(commands, until)
    except OSError as error:
        raise LedgerGone(shown(error)) from None


async def _info(wire: Wire, until: float) -> bytes:
    (reply,) = await _asked(wire, [_packed(b"INFO")], until)
    if (code := _code_of(reply)) is not None:
        raise LedgerGone(code)
    info: bytes = reply
    return info


def _code_of(reply: Any) -> str | None:
    """The first word of a server's error, of what is an error: the rest may quote what was sent."""
    return str(reply).split(maxsplit=1)[0] if isinstance(reply, ResponseError) else None


class _bounded:  # noqa: N801 - used as a statement
    """Time-limits the block, and tells every way that a server can fail as LedgerGone."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._timeout = asyncio.timeout(timeout_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise LedgerGone(f"no answer within {self._timeout_s:g} s") from None
        if isinstance(error, (RedisError, OSError)):
            raise LedgerGone(shown(error)) from None


def _packed(*words: bytes) -> bytes:
    """A command on the wire."""
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # it is annotated for a single word
    return packed


def _facts_of(info: bytes) -> dict[str, str]:
    """What a server says of itself in INFO."""
    return dict(line.split(":", 1) for line in info.decode("utf-8", "replace").splitlines() if ":" in line)


def _check_server(facts: Mapping[str, str], settings: Redis) -> str | None:
    """What speaks against the server's version, if anything.

    Raises ConfigurationError for a server that cannot hold the ledger, LedgerGone for one that cannot now.
    """
    version = facts.get("redis_version", "0.0")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_REDIS:
        raise ConfigurationError(f"redis: the server is Redis {version}; 7.0 or newer is needed (or Valkey 8)")
    if facts.get("cluster_enabled") == "1" and not settings.cluster:
        raise ConfigurationError("redis: the server runs in cluster mode; name its nodes in redis.cluster")
    policy = facts.get("maxmemory_policy", NEVER_EVICTS)
    if policy != NEVER_EVICTS and not settings.allow_eviction:
        raise ConfigurationError(
            f"redis: the server's maxmemory-policy is {policy}, which loses leases; set noeviction,"
            " or redis.allow_eviction: true"
        )
    if facts.get("role") != "master":
        raise LedgerGone("the server is a read-only replica")
    return doubt_about(facts)
