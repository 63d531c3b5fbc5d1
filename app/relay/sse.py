"""Server-sent events as bytes, without I/O: a stream cut by the network anywhere, put back into whole events.

The format is WHATWG HTML, section 9.2 "Server-sent events": lines end in LF, CR or CRLF, an event ends at an empty
line, lines that start with a colon are comments.
"""

from __future__ import annotations

import re

from app.errors import UpstreamBadResponse

EVENT_MAX_BYTES = 1024 * 1024

# A line end is atomic: `\r\n` must never be read as the two line ends `\r` and `\n`, which would be an empty line.
_LINE_END = rb"(?>\r\n|\n|\r)"
_EMPTY_LINE = re.compile(_LINE_END + _LINE_END)
_LEADING_LINE_ENDS = re.compile(rb"(?:" + _LINE_END + rb")+")
_SPLIT_LINES = re.compile(rb"\r\n|\n|\r")


class EventSplitter:
    """Cuts a byte stream into whole events. What it returns, joined, is what it was fed, less a pending half event."""

    def __init__(self) -> None:
        self._pending = b""

    @property
    def has_pending(self) -> bool:
        """Whether the stream stands inside an event."""
        return bool(self._pending)

    def only_data(self, data: bytes) -> bytes | None:
        """The data of `data` where it is one whole event of one line, as nearly every one is; else None.

        Then it need not be fed: nothing is pending, before or after it.
        """
        is_one = data.startswith(b"data: ") and data.find(b"\n") == len(data) - 2 and data.endswith(b"\n\n")
        if not is_one or self._pending or b"\r" in data or len(data) > EVENT_MAX_BYTES:
            return None
        return data[6:-2]

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes, each with the empty line that ends it.

        Raises UpstreamBadResponse for an event of more than EVENT_MAX_BYTES.
        """
        # vLLM sends LF only and writes whole events, and JSON text has no bare CR, so this is nearly every call.
        if not self._pending and len(data) <= EVENT_MAX_BYTES and data.endswith(b"\n\n") and b"\r" not in data:
            if data.count(b"\n\n") == 1:
                return [data]
            return [event + b"\n\n" for event in data[:-2].split(b"\n\n")]
        return self._feed_any(data)

    def _feed_any(self, data: bytes) -> list[bytes]:
        # An empty line may have begun in the bytes that are pending, at most three bytes before their end.
        searched = max(0, len(self._pending) - 3)
        buffer = self._pending + data
        events, start = [], 0
        leading = _LEADING_LINE_ENDS.match(buffer)
        if leading:  # the LF of a CRLF whose CR ended the last event; an empty event means nothing to a client
            events.append(leading.group())
            start = leading.end()
        for match in _EMPTY_LINE.finditer(buffer, max(start, searched)):
            events.append(buffer[start : match.end()])
            start = match.end()
        self._pending = buffer[start:]
        if len(self._pending) > EVENT_MAX_BYTES or any(len(event) > EVENT_MAX_BYTES for event in events):
            raise UpstreamBadResponse("The worker sent an event that is too large.")
        return events


def data_of(event: bytes) -> bytes:
    """The data of one event: its `data` lines joined by LF; empty for comments."""
    if event.startswith(b"data: ") and event.find(b"\n", 0, -2) < 0 and b"\r" not in event:
        return event[6:].rstrip(b"\n")
    lines = []
    for line in _SPLIT_LINES.split(event):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines)
