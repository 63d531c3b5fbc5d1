"""One worker, started to be measured and stopped afterwards."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx
import psutil

from app.errors import LaunchError
from app.evaluation.endpoint import Endpoint
from app.launcher.command import tethered
from app.launcher.engine_log import read_tail, telling_line
from app.launcher.processes import ProcessSpec

READY_TIMEOUT_S = 900.0
POLL_S = 0.5
STOP_GRACE_S = 10.0
REQUEST_TIMEOUT_S = 120.0
UNKNOWN_VERSION = "unknown"


@dataclass(frozen=True, slots=True)
class MeasuredWorker:
    """A worker that has generated a token. `stop` ends it, and what it started."""

    spec: ProcessSpec
    endpoint: Endpoint
    process: subprocess.Popen[bytes]
    log_start: int

    def memory_bytes(self) -> int:
        """Of all its processes, shared pages divided among those who share them (PSS)."""
        return sum(_pss(member) for member in psutil.Process(self.process.pid).children(recursive=True))

    def cpu_seconds(self) -> float:
        """That its processes have used."""
        return sum(_cpu_seconds(member) for member in psutil.Process(self.process.pid).children(recursive=True))

    def why(self, error: LaunchError) -> LaunchError:
        """What its log says where it has died of the matter, else `error`."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2 * POLL_S)
        if self.process.returncode is None:
            return error
        return LaunchError(telling_line(read_tail(self.spec.log, self.log_start)) or str(error))

    def stop(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=self.spec.stop_s + STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # the tether answers by killing the whole group
            self.process.wait()


class Quiet:
    """Whether the machine was: how much of the cores others took than `worker` and this process, since it was made."""

    def __init__(self, worker: MeasuredWorker, cores: int) -> None:
        self._worker = worker
        self._cores = cores
        self._started = time.monotonic()
        self._all, self._own = _busy_seconds(), self._used()

    def taken_by_others(self) -> float:
        """Between 0 and 1: cores' time, also what a hypervisor gave to other machines."""
        wall_s = time.monotonic() - self._started
        others = (_busy_seconds() - self._all) - (self._used() - self._own)
        return min(1.0, max(0.0, others / max(1e-9, wall_s * self._cores)))

    def _used(self) -> float:
        return self._worker.cpu_seconds() + _cpu_seconds(psutil.Process())


@contextmanager
def started(spec: ProcessSpec, endpoint: Endpoint) -> Iterator[MeasuredWorker]:
    """The worker, from its first generated token on. Raises LaunchError with the engine's own reason."""
    spec.log.parent.mkdir(parents=True, exist_ok=True)
    with spec.log.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(  # noqa: S603 - the launcher's own command line
            tethered(spec.arguments, spec.stop_s),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=dict(spec.environment),
            start_new_session=True,
        )
    worker = MeasuredWorker(spec, endpoint, process, start)
    try:
        _await_token(worker)
        yield worker
    except LaunchError as error:
        raise worker.why(error) from None
    finally:
        worker.stop()


def _await_token(worker: MeasuredWorker) -> None:
    """Health does not count: an engine may answer it and die of its first request."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not _generates(worker.endpoint):
        if worker.process.poll() is not None:
            raise LaunchError(f"the worker ended with exit code {worker.process.returncode}")
        if time.monotonic() > deadline:
            raise LaunchError(f"not ready within {READY_TIMEOUT_S / 60:.0f} minutes")
        time.sleep(POLL_S)


def _generates(endpoint: Endpoint) -> bool:
    body = {"model": endpoint.model, "prompt": "Hello", "max_tokens": 1}
    try:
        answer = httpx.post(
            f"{endpoint.base_url}/completions", json=body, timeout=REQUEST_TIMEOUT_S, headers=endpoint.headers,
            trust_env=False,
        )  # fmt: skip
    except httpx.HTTPError:
        return False
    return answer.status_code == httpx.codes.OK


def engine_version(endpoint: Endpoint) -> str:
    """What the worker calls its own version (vLLM: `GET /version`)."""
    url = f"{endpoint.base_url.removesuffix('/v1')}/version"
    with suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
        return str(httpx.get(url, timeout=REQUEST_TIMEOUT_S, trust_env=False).json()["version"])
    return UNKNOWN_VERSION


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _busy_seconds() -> float:
    """Of all cores of the machine since it was started: all but idle, and waiting for a disk is idle, too."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))
