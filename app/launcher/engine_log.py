"""Finds, in what a process has written, the line that says why it ended. Pure."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import takewhile
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
FRAME = re.compile(r'^File ".*", line \d+')
MARKS = re.compile(r"^[\^~]+$")
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


def telling_line(lines: Sequence[str]) -> str | None:
    """The root cause: the first exception that is no echo of another, else a usage error, else the last line.

    Multi-process engines report one failure several times, the cause first and ever vaguer wrappings after it.
    """
    texts = [plain(line) for line in lines]
    exceptions = [index for index, text in enumerate(texts) if EXCEPTION.match(text)]
    causes = [index for index in exceptions if not SECONDARY.search(texts[index])]
    usage = [index for index, text in enumerate(texts) if USAGE_ERROR.match(text)]
    for found in (causes, usage, exceptions):
        if found:
            return _record(lines[found[0] :])
    return next((text for text in reversed(texts) if text), None)


def _record(lines: Sequence[str]) -> str:
    """The first line, with those that the same logging call wrote after it: they repeat its prefix."""
    prefix = _prefix(lines[0])
    same = takewhile(lambda line: prefix and _prefix(line) == prefix, lines[1:])
    following = takewhile(lambda text: not EXCEPTION.match(text), map(plain, same))
    return " ".join([plain(lines[0]), *following])[:SHOWN_CHARS]


def _prefix(line: str) -> str:
    match = PREFIX.match(COLOUR.sub("", line))
    return match.group() if match else ""


def last_lines(lines: Iterable[str], count: int = SHOWN_LINES) -> list[str]:
    """The last lines worth a look, as plain text: the frames of a traceback are for those who open the log."""
    kept: deque[str] = deque(maxlen=count)
    is_source = False
    for text in map(plain, lines):
        is_frame = FRAME.match(text) is not None
        is_source = is_source and not EXCEPTION.match(text)
        if text and not (is_frame or is_source or MARKS.match(text)):
            kept.append(text)
        is_source = is_frame
    return list(kept)
