"""Runs the application on uvicorn: one process or several on the same sockets."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from app.admission import ledger
from app.api.app import create_app
from app.api.protocol import ClientConnection
from app.catalogue import Catalogue
from app.credentials import TlsContexts, server_secret
from app.drain import Drain
from app.errors import LaunchError
from app.reload import Source
from app.settings import Settings
from app.tenancy.stores import require_keys
from app.workers.discovery import Found, expanded, files_in, read_workers

BACKLOG = 4096
KEEP_ALIVE_S = 75  # longer than any usual load balancer's, so that it is never us who close under its request
# A process that is still importing answers no health check; with uvicorn's 5 s a busy machine kills every process
# while it starts, again and again.
START_TIMEOUT_S = 60
CUT_S = 1.0  # for the last words of what is cut
LOOK_S = 0.05
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"


class Server(uvicorn.Server):
    """One process, and its end in steps: see `drain`. A stop that was asked for is a good end, exit code 0.

    Who asks at a terminal need not wait until a load balancer has noticed, and asking twice is asking for it now: in
    the same order, without the waiting. uvicorn's own server would drop what it holds then, and die of the first
    signal once it has stopped.
    """

    _is_asked_twice = False
    _is_at_terminal = False

    def __init__(self, config: uvicorn.Config, settings: Settings, *, ignores: int | None = None) -> None:
        super().__init__(config)
        self._settings = settings
        self._ignores = ignores

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == self._ignores:
            return
        self._is_asked_twice = self.should_exit
        self._is_at_terminal = sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, within `drain_timeout_s` and CUT_S, and close the application."""
        drain: Drain = self.lifespan.state["runtime"].drain
        began = time.monotonic()
        self._be_quiet(drain)
        if not self._is_at_terminal:
            await self._wait(lambda: time.monotonic() >= began + self._settings.drain_notice_s)
        self._close_listeners(sockets or [])
        await self._finish(began + min(self._settings.drain_queue_s, self._settings.drain_timeout_s))
        drain.turn_away()
        await self._finish(began + self._settings.drain_timeout_s)
        drain.cut()
        await self._finish(time.monotonic() + CUT_S, is_last=True)
        for connection in list(self.server_state.connections):
            if isinstance(connection, ClientConnection):
                connection.abort()
        await self.lifespan.shutdown()

    def _be_quiet(self, drain: Drain) -> None:
        drain.begin()
        self.config.encoded_headers.append((b"connection", b"close"))
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        for connection in list(self.server_state.connections):
            if isinstance(connection, ClientConnection):
                connection.quiet()

    def _close_listeners(self, sockets: list[socket.socket]) -> None:
        for server in self.servers:
            server.close()
        for bound in sockets:
            bound.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()

    async def _finish(self, deadline: float, *, is_last: bool = False) -> None:
        """Until nothing is under way any more, or the deadline, or the second asking."""
        state = self.server_state
        await self._wait(
            lambda: not (state.connections or state.tasks) or time.monotonic() >= deadline, is_patient=is_last
        )

    async def _wait(self, is_over: Callable[[], bool], *, is_patient: bool = False) -> None:
        # A signal's handler must not touch the loop: what it leaves behind is looked for.
        while not is_over() and (is_patient or not self._is_asked_twice):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)


class ServingProcess(Process):
    """One of several processes."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], settings: Settings) -> None:
        self._settings = settings
        super().__init__(config, sockets)

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        self._server = Server(self.config, self._settings, ignores=signal.SIGINT)
        super().target(sockets)


class Processes(Multiprocess):
    """Several processes on the same sockets, replaced when they die.

    A terminal sends Ctrl-C to all of them; they leave it to their parent to tell them, once for each time it is asked.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], settings: Settings) -> None:
        super().__init__(config, sockets)
        self._settings = settings

    def init_processes(self) -> None:
        self.processes = [self._start() for _ in range(self.processes_num)]

    def keep_subprocess_alive(self) -> None:
        for index, process in enumerate(self.processes):
            if self.should_exit.is_set() or process.is_alive(timeout=START_TIMEOUT_S):
                continue
            process.kill()
            process.join()
            if process.exitcode == STARTUP_FAILURE:
                self.should_exit.set()  # its successor would fail in the same way
                return
            self.processes[index] = self._start()

    def terminate_all(self) -> None:
        # Left open here, they would still take connections that no process accepts any more.
        for bound in self.sockets:
            bound.close()
        super().terminate_all()

    def join_all(self) -> None:
        self.signal_queue.clear()
        while any(process.process.is_alive() for process in self.processes):
            if self.signal_queue:
                self.signal_queue.clear()
                for process in self.processes:
                    process.process.terminate()
            time.sleep(LOOK_S)
        super().join_all()

    def handle_hup(self) -> None:
        """Each process reads the configuration again."""
        for process in self.processes:
            if process.pid is not None and process.is_ready():  # before, it would die of it, and it reads it anyway
                os.kill(process.pid, signal.SIGHUP)

    def handle_ttin(self) -> None:
        """Nothing: uvicorn would start its own kind of process here."""

    handle_ttou = handle_ttin

    def _start(self) -> ServingProcess:
        process = ServingProcess(self.config, self.sockets, self._settings)
        process.start()
        return process


def check(settings: Settings) -> None:
    """Read what the settings name on this machine. Raises ConfigurationError."""
    Catalogue.of(expanded(settings.models, Found()))
    for path in files_in(settings.models):
        read_workers(path, settings.reload.workers_per_name)
    server_secret(settings.auth)
    if settings.redis is not None and settings.redis.tls is not None:
        TlsContexts().of(settings.redis.tls)


def serve(settings: Settings, source: Source | None = None) -> None:
    """Serve until a signal says stop; open requests get `drain_timeout_s` to finish.

    Raises ConfigurationError or LaunchError, before anything is served.
    """
    check(settings)  # each process does it for itself; what is wrong is better told once, here
    if settings.redis is not None:
        asyncio.run(ledger.check(settings.redis))
    if settings.is_guarded:
        asyncio.run(require_keys(settings))
    sockets = _bind_all(settings)
    config = uvicorn.Config(
        functools.partial(create_app, settings, source),
        factory=True,
        loop="uvloop",
        # uvicorn only ever calls it, with keyword arguments.
        http=functools.partial(ClientConnection, limits=settings.limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        workers=settings.listen.processes,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=[("x-content-type-options", "nosniff"), ("cache-control", "no-store")],
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_worker_healthcheck=START_TIMEOUT_S,
    )
    try:
        if settings.listen.processes == 1:
            server = Server(config, settings)
            server.run(sockets)
            if not server.started:
                raise LaunchError("the gateway did not start; its log says why")
        else:
            with tempfile.TemporaryDirectory(prefix="sluice-metrics-") as directory:
                os.environ[MULTIPROC_DIR] = directory
                Processes(config, sockets, settings).run()
    finally:
        for bound in sockets:
            bound.close()


def _bind_all(settings: Settings) -> list[socket.socket]:
    addresses = [(settings.listen.host, settings.listen.port)]
    if settings.admin is not None:
        addresses.append((settings.admin.host, settings.admin.port))
    sockets: list[socket.socket] = []
    for host, port in addresses:
        try:
            sockets.append(_bind(host, port))
        except OSError as error:
            for bound in sockets:
                bound.close()
            raise LaunchError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return sockets


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError:
        bound.close()
        raise
    bound.set_inheritable(True)
    return bound
