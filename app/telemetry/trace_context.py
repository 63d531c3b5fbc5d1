"""W3C Trace Context, level 1: who a request is part of, as `traceparent` and `tracestate` say it. Pure.

https://www.w3.org/TR/trace-context/ · What is not well-formed to the letter is no trace: it is neither passed on nor
mended, for a worker would read it with another parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

Header = tuple[bytes, bytes]

TRACE_PARENT = b"traceparent"
TRACE_STATE = b"tracestate"

SAMPLED = 1
_IDS = rb"(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
# Version 00 has these four fields and no more; later ones may add some, ff is none.
_PARENT = re.compile(rb"(?:00-%b|(?!00|ff)[0-9a-f]{2}-%b(?:-[ -~]{0,128})?)" % (_IDS, _IDS))
_MEMBER = rb"[a-z0-9][a-z0-9_\-*/@]{0,255}=[!-+\--<>-~][ !-+\--<>-~]{0,255}|"
_STATE = re.compile(rb"(?:%b)(?:[ \t]*,[ \t]*(?:%b)){0,31}" % (_MEMBER, _MEMBER))
STATE_MAX_BYTES = 512


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span as others refer to it: ids of 128 and 64 bits, whether it is recorded, and what tracing systems add."""

    trace_id: int
    span_id: int
    is_sampled: bool
    state: bytes = b""

    @classmethod
    def of(cls, headers: Iterable[Header]) -> Self | None:
        """What well-formed headers say; see `accepted`."""
        values = dict(headers)
        found = _PARENT.fullmatch(values.get(TRACE_PARENT, b""))
        if found is None:
            return None
        trace_id, span_id, flags = (field for field in found.groups() if field is not None)
        is_sampled = bool(int(flags, 16) & SAMPLED)
        return cls(int(trace_id, 16), int(span_id, 16), is_sampled, values.get(TRACE_STATE, b""))

    @property
    def headers(self) -> tuple[Header, ...]:
        """For whoever is called by the span."""
        parent = b"00-%032x-%016x-%02x" % (self.trace_id, self.span_id, self.is_sampled)
        return ((TRACE_PARENT, parent), (TRACE_STATE, self.state)) if self.state else ((TRACE_PARENT, parent),)


def accepted(headers: Iterable[Header]) -> tuple[Header, ...]:
    """Those of `headers`, one pair for each name, that say of which trace a request is; none if that is not clear.

    `tracestate` means nothing without `traceparent`; said twice, or malformed, either of them is not there.
    """
    said: dict[bytes, bytes] = {}
    for name, value in headers:
        said[name] = b"" if name in said else value
    parent, state = said.get(TRACE_PARENT, b""), said.get(TRACE_STATE, b"")
    if not _PARENT.fullmatch(parent):
        return ()
    if not state or len(state) > STATE_MAX_BYTES or not _STATE.fullmatch(state):
        return ((TRACE_PARENT, parent),)
    return ((TRACE_PARENT, parent), (TRACE_STATE, state))


def trace_id_of(headers: Iterable[Header]) -> str:
    """32 hex digits: the trace that well-formed headers name; empty without them."""
    for name, value in headers:
        if name == TRACE_PARENT:
            return value[3:35].decode()
    return ""
