"""Serves the application: one process or several on the same sockets."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import socket
import tempfile

import uvicorn

from app.admission import ledger
from app.api.app import create_app, well
from app.api.processes import Processes
from app.api.protocol import ClientConnection
from app.api.server import START_TIMEOUT_S, Server
from app.catalogue import Catalogue
from app.credentials import server_secret
from app.errors import LaunchError
from app.redis_server import RedisServer
from app.reload import Source
from app.settings import Settings
from app.telemetry.tracing import check_tracing
from app.tenancy.stores import require_keys
from app.workers.discovery import Found, expanded, files_in, read_workers

BACKLOG = 4096
KEEP_ALIVE_S = 75  # longer than any usual load balancer's, so that it is never us who close under its request
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"


def check(settings: Settings) -> None:
    """Read what the settings name on this machine. Raises ConfigurationError."""
    Catalogue.of(expanded(settings.models, Found()))
    for path in files_in(settings.models):
        read_workers(path, settings.reload.workers_per_name)
    server_secret(settings.auth)
    check_tracing(settings.tracing)
    if settings.redis is not None:
        RedisServer(settings.redis)


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
    ailing = multiprocessing.get_context("spawn").Event() if settings.listen.processes > 1 else None
    config = uvicorn.Config(
        functools.partial(create_app, settings, source, ailing.is_set if ailing else well),
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
        if ailing is None:
            server = Server(config, settings)
            server.run(sockets)
            if not server.started:
                raise LaunchError("the gateway did not start; its log says why")
        else:
            with tempfile.TemporaryDirectory(prefix="sluice-metrics-") as directory:
                os.environ[MULTIPROC_DIR] = directory
                Processes(config, sockets, settings, ailing).run()
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
