"""Row F28 of the fault matrix, for real: one replica's link to the server goes down, the other's stays up."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.admission.fleet import (
    Dump,
    gauge,
    granted_in_time,
    hasty,
    is_told,
    queued,
    replica,
    soon,
    ticket,
    until,
)
from tests.processes import Valkey


def ip(*words: str) -> None:
    """Run `ip`. Raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Link:
    """A cable between this host and a network namespace: `host` on this side, `address` on the other."""

    def __init__(self, namespace: str, number: int) -> None:
        self._name = f"{namespace}{number}"
        self._peer = f"{self._name}p"
        self._namespace = namespace
        # A link-local network of its own: 169.254.(1 + process).(4 number), two addresses.
        block = f"169.254.{1 + os.getpid() % 250}."
        self.host, self.address = block + str(4 * number + 1), block + str(4 * number + 2)

    def lay(self) -> None:
        ip("link", "add", self._name, "type", "veth", "peer", "name", self._peer)
        ip("link", "set", self._peer, "netns", self._namespace)
        ip("addr", "add", f"{self.host}/30", "dev", self._name)
        ip("-n", self._namespace, "addr", "add", f"{self.address}/30", "dev", self._peer)
        ip("link", "set", self._name, "up")
        ip("-n", self._namespace, "link", "set", self._peer, "up")

    def cut(self) -> None:
        """Packets vanish, both ways; nobody is told."""
        ip("-n", self._namespace, "link", "set", self._peer, "down")

    def mend(self) -> None:
        ip("-n", self._namespace, "link", "set", self._peer, "up")


@pytest.fixture
def links() -> Iterator[tuple[str, Link, Link]]:
    """The name of a namespace, and two links to it."""
    namespace = f"sl{secrets.token_hex(3)}"
    with ExitStack() as stack:
        try:
            ip("netns", "add", namespace)
            stack.callback(ip, "netns", "del", namespace)
            pair = Link(namespace, 0), Link(namespace, 1)
            for link in pair:
                link.lay()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield namespace, *pair


async def test_a_partitioned_replica_loses_its_slots_and_finds_out(
    links: tuple[str, Link, Link], tmp_path: Path
) -> None:
    namespace, cable, other_cable = links
    with Valkey(tmp_path, "--bind", "0.0.0.0", "--protected-mode", "no", namespace=namespace) as server:
        url, other_url = server.url_at(cable.address), server.url_at(other_cable.address)
        async with (
            replica(hasty(url), 2, lease_s=1.5, without_redis="refuse") as cut,
            replica(other_url, 2) as other,
        ):
            stale = [await cut.admit(ticket()), await cut.admit(ticket())]
            waiting = await queued(other, ticket(), ticket())
            await asyncio.to_thread(cable.cut)
            taken = [await soon(task) for task in waiting]
            await until(lambda: cut.is_degraded)
            assert not other.is_degraded
            assert Dump(other_url).held["w"] == {lease.id for lease in taken}
            await asyncio.to_thread(cable.mend)
            await until(lambda: not cut.is_degraded)
            await until(lambda: gauge(cut, "sluice_leases_fenced_total") == 2)
            (next_one,) = await queued(cut, ticket())
            for lease in stale:
                lease.release()  # frees nothing: the slots are another's now
            await cut.overview()
            assert Dump(other_url).held["w"] == {lease.id for lease in taken}
            assert not next_one.done()
            taken.pop().release()
            await soon(next_one)
            await until(lambda: is_told(other_url, cut, other))
            taken.pop().release()
            await granted_in_time(other, ticket())
