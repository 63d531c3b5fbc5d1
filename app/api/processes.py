"""Several processes of one gateway on the same sockets: started, asked, replaced when they die."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections import deque
from multiprocessing.synchronize import Event

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from app.api.server import LOOK_S, START_TIMEOUT_S, Server
from app.settings import Settings

MOST_DEATHS = 5
DEATHS_WITHIN_S = 60.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 1.5  # with the parent's look twice a second: another is there within two seconds, and its start

logger = logging.getLogger("uvicorn.error")


class ServingProcess(Process):
    """One of several processes."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], settings: Settings) -> None:
        self._settings = settings
        super().__init__(config, sockets)

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until its runtime listens to it
        self._server = Server(self.config, self._settings, ignores=signal.SIGINT)
        super().target(sockets)


class Deaths:
    """When processes died, and what follows. Pure: times are monotonic seconds, passed in."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MOST_DEATHS)

    def died(self, now: float) -> float:
        """One more; the seconds to wait before its successor starts: none after the first, then ever more."""
        self._times.append(now)
        recent = self._recent(now)
        return 0.0 if recent == 1 else min(FIRST_PAUSE_S * 2.0 ** (recent - 2), LONGEST_PAUSE_S)

    def are_too_many(self, now: float) -> bool:
        return self._recent(now) >= MOST_DEATHS

    def _recent(self, now: float) -> int:
        return sum(now - time < DEATHS_WITHIN_S for time in self._times)


class Processes(Multiprocess):
    """Several processes on the same sockets, replaced when they die.

    When too many die in a short time, `ailing` is set until it is over: those that live say so to load balancers. A
    terminal sends Ctrl-C to all of them; they leave it to their parent to tell them, once for each time it is asked.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], settings: Settings, ailing: Event) -> None:
        super().__init__(config, sockets)
        self._settings = settings
        self._ailing = ailing
        self._deaths = Deaths()
        self._born: dict[int, float] = {}
        self._due: dict[int, float] = {}

    def init_processes(self) -> None:
        self.processes = [self._start(index) for index in range(self.processes_num)]

    def keep_subprocess_alive(self) -> None:
        now = time.monotonic()
        for index, process in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if index in self._due:
                if now >= self._due[index]:
                    del self._due[index]
                    self.processes[index] = self._start(index)
            elif not self._lives(index, process, now):
                self._bury(index, process, now)
        (self._ailing.set if self._deaths.are_too_many(now) else self._ailing.clear)()

    def _lives(self, index: int, process: Process, now: float) -> bool:
        """A process that still starts is not asked: it cannot answer, and the others would have to wait for it."""
        if not process.process.is_alive():
            return False
        return now - self._born[index] < START_TIMEOUT_S or process.ping(timeout=START_TIMEOUT_S)

    def _bury(self, index: int, process: Process, now: float) -> None:
        process.kill()
        process.join()
        if process.exitcode == STARTUP_FAILURE:
            self.should_exit.set()  # its successor would fail in the same way
            return
        pause_s = self._deaths.died(now)
        logger.warning("process %s died with %s; another starts in %.2f s", process.pid, process.exitcode, pause_s)
        self._due[index] = now + pause_s

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
            # One that does not answer yet would die of the signal, and has still to read the configuration.
            if process.pid is not None and process.ping(timeout=1):
                os.kill(process.pid, signal.SIGHUP)

    def handle_ttin(self) -> None:
        """Nothing: uvicorn would start its own kind of process here."""

    handle_ttou = handle_ttin

    def _start(self, index: int) -> ServingProcess:
        self._born[index] = time.monotonic()
        process = ServingProcess(self.config, self.sockets, self._settings)
        process.start()
        return process
