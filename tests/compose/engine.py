"""A container engine of the tests' own: dockerd started by hand, with its data, its socket and its network apart.

Images are built by one that shares the machine's network, since a build downloads; containers are run by one in a
network namespace of its own, where it may make its bridges and rules, and which nothing outside can reach.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import ParamSpec, TypeVar

from tests.processes import ROOT, Process

CLONE_NEWNET = 0x40000000
START_S = 120.0
NEEDED = ("dockerd", "containerd", "runc", "docker", "debootstrap", "dpkg-deb", "ip", "nsenter", "iptables")

NOTHING: Mapping[str, str] = MappingProxyType({})

P = ParamSpec("P")
T = TypeVar("T")


def missing() -> str:
    """Why no engine can start here; empty when one can, as far as can be told before."""
    if os.geteuid() != 0:
        return "an engine of the tests' own needs root"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"no {', '.join(absent)} here (Debian: docker.io, debootstrap, iproute2, iptables)" if absent else ""


def docker_cli() -> str:
    """The engine's own command, where another is before it on the path: newer ones build with a plugin only."""
    beside = Path(shutil.which("dockerd") or "/usr/sbin/dockerd").parents[1] / "bin" / "docker"
    return str(beside) if beside.exists() else "docker"


class Engine:
    """One dockerd. `namespace` names the network namespace it runs in; None: the machine's own network."""

    def __init__(self, directory: Path, namespace: str | None) -> None:
        self._socket = f"unix://{directory / 'docker.sock'}"
        self._environ = {**os.environ, "DOCKER_HOST": self._socket, "DOCKER_BUILDKIT": "1"}
        self._inside = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
        # In the machine's network it makes no bridge and no rule.
        network = [] if namespace else ["--bridge=none", "--iptables=false", "--ip6tables=false"]
        self._command = [
            *self._inside, "dockerd", "--host", self._socket, "--pidfile", str(directory / "docker.pid"),
            "--data-root", str(directory / "data"), "--exec-root", str(directory / "exec"), *network,
        ]  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[None]:
        process = Process(self._command)
        try:
            process.wait_for_line("API listen on", START_S)
            yield
        finally:
            process.stop(grace_s=60)

    def docker(self, *arguments: str, timeout_s: float = 120, stdin: bytes | None = None) -> str:
        """What `docker ARGUMENTS` prints. Raises RuntimeError with its own words."""
        return self._run([docker_cli(), *arguments], timeout_s, stdin)

    def load(self, archive: list[str], *name_and_changes: str) -> None:
        """An image from what the command `archive` writes: a tar of a root directory."""
        packed = subprocess.run(archive, capture_output=True, check=True, timeout=300).stdout
        self.docker("import", *name_and_changes, timeout_s=300, stdin=packed)

    def compose(self, *arguments: str, timeout_s: float = 120, **variables: str) -> str:
        """What `VARIABLES docker compose ARGUMENTS` prints; the command shares the engine's network."""
        command = [*self._inside, str(Path(sys.executable).with_name("docker-compose")), *arguments]
        return self._run(command, timeout_s, None, variables)

    def _run(
        self, command: list[str], timeout_s: float, stdin: bytes | None = None, variables: Mapping[str, str] = NOTHING
    ) -> str:
        environ = {**self._environ, **variables}
        done = subprocess.run(
            command, cwd=ROOT, env=environ, input=stdin, capture_output=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')[-4000:]}")
        return done.stdout.decode()


class Namespace:
    """A network namespace. What `run` is given is run by a thread that has it as its network."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Namespace:
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        subprocess.run(["ip", "-n", self.name, "link", "set", "lo", "up"], check=True)
        self._threads = ThreadPoolExecutor(8, initializer=self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        subprocess.run(["ip", "netns", "del", self.name], check=True)

    def run(self, ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._threads.submit(ask, *args, **kwargs).result()

    def _enter(self) -> None:
        """Of this thread alone: a thread's network is its own (setns(2))."""
        with Path("/run/netns", self.name).open() as place:
            if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


def until(holds: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Ask again until it holds, for what nothing tells of itself. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        time.sleep(0.5)


def status_of(pid: int) -> Mapping[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
