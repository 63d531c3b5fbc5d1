"""TCP ports of 127.0.0.1 for what tests start, free from the moment they are named until it listens there.

The kernel's own choice, port 0, lies in the range from which it also takes the ports of outgoing connections and of
everybody else's port 0: between the choice and the listening, and while a server is down to come back, another may
get it. These lie below that range, and each process of tests has a stretch of them to itself.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LOWEST = 10_240
STRETCH = 400
"""Ports that a process goes through before it names one again."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now. Raises RuntimeError when there is none."""
    for port in itertools.islice(_ports(), STRETCH):
        if _is_free(port):
            return port
    raise RuntimeError(f"{STRETCH} ports of this process are in use")


@cache  # what is claimed is the process', and the kernel's to take back when it ends
def _ports() -> Iterator[int]:
    return itertools.cycle(_claimed(LOWEST, _ephemeral_from()))


def _ephemeral_from() -> int:
    """Where the ports begin that the kernel gives away itself; man 7 ip."""
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])


def _claimed(lowest: int, end: int) -> range:
    """The first stretch that no other process has: who holds its name, an abstract socket, has it."""
    for start in range(lowest, end - STRETCH + 1, STRETCH):
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0ports-of-tests-{start}")
        except OSError:
            name.close()
            continue
        name.detach()  # stays bound as long as the process lives
        return range(start, start + STRETCH)
    raise RuntimeError(f"no stretch of {STRETCH} ports between {lowest} and {end} is left")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
