"""A viewer that does not read is let go, and its place with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from app.api.access import CALLER
from app.api.console import Live
from app.api.protocol import CONNECTION
from app.runtime import Runtime
from app.served import Cuttable, Served
from app.settings import Settings
from app.tenancy.directory import Caller
from app.tenant import ANONYMOUS

STALL_S = 0.05


class StuckConnection:
    """The way to a client that reads nothing: every byte is too much for it."""

    def __init__(self) -> None:
        self.on_disconnect: Callable[[], None] | None = None
        self.on_stall: Callable[[], None] | None = None
        self.paused_since: float | None = None
        self.aborted = asyncio.Event()

    def abort(self) -> None:
        self.aborted.set()

    async def send(self, message: object) -> None:
        if self.aborted.is_set():
            return
        self.paused_since = asyncio.get_running_loop().time()
        assert self.on_stall is not None
        self.on_stall()
        await asyncio.Event().wait()


class Everybody:
    def identify(self, headers: object, address: str) -> Caller:
        return Caller(ANONYMOUS, is_admin=True)


class Places:
    """A console that knows whether somebody watches."""

    def __init__(self) -> None:
        self.taken = 0

    @contextmanager
    def viewer(self) -> Iterator[None]:
        self.taken += 1
        yield
        self.taken -= 1


class Watched(Served):
    """Counts who is being served."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = 0

    def opened(self, request: Cuttable) -> None:
        self.watched += 1

    def closed(self, request: Cuttable) -> None:
        self.watched -= 1


@dataclass
class Stage:
    """What a viewer needs of a runtime."""

    settings: Settings
    served: Watched = field(default_factory=Watched)
    console: Places = field(default_factory=Places)
    identification: Everybody = field(default_factory=Everybody)


async def test_a_viewer_that_does_not_read_is_disconnected_and_gone() -> None:
    stage = Stage(Settings.model_validate({"relay": {"client_stall_timeout_s": STALL_S}}))
    connection = StuckConnection()
    scope: dict[str, Any] = {"headers": [], "client": None, CONNECTION: connection}
    scope[CALLER] = Caller(ANONYMOUS, is_admin=True)
    async with asyncio.timeout(30):
        await Live(cast("Runtime", stage))(scope, cast("Any", None), connection.send)
    assert connection.aborted.is_set()
    assert (stage.console.taken, stage.served.watched) == (0, 0)
