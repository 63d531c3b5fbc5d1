"""Finds, in what a process has written, the line that says why it ended. Pure."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path

TAIL_BYTES = 256 * 1024
SHOWN_LINES = 12
SHOWN_CHARS = 400

COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# vLLM: "(EngineCore pid=12) ERROR 11-21 08:51:04 [core.py:133] text"; either part may be missing.
PREFIX = re.compile(
    r"^(?:\([A-Za-z]\w*(?:[ _-]\w+)* pid=\d+\) ?)?"
    r"(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?"
)
EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]*(?:Error|Exception|Exit|Interrupt)(?:: .+|$)")
USAGE_ERROR = re.compile(r"^\S+: error: ")
# These only say that something else went wrong.
SECONDARY = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|EngineDeadError"
    r"|EngineCore encountered an issue|Engine process failed to start|CancelledError"
    r"|SystemExit|KeyboardInterrupt|BrokenPipeError"
)


def read_tail(path: Path, start: int = 0) -> list[str]:
    """The last lines of a log that may be large or absent, none of them from before byte `start`."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(start if start <= end else 0, end - TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def plain(line: str) -> str:
    """A line without colours and without vLLM's prefixes, of a length that can be shown."""
    return PREFIX.sub("", COLOUR.sub("", line)).strip()[:SHOWN_CHARS]


def telling_line(lines: Iterable[str]) -> str | None:
    """The root cause: the first exception that is no echo of another, else a usage error, else the last line.

    Multi-process engines report one failure several times, the cause first and ever vaguer wrappings after it.
    """
    texts = [text for text in map(plain, lines) if text]
    exceptions = [text for text in texts if EXCEPTION.match(text)]
    causes = [text for text in exceptions if not SECONDARY.search(text)]
    usage = [text for text in texts if USAGE_ERROR.match(text)]
    for found in (causes, usage, exceptions):
        if found:
            return found[0]
    return texts[-1] if texts else None


def last_lines(lines: Iterable[str], count: int = SHOWN_LINES) -> list[str]:
    """The last lines worth a look, as plain text."""
    return list(deque((text for text in map(plain, lines) if text), maxlen=count))
