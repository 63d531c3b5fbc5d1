"""Runs the application on uvicorn: one process or several on the same sockets."""

from __future__ import annotations

import functools
import os
import socket
import tempfile
from types import FrameType

import uvicorn
from uvicorn.supervisors import Multiprocess

from app.api.app import create_app
from app.api.protocol import ClientConnection
from app.catalogue import Catalogue
from app.credentials import TlsContexts
from app.errors import LaunchError
from app.settings import Settings

BACKLOG = 4096
KEEP_ALIVE_S = 75  # longer than any usual load balancer's, so that it is never us who close under its request
# A process that is still importing answers no health check; with uvicorn's 5 s a busy machine kills every process
# while it starts, again and again.
START_TIMEOUT_S = 60
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"


class Server(uvicorn.Server):
    """One process. A stop that was asked for is a good end, exit code 0, and asking twice is asking for it now.

    uvicorn's own server would raise the signal again once it has stopped, and so die of it.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


class Processes(Multiprocess):
    """Several processes on the same sockets, replaced when they die."""

    def terminate_all(self) -> None:
        # Left open here, they would still take connections that no process accepts any more.
        for bound in self.sockets:
            bound.close()
        super().terminate_all()


def serve(settings: Settings) -> None:
    """Serve until a signal says stop; open requests get `drain_timeout_s` to finish.

    Raises ConfigurationError or LaunchError, before anything is served.
    """
    # Each process builds its own; what is wrong with them is better told once, here.
    Catalogue.of(settings.models)
    if settings.redis is not None and settings.redis.tls is not None:
        TlsContexts().of(settings.redis.tls)
    sockets = _bind_all(settings)
    config = uvicorn.Config(
        functools.partial(create_app, settings),
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
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
    )
    try:
        if settings.listen.processes == 1:
            server = Server(config)
            server.run(sockets)
            if not server.started:
                raise LaunchError("the gateway did not start; its log says why")
        else:
            with tempfile.TemporaryDirectory(prefix="sluice-metrics-") as directory:
                os.environ[MULTIPROC_DIR] = directory
                Processes(config, sockets).run()
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
