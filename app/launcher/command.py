"""Runs a command to its end during preparation: tethered, logged, its progress shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from app.errors import LaunchError
from app.launcher import tether
from app.launcher.engine_log import read_tail, telling_line
from app.launcher.progress import Step

STOP_S = 5.0
WATCH_INTERVAL_S = 0.5

Lines = Callable[[str], None]


def tethered(arguments: tuple[str, ...] | list[str], stop_s: float) -> list[str]:
    """The command line that runs `arguments` on a tether. -I and -S: nothing but the standard library, quickly."""
    return [sys.executable, "-I", "-S", tether.__file__, str(stop_s), *arguments]


def run_command(
    arguments: list[str],
    environ: Mapping[str, str],
    log: Path,
    *,
    on_line: Lines | None = None,
    on_written: Callable[[int], None] | None = None,
) -> None:
    """Runs a command; raises LaunchError with its most telling line when it fails.

    Its standard output goes to `on_line`, line by line, or to the log; standard error to the log. `on_written` hears
    twice a second how many bytes the command has written to disk.
    """
    start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as errors, _spawn(arguments, environ, errors, piped=on_line is not None) as process:
        if on_written:
            threading.Thread(target=_watch_writes, args=(process, on_written), daemon=True).start()
        if process.stdout and on_line:
            for line in process.stdout:
                on_line(line.decode("utf-8", "replace").rstrip("\n"))
        status = process.wait()
    if status:
        raise LaunchError(f"{telling_line(read_tail(log, start)) or f'exit code {status}'} (all of it: {log})")


class ProgressReader:
    """Reads the lines of `app.recipes.progress`: shows them on a step, and keeps the error that one may carry."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.error: str | None = None

    def read(self, line: str) -> None:
        """Anything else that comes along the same way is not for us."""
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            event = json.loads(line)
            if "error" in event:
                self.error = str(event["error"])
            else:
                self._step.note(str(event["doing"]))
                self._step.reached(float(event["completed"]), event["total"])


@contextmanager
def _spawn(
    arguments: list[str], environ: Mapping[str, str], errors: IO[bytes], *, piped: bool
) -> Iterator[subprocess.Popen[bytes]]:
    """The running command; whatever ends the block ends the command with it."""
    process = subprocess.Popen(  # noqa: S603 - the launcher's own command lines
        tethered(arguments, STOP_S),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if piped else errors,
        stderr=errors,
        env={**os.environ, **environ},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.stdin:
            process.stdin.close()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _watch_writes(process: subprocess.Popen[bytes], on_written: Callable[[int], None]) -> None:
    """Ends with the process. A child that has ended takes its count along, so the highest sum is what is told."""
    peak = 0
    ended = threading.Event()
    while process.poll() is None:
        with suppress(psutil.Error):
            family = [*psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(member.io_counters().write_bytes for member in family))
        on_written(peak)
        ended.wait(WATCH_INTERVAL_S)
