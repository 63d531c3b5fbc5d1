"""Servers that stand in for each other: a primary, its replica and Sentinels; a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from tests.ports import free_port
from tests.processes import Process, Valkey, server_binary

MASTER = "ledger"
HOST = "127.0.0.1"
DOWN_AFTER_MS = 500
NODE_TIMEOUT_MS = 1000
PATIENCE_S = 30.0
SLOTS = 16384


def wait_until(what: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Ask a server until it says so; one that does not answer has not said so. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if what():
                return
        except redis.RedisError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come about in {timeout_s:g} s")
        time.sleep(0.02)


@contextmanager
def talking(port: int, **options: Any) -> Iterator[redis.Redis]:
    """A client that answers in the server's own words."""
    with redis.Redis(HOST, port, socket_timeout=5, decode_responses=True, protocol=2, **options) as client:
        yield client


def told(client: redis.Redis, *words: Any) -> Any:
    return client.execute_command(*words)  # type: ignore[no-untyped-call]


class SentinelProcess:
    """A real Sentinel that watches `primary` under the name MASTER; with `password` it asks for that."""

    def __init__(self, directory: Path, primary: int, quorum: int, password: str | None = None) -> None:
        directory.mkdir(parents=True)
        self.port = free_port()
        self._directory = directory
        self._password = password
        lines = [
            f"port {self.port}",
            f"bind {HOST}",
            f"dir {directory}",
            f"sentinel monitor {MASTER} {HOST} {primary} {quorum}",
            f"sentinel down-after-milliseconds {MASTER} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {MASTER} 3000",
            *([f"requirepass {password}"] if password else []),
        ]
        self._config = directory / "sentinel.conf"
        self._config.write_text("\n".join(lines) + "\n")

    @property
    def node(self) -> str:
        return f"{HOST}:{self.port}"

    def ask(self, *words: str) -> Any:
        with talking(self.port, password=self._password) as client:
            return told(client, "SENTINEL", *words)

    def __enter__(self) -> Self:
        self.process = Process([server_binary(), str(self._config), "--sentinel"])
        self.process.wait_for_line(r"\+monitor master", timeout_s=PATIENCE_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.stop()


class Guarded:
    """A primary, a replica of it, and two Sentinels that know of both and of each other."""

    def __init__(self, directory: Path) -> None:
        for name in ("primary", "replica"):
            (directory / name).mkdir(parents=True)
        self.primary = Valkey(directory / "primary")
        own = ("--replicaof", f"{HOST} {self.primary.port}", "--repl-diskless-sync-delay", "0")
        self.replica = Valkey(directory / "replica", *own)
        self.sentinels = [SentinelProcess(directory / f"sentinel{at}", self.primary.port, 2) for at in (1, 2)]

    @property
    def nodes(self) -> list[str]:
        return [sentinel.node for sentinel in self.sentinels]

    def named(self) -> set[int]:
        """The ports at which the Sentinels see the primary."""
        return {int(sentinel.ask("GET-MASTER-ADDR-BY-NAME", MASTER)[1]) for sentinel in self.sentinels}

    def wait_for_copies(self) -> None:
        """Until the replica has all that the primary was told."""
        with talking(self.primary.port) as client:
            wait_until(lambda: told(client, "WAIT", "1", "1000") == 1)

    def promote(self) -> None:
        """Wait until the replica is the primary, for all who know."""
        wait_until(lambda: self.named() == {self.replica.port})
        with talking(self.replica.port) as client:
            wait_until(lambda: told(client, "ROLE")[0] == "master")

    def _is_watched(self, sentinel: SentinelProcess) -> bool:
        """Whether it has heard of all others, and knows the replica well enough to promote it."""
        others = sentinel.ask("SENTINELS", MASTER)
        (replica,) = sentinel.ask("REPLICAS", MASTER)
        facts = dict(zip(replica[::2], replica[1::2], strict=True))
        return len(others) == 1 and facts["master-link-status"] == "ok"

    def __enter__(self) -> Self:
        self._started = ExitStack()
        try:
            self._started.enter_context(self.primary)
            self._started.enter_context(self.replica)
            for sentinel in self.sentinels:
                self._started.enter_context(sentinel)
            for sentinel in self.sentinels:
                wait_until(lambda sentinel=sentinel: self._is_watched(sentinel))  # type: ignore[misc]
        except BaseException:
            self._started.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._started.close()


class Cluster:
    """Three primaries of a cluster; the first has all slots."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.members: list[Valkey] = []
        self._buses = [free_port() for _ in range(3)]
        for at, bus in enumerate(self._buses):
            home = directory / f"node{at}"
            home.mkdir(parents=True)
            kind = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS))
            self.members.append(Valkey(home, *kind, "--cluster-port", str(bus), *options))

    @property
    def nodes(self) -> list[str]:
        return [f"{HOST}:{member.port}" for member in self.members]

    def ask(self, at: int, *words: Any) -> Any:
        with talking(self.members[at].port) as client:
            return told(client, *words)

    def follow(self, replica: int, primary: int) -> None:
        """Make one the replica of another, with all that it has."""
        self.ask(replica, "CLUSTER", "REPLICATE", self.ask(primary, "CLUSTER", "MYID"))
        with talking(self.members[replica].port) as client:
            wait_until(lambda: client.info("replication").get("master_link_status") == "up")

    def owner(self, slot: int, at: int) -> int | None:
        """Whose the slot is, as the node `at` sees it."""
        for first, last, primary, *_ in self.ask(at, "CLUSTER", "SLOTS"):
            if int(first) <= slot <= int(last):
                return [member.port for member in self.members].index(int(primary[1]))
        return None

    def move(self, slot: int, source: int, target: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Give a slot and its keys to another node, as every tool does it; `meanwhile` runs while it is under way."""
        names = [self.ask(at, "CLUSTER", "MYID") for at in range(3)]
        self.ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
        self.ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
        meanwhile()
        while keys := self.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            self.ask(source, "MIGRATE", HOST, self.members[target].port, "", 0, 5000, "KEYS", *keys)
        for at in (target, source, 3 - source - target):
            self.ask(at, "CLUSTER", "SETSLOT", slot, "NODE", names[target])

    def __enter__(self) -> Self:
        self._started = ExitStack()
        try:
            for member in self.members:
                self._started.enter_context(member)
            self.ask(0, "CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
            for member, bus in zip(self.members[1:], self._buses[1:], strict=True):
                self.ask(0, "CLUSTER", "MEET", HOST, member.port, bus)
            for at in range(3):
                wait_until(lambda at=at: self._is_whole(at))  # type: ignore[misc]
        except BaseException:
            self._started.close()
            raise
        return self

    def _is_whole(self, at: int) -> bool:
        facts = self.ask(at, "CLUSTER", "INFO").split()
        return {"cluster_state:ok", "cluster_known_nodes:3"} <= set(facts) and self.owner(0, at) == 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._started.close()
