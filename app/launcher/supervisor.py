"""Keeps processes running: starts them in order, restarts the ones that die, stops them in the reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.errors import LaunchError
from app.launcher.command import tethered
from app.launcher.engine_log import last_lines, read_tail, telling_line
from app.launcher.processes import ProcessSpec

LOG_LIMIT_BYTES = 32 * 1024 * 1024
LOG_KEPT_BYTES = 1024 * 1024
LOG_CHECK_INTERVAL_S = 30.0
KILL_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Waits double from `first_wait_s` to `longest_wait_s`; `deaths_allowed` deaths within `window_s` are too many."""

    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    deaths_allowed: int = 5
    window_s: float = 300.0

    def wait_after(self, deaths: Sequence[float], now: float) -> float | None:
        """Seconds to wait before the next start, None to give up. `deaths` are times up to and with the last one."""
        recent = [death for death in deaths if now - death < self.window_s]
        if len(recent) >= self.deaths_allowed:
            return None
        return float(min(self.first_wait_s * 2 ** max(0, len(recent) - 1), self.longest_wait_s))


class ProcessFailed(LaunchError):
    """A process ended and will not be started again. `log_lines` are its last ones."""

    def __init__(self, spec: ProcessSpec, reason: str, log_start: int) -> None:
        lines = read_tail(spec.log, log_start)
        super().__init__(f"{spec.name} {reason}: {telling_line(lines) or 'it wrote nothing'}")
        self.log = spec.log
        self.log_lines = last_lines(lines)


class RunningProcess:
    """One started process, on its tether: closing our end of the tether's pipe is what stops it."""

    def __init__(self, spec: ProcessSpec, process: asyncio.subprocess.Process, log_start: int) -> None:
        self._spec = spec
        self._process = process
        self.log_start = log_start  # where in the log this process began to write

    @classmethod
    async def start(cls, spec: ProcessSpec) -> RunningProcess:
        with spec.log.open("ab") as log:
            start = log.tell()
            process = await asyncio.create_subprocess_exec(
                *tethered(spec.arguments, spec.stop_s),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(spec.environment),
                start_new_session=True,
            )
        return cls(spec, process, start)

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self) -> None:
        """Returns when the process and all it started are gone, after `stop_s` and a grace at the latest."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(self._spec.stop_s + KILL_GRACE_S):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """The tether answers SIGTERM by killing the whole process group at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()


class Supervisor:
    """Owns the processes of one start.

    Until `settled()` a death is a failure to start; from then on it is answered by restarts under the policy. What
    cannot be mended is given up, and appears on `failed`, once, unless others can do without it.
    """

    def __init__(self, policy: RestartPolicy, say: Callable[[str], None]) -> None:
        self._policy = policy
        self._say = say
        self._settled = False
        self._stages: list[list[asyncio.Task[None]]] = []
        self._running: dict[str, RunningProcess] = {}
        self._given_up: set[str] = set()
        self._failed: asyncio.Future[LaunchError] = asyncio.get_running_loop().create_future()

    async def start(self, *specs: ProcessSpec, one_suffices: bool = False) -> None:
        """Starts processes side by side; they are stopped before whatever was started earlier.

        Where `one_suffices`, one that is given up is no failure as long as another of them is kept.
        """
        stage: list[asyncio.Task[None]] = []
        self._stages.append(stage)
        together = frozenset(spec.name for spec in specs)
        for spec in specs:
            self._running[spec.name] = await RunningProcess.start(spec)
            substitutes = together if one_suffices else frozenset({spec.name})
            stage.append(asyncio.create_task(self._keep(spec, substitutes), name=spec.name))

    @property
    def given_up(self) -> frozenset[str]:
        """The names of the processes that were not to be kept running."""
        return frozenset(self._given_up)

    def settled(self) -> None:
        self._settled = True

    async def failed(self) -> LaunchError:
        """Waits for the failure that ends the start; every caller gets the same."""
        return await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """Stops everything in reverse order; each stage has its own deadline. Calling it again does nothing."""
        while self._stages:
            stage = self._stages.pop()
            for task in stage:
                task.cancel()
            await asyncio.gather(*stage, return_exceptions=True)

    def kill(self) -> None:
        """Ends everything now; `stop` then returns quickly."""
        for running in self._running.values():
            running.kill()

    async def _keep(self, spec: ProcessSpec, substitutes: frozenset[str]) -> None:
        """Lives as long as the process may: until it is cancelled, or until it gives the process up."""
        deaths: list[float] = []
        try:
            while True:
                status = await self._watched(spec)
                deaths = [*deaths, time.monotonic()][-self._policy.deaths_allowed :]
                wait_s = self._policy.wait_after(deaths, deaths[-1]) if self._settled else None
                reason = f"ended with exit code {status}" + (
                    " once too often" if wait_s is None and self._settled else ""
                )
                failure = ProcessFailed(spec, reason, self._running[spec.name].log_start)
                if wait_s is None:
                    return self._give_up(spec, substitutes, failure)
                self._say(f"{failure}; starting it again in {wait_s:.0f} s")
                await asyncio.sleep(wait_s)
                self._running[spec.name] = await RunningProcess.start(spec)
        except OSError as error:
            self._give_up(spec, substitutes, LaunchError(f"{spec.name}: {error.strerror or error}"))
        finally:
            await self._running.pop(spec.name).stop()

    async def _watched(self, spec: ProcessSpec) -> int:
        """Waits for the end of the process, and keeps its log from growing without bound meanwhile."""
        ended = asyncio.ensure_future(self._running[spec.name].wait())
        try:
            while not (await asyncio.wait([ended], timeout=LOG_CHECK_INTERVAL_S))[0]:
                shorten_log(spec)
            return ended.result()
        finally:
            ended.cancel()

    def _give_up(self, spec: ProcessSpec, substitutes: frozenset[str], failure: LaunchError) -> None:
        self._given_up.add(spec.name)
        if not substitutes <= self._given_up:
            self._say(f"{failure}; going on without it (all of it: {spec.log})")
        elif not self._failed.done():
            self._failed.set_result(failure)


def shorten_log(spec: ProcessSpec) -> None:
    """Cuts a log that has grown too long down to its end. Processes append, so they go on writing at the new end."""
    if not spec.log.exists() or spec.log.stat().st_size <= LOG_LIMIT_BYTES:
        return
    with spec.log.open("r+b") as file:
        file.seek(-LOG_KEPT_BYTES, 2)
        kept = file.read()
        file.truncate(0)
        file.seek(0)
        file.write(kept)
