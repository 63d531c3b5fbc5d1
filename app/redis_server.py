"""How the server that all processes share is reached: at its address, or wherever Sentinels or a cluster say it is.

All keys of a fleet carry one hash tag, so in a cluster they live in one slot, and that slot's primary is used like a
server that stands alone. Whoever may be asked for the primary may be behind the times, so all are asked, at once, at
each connection, and the newest word counts; what it names must call itself a primary.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from ssl import SSLContext
from typing import Any

from redis.asyncio import Connection, ConnectionPool
from redis.asyncio import Redis as Client
from redis.asyncio.connection import AbstractConnection, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import MovedError, NoPermissionError, ReadOnlyError, RedisError, ResponseError

from app.credentials import TlsContexts, read_secret, redis_password, tls_failure
from app.errors import ConfigurationError
from app.settings import Redis, Tls

CONNECT_SHARE = 0.5
"""Of a call's time, for connecting, and for each of those that are asked for the primary."""
UNKNOWN_ENDPOINT = b"?"

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Word:
    """What one node says of the primary. `epoch` is how new that is, where nodes know."""

    primary: Address
    epoch: int = 0


class _Unfit(Exception):
    """A node that answers, and will never say what it is asked for."""


def newest(words: Sequence[Word]) -> Address:
    """Where the primary is: the newest word, and of equally new ones what most say."""
    said = Counter(words)
    return max(said, key=lambda word: (word.epoch, said[word])).primary


def primary_of_slot(ranges: Sequence[Sequence[Any]], slot: int, asked: Address) -> Address | None:
    """Who serves `slot`, as the node at `asked` answers CLUSTER SLOTS: [first, last, [host, port, …], replicas …], …

    A node that does not know its own host leaves it out. None: nobody serves it, or at an address that is not known.
    """
    for first, last, primary, *_ in ranges:
        if first <= slot <= last:
            host, port = primary[0], primary[1]
            return None if host == UNKNOWN_ENDPOINT else (host.decode() if host else asked[0], int(port))
    return None


Ask = Callable[[Connection, Address], Awaitable[Word]]


class _Guides:
    """The nodes that are asked where the primary is."""

    def __init__(self, nodes: Sequence[str], ask: Ask, what: str, options: Mapping[str, Any]) -> None:
        self._nodes = [_address(node) for node in nodes]
        self._ask = ask
        self._what = what
        self._options = options
        self._timeout_s: float = options["socket_connect_timeout"]

    async def primary(self) -> Address:
        """Raises NotConnected; ConfigurationError when all answer, and none is what it should be."""
        told = await asyncio.gather(*(self._told_by(node) for node in self._nodes))
        words = [word for word in told if isinstance(word, Word)]
        if words:
            return newest(words)
        reasons = "; ".join(f"{host}:{port} {error}" for (host, port), error in zip(self._nodes, told, strict=True))
        if all(isinstance(error, _Unfit) for error in told):
            raise ConfigurationError(f"redis.{self._what}: {reasons}")
        raise NotConnected(f"no word of the primary: {reasons}")

    async def _told_by(self, node: Address) -> Word | Exception:
        connection = _Plain(host=node[0], port=node[1], **self._options)
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call]
                return await self._ask(connection, node)
        except NoPermissionError:
            return _Unfit("does not let its user ask for the primary")
        except TimeoutError:
            return NotConnected("is silent")
        except _Unfit as error:
            return error
        except (RedisError, OSError) as error:
            return NotConnected(f"is out of reach ({shown(error)})")
        finally:
            await connection.disconnect(nowait=True)


def _asking_sentinels(master: str) -> Ask:
    async def ask(sentinel: Connection, _: Address) -> Word:
        try:
            address = await _asked(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", master)
        except ResponseError as error:
            if isinstance(error, NoPermissionError):
                raise
            raise _Unfit("is no Sentinel") from None
        if address is None:
            raise _Unfit(f"knows no primary named {master!r}")
        facts = await _asked(sentinel, "SENTINEL", "MASTER", master)
        epoch = dict(zip(facts[::2], facts[1::2], strict=True))[b"config-epoch"]
        return Word((address[0].decode(), int(address[1])), int(epoch))

    return ask


def _asking_cluster(slot: int) -> Ask:
    async def ask(node: Connection, at: Address) -> Word:
        try:
            ranges = await _asked(node, "CLUSTER", "SLOTS")
        except ResponseError as error:
            if isinstance(error, NoPermissionError):
                raise
            raise _Unfit("is in no cluster") from None
        primary = primary_of_slot(ranges, slot, at)
        if primary is None:
            raise NotConnected(f"nobody serves slot {slot}")
        return Word(primary)

    return ask


class _Plain(Connection):
    """A connection to one address, in TLS if `tls` says with whom. No option of redis-py can weaken that."""

    def __init__(self, *, tls: SSLContext | None = None, **options: Any) -> None:
        self._tls = tls
        super().__init__(**options)

    def _connection_arguments(self) -> Mapping[str, Any]:
        arguments = {"host": self.host, "port": self.port}
        return arguments if self._tls is None else {**arguments, "ssl": self._tls}


class _ToPrimary(_Plain):
    """A connection to whatever is the primary at the moment of connecting; to what stops being it, it is lost."""

    def __init__(self, *, guides: _Guides | None, **options: Any) -> None:
        self._guides = guides
        super().__init__(**options)

    async def _connect(self) -> None:
        if self._guides is not None:
            self.host, self.port = await self._guides.primary()
        await super()._connect()  # type: ignore[no-untyped-call]

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        await super().on_connect_check_health(check_health)
        if self._guides is not None and b"role:master" not in (await _asked(self, "INFO", "replication")).split():
            raise NotConnected(f"{self.host}:{self.port} is not a primary yet, or no more")

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except ResponseError as error:
            if not isinstance(error, ReadOnlyError | MovedError):
                raise
            await self.disconnect(nowait=True)
            raise NotConnected(f"{self.host}:{self.port} is not the primary any more") from None


class RedisServer:
    """The way to the shared server. Connections that it gives are authenticated, and lead to a primary."""

    def __init__(self, redis: Redis) -> None:
        """Raises ConfigurationError for files that can't be used."""
        self._call_timeout_s = redis.call_timeout_s
        self._kind: type[AbstractConnection] = _ToPrimary
        self._options = {**_shared(redis), **({"username": redis.username} if redis.is_found else _parsed(redis.url))}
        if (password := redis_password(redis)) is not None:
            self._options["password"] = password
        if "path" in self._options:
            self._kind = UnixDomainSocketConnection
        else:
            self._options["tls"] = TlsContexts().of(redis.tls or Tls()) if redis.is_tls else None
            self._options["guides"] = _guides_of(redis, self._options)
        self.connect_timeout_s = redis.call_timeout_s * (1 + CONNECT_SHARE if redis.is_found else 1)
        """Longer than `connected` needs with a server that lives."""

    async def connected(self) -> Connection:
        """A connection of one's own, on which nothing but the caller bounds the time.

        Raises redis-py's errors and OSError; ConfigurationError if nobody who is asked can know the primary.
        """
        connection: Any = self._kind(**self._options, socket_timeout=None)
        try:
            await connection.connect()
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if isinstance(error.__cause__, ConfigurationError):
                raise error.__cause__ from None
            raise
        found: Connection = connection
        return found

    def client(self, max_connections: int) -> Client:
        """A client, to be closed. It repeats nothing, and waits no longer than a call's time for an answer."""
        options = {**self._options, "socket_timeout": self._call_timeout_s}
        pool = ConnectionPool(connection_class=self._kind, max_connections=max_connections, **options)
        return Client.from_pool(pool)


def _shared(redis: Redis) -> dict[str, Any]:
    """Nothing is ever repeated behind our back."""
    connect_timeout_s = redis.call_timeout_s * CONNECT_SHARE
    return {"protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_connect_timeout": connect_timeout_s}


def _parsed(url: str) -> dict[str, Any]:
    """What redis-py makes of a url that the settings have let pass."""
    options = dict[str, Any](parse_url(url))
    options.pop("connection_class", None)
    return options


def _guides_of(redis: Redis, options: Mapping[str, Any]) -> _Guides | None:
    """Sentinels have a user of their own; the nodes of a cluster are what is looked for themselves."""
    if redis.sentinel is not None:
        sentinel = redis.sentinel
        user = {"username": sentinel.username, "password": read_secret(sentinel.password_file, None) or None}
        return _Guides(
            sentinel.nodes,
            _asking_sentinels(sentinel.master),
            "sentinel",
            {**_shared(redis), **user, "tls": options["tls"]},
        )
    if redis.cluster:
        return _Guides(
            redis.cluster, _asking_cluster(key_slot(f"{{{redis.prefix}}}".encode())), "cluster", dict(options)
        )
    return None


def shown(error: Exception) -> str:
    """Of a server's own error the first word: the rest may quote what was sent."""
    if (distrust := tls_failure(error)) is not None:
        return distrust
    return str(error).split(maxsplit=1)[0] if isinstance(error, ResponseError) and str(error) else str(error)


async def _asked(connection: Connection, *words: str) -> Any:
    await connection.send_command(*words, check_health=False)
    return await connection.read_response(disable_decoding=True)


def _address(node: str) -> Address:
    host, _, port = node.rpartition(":")
    return host.strip("[]"), int(port)
