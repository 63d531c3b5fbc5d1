"""When things are due: send times that do not wait for answers, and a timer fine enough to keep them."""

import asyncio
import ctypes
import heapq
import itertools
import os
import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

NS = 1_000_000_000


def jittered_times(rate: float, seconds: float, seed: int) -> list[int]:
    """Send times in ns from the start: one at a random moment of each of the equal slots that make `rate` per second.

    The rate is steady, yet streams that tick at a fixed interval do not fall into step with one another.
    """
    draw = random.Random(seed)
    return [round((slot + draw.random()) * NS / rate) for slot in range(int(rate * seconds))]


def poisson_times(rate: float, seconds: float, seed: int) -> list[int]:
    """Send times in ns from the start with exponential gaps: independent callers, `rate` per second on average."""
    draw = random.Random(seed)
    arrivals = itertools.accumulate(draw.expovariate(rate) for _ in itertools.count())
    return [round(at * NS) for at in itertools.takewhile(lambda at: at < seconds, arrivals)]


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class Pacer:
    """Calls back at absolute CLOCK_MONOTONIC times, on the running event loop.

    An event loop rounds its timers to a millisecond, which is more than a good relay adds to a chunk. A timerfd
    (timerfd_create(2); in the standard library only from Python 3.13) wakes the loop within tens of microseconds.
    """

    _ABSOLUTE = 1  # TFD_TIMER_ABSTIME

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        loop.add_reader(self._fd, self._fire)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._due.clear()

    def at(self, due_ns: int, callback: Callable[[], None]) -> None:
        """Call `callback` once `time.monotonic_ns()` has reached `due_ns`; equal times keep their order."""
        heapq.heappush(self._due, (due_ns, next(self._order), callback))
        if self._due[0][0] == due_ns:
            self._arm()

    def _arm(self) -> None:
        # A value of zero would disarm the timer; any time in the past fires at once.
        when = _TimeSpec(*divmod(max(1, self._due[0][0]), NS))
        if self._libc.timerfd_settime(self._fd, self._ABSOLUTE, ctypes.byref(_TimerSpec(_TimeSpec(0, 0), when)), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def _fire(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # re-armed for later between the wake-up and this read
        try:
            while self._due and self._due[0][0] <= time.monotonic_ns():
                heapq.heappop(self._due)[2]()
        finally:
            # A callback that raises must not stop the clock for all others.
            if self._due:
                self._arm()
