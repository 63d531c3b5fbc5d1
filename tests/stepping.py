"""An event loop whose time passes only while nothing else can happen: hours in moments, the same way each time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class StandsStill(Exception):
    """Nothing is left that could ever happen."""


class SteppingLoop(asyncio.SelectorEventLoop):
    """Waits for nobody, and does the work of threads itself, in turn: what it runs must not need the outside."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_SteppingSelector(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: object, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - as a thread would pass it on
            done.set_exception(error)
        return done


class _SteppingSelector(selectors.SelectSelector):
    def __init__(self, loop: SteppingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Nothing is ever ready; the time that somebody would have waited is over at once."""
        if timeout is None:
            raise StandsStill
        self._loop.now += max(0.0, timeout)
        return []


class Line(asyncio.Transport):
    """A connection to nobody: keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = bytearray()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.written += data

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        """There is nothing to read."""

    resume_reading = pause_reading
