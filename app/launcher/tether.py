"""Runs one command that never outlives the process that asked for it.

    python tether.py STOP_SECONDS COMMAND [ARGUMENT…]

The parent holds the other end of this process's standard input. When it closes, on purpose or because the parent
died of whatever cause, the command gets SIGTERM and STOP_SECONDS to end. What is left of its process group then is
killed: vLLM's engine runs in processes of its own, and one of them would otherwise keep its memory and its port.
SIGTERM to the tether skips the waiting. It exits with the command's status, 128 + n for a death by signal n.

This file is run by its path and imports the standard library only, so that it starts in some 20 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import types

PR_SET_PDEATHSIG = 1  # prctl(2)
COMMAND_NOT_FOUND = 127


def main(arguments: list[str]) -> int:
    stop_s, command = float(arguments[0]), arguments[1:]
    try:
        # One thread, so preexec_fn is safe here. The death signal covers the case that this very process is killed.
        child = subprocess.Popen(  # noqa: S603 - the command is the caller's own
            command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_die_with_parent
        )
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return COMMAND_NOT_FOUND
    _kill_on_sigterm(child.pid)
    _wait(child, stop_s)
    _signal_group(child.pid, signal.SIGKILL)
    status = child.wait()
    return status if status >= 0 else 128 - status


def _wait(child: subprocess.Popen[bytes], stop_s: float) -> None:
    """Returns when the child has ended, or when its time to do so is over."""
    descriptor = os.pidfd_open(child.pid)
    ready, _, _ = select.select([sys.stdin.fileno(), descriptor], [], [])
    if descriptor not in ready:
        # Only the leader is asked: vLLM drains its engine itself, and an engine that is signalled as well does not.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGTERM)
        select.select([descriptor], [], [], stop_s)


def _kill_on_sigterm(group: int) -> None:
    def kill(_signal: int, _frame: types.FrameType | None) -> None:
        _signal_group(group, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
