"""The faults a fake worker can be told to have, by name.

A fault is written `name` or `name:argument`; several are joined by `+`, as in `slow:10+no_done`. It is chosen by
the request's extra field `x_fault`, else by that name in its `metadata` (a field that vLLM knows, and ignores), else by
a model name `<model>!<fault>`, else for the whole worker (`FakeWorker.inject`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# What each fault does; n counts SSE events of a stream (the role chunk is the first) or bytes of a plain body.
CATALOGUE: Mapping[str, str] = MappingProxyType(
    {
        # before any byte
        "die_before_byte": "close the connection once the request is read, without a byte",
        "hang_before": "never answer; `heal` lets the request go on",
        "health_ok_engine_dead": "as hang_before for every inference request, while /health says 200",
        "kill_me_prompt": "the request kills the worker: the listener and all connections are gone (a process dies)",
        "kv_full": "the request waits inside the engine, KV usage is 1.0 and preemptions are counted; `heal` frees it",
        "ignore_abort": "generation goes on after the client has left",
        # instead of an answer
        "fast_500": "500 at once, worded as by a dead engine",
        "busy_503": "503 at once, worded as by a full engine queue",
        "draining_500": "500 at once, worded as by an engine that shuts down",
        "429": "429 at once, the argument is the Retry-After in seconds",
        "garbage": "bytes that are not HTTP",
        "html200": "200 with a web page",
        # within the answer
        "slow": "every step takes this many times longer, at least 1 ms times the argument",
        "die_after": "close the connection after n events or bytes, without ending the answer",
        "reset_after": "the same with a TCP reset",
        "hang_after": "send n events or bytes, then nothing; `heal` lets it go on",
        "hang_at_end": "all of a stream but the end of its body; `heal` lets it go on",
        "short_cl": "content-length says less than is sent",
        "long_cl": "content-length says more than is sent",
        "bad_chunk": "a chunk whose size is not hexadecimal after n events (default 2)",
        "half_event": "half an event (or half the JSON), then an orderly end; after n events (default 2)",
        "no_done": "an orderly end without [DONE]",
        "error_event": "an error event and [DONE] as vLLM sends them when generation fails, after n events (default 2)",
        "late_event_after_done": "one more content event behind [DONE]",
        "late_event_after_error": "one more content event behind the error of `error_event`",
        "huge_event": "one event (or body) of this many bytes, default 2 MiB",
        "split_utf8": "multi-byte characters are cut between HTTP chunks",
        "one_byte_chunks": "every byte is its own HTTP chunk",
        "sse_cr": "events end lines with CR",
        "sse_crlf": "events end lines with CR LF",
        "sse_comments": "comment lines between and inside events",
        "sse_multiline": "the JSON of an event spread over several data lines",
        # of the control plane; set on the worker
        "metrics_garbage": "nan | negative | 500 | huge | endless | text (default) at /metrics",
        "health_500": "/health says 500",
    }
)

CUTS = ("die_after", "reset_after", "hang_after", "bad_chunk", "half_event", "error_event", "huge_event")
"""Faults that strike at a place inside the answer."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Faults in force for one request, name to argument (empty when none was given)."""

    by_name: Mapping[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def __bool__(self) -> bool:
        return bool(self.by_name)

    def number(self, name: str, default: float) -> float:
        """The argument of a fault as a number, `default` when it was given none."""
        argument = self.by_name.get(name, "")
        return float(argument) if argument else default

    def cut(self) -> str | None:
        """The fault that strikes inside the answer, if there is one."""
        return next((name for name in CUTS if name in self.by_name), None)


def parse_faults(text: str) -> Faults:
    """Read a fault expression. Raises ValueError for a name that is not in the catalogue or a bad argument."""
    by_name: dict[str, str] = {}
    for part in filter(None, text.split("+")):
        name, _, argument = part.partition(":")
        if name not in CATALOGUE:
            raise ValueError(f"unknown fault {name!r}; known: {', '.join(CATALOGUE)}")
        if argument and name != "metrics_garbage":
            float(argument)
        by_name[name] = argument
    return Faults(by_name)
