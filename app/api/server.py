"""One process that serves the application on uvicorn, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from app.api.protocol import ClientConnection
from app.drain import Drain
from app.settings import Settings

# A process that is still importing answers no health check; with uvicorn's 5 s a busy machine kills every process
# while it starts, again and again.
START_TIMEOUT_S = 60
CUT_S = 1.0  # for the last words of what is cut
LOOK_S = 0.05


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
