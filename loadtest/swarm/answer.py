"""One request and its answer: a light parser of streamed chat events, and the record that is left of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

REFUSALS = frozenset({429, 503})
CUT = "lost"
"""Of an answer that ended without `[DONE]`: the connection broke, or the stream said nothing any more."""


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one request.

    Attributes:
        at_s: when it was due, in seconds since 1970; what took so many seconds counts from then.
        status: HTTP's, 0 when no answer came.
        code: the error's, `lost` for a cut answer; empty when all is well.
        ttft_s: until the first generated token; None without one.
        gaps_s: between one chunk with tokens and the next.
        tokens: generated, by the answer's usage, or else chunks.
        queued_ms: the wait for a slot as the gateway tells it.
    """

    at_s: float
    kind: str
    band: str = "default"
    tenant: str = ""
    status: int = 0
    code: str = ""
    ttft_s: float | None = None
    took_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0
    queued_ms: float = 0.0
    variant: str = ""

    @property
    def is_served(self) -> bool:
        return self.status == 200 and not self.code

    @property
    def is_refused(self) -> bool:
        """Told to come later, by its own limit or because all is full. Not an error: it is what was promised."""
        return self.status in REFUSALS

    @property
    def is_error(self) -> bool:
        return not self.is_served and not self.is_refused

    @property
    def tpot_s(self) -> float | None:
        """Time per output token: (E2E - TTFT) / (n - 1). None below two tokens."""
        if self.ttft_s is None or self.tokens < 2:
            return None
        return (self.took_s - self.ttft_s) / (self.tokens - 1)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def has_tokens(self) -> bool:
        return bool(self.content or self.reasoning or self.reasoning_content or self.tool_calls)


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Error(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_EVENTS = msgspec.json.Decoder(_Event)


class Answer:
    """Hears an answer line by line; `begun_s` and the times of the lines are of one clock, in seconds."""

    def __init__(self, begun_s: float) -> None:
        self._begun_s = begun_s
        self._last_s = 0.0
        self._usage = _Usage()
        self._chunks = 0
        self._text: list[str] = []
        self._gaps_s: list[float] = []
        self.ttft_s: float | None = None
        self.code = ""
        self.is_done = False

    def hear(self, line: bytes, now_s: float) -> None:
        """One line of the stream: every event of this protocol is one line `data: …`; comments and the rest are passed
        over. What is no JSON of the right shape ends the answer as `malformed`.
        """
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self.is_done = True
            return
        try:
            event = _EVENTS.decode(data)
        except msgspec.DecodeError:
            self.code = "malformed"
            return
        if event.error is not None:
            self.code = str(event.error.code or event.error.type or "error")
        self._usage = event.usage or self._usage
        if any(choice.delta.has_tokens for choice in event.choices):
            self._token(event.choices[0].delta.content or "", now_s)

    def _token(self, text: str, now_s: float) -> None:
        if self.ttft_s is None:
            self.ttft_s = now_s - self._begun_s
        else:
            self._gaps_s.append(round(now_s - self._last_s, 5))
        self._last_s = now_s
        self._chunks += 1
        self._text.append(text)

    @property
    def text(self) -> str:
        return "".join(self._text)

    def record(self, asked: Record, status: int, headers: Mapping[str, str], now_s: float) -> Record:
        """What is left of it: `asked` tells what is known beforehand, `headers` are the answer's, in lower case."""
        code = self.code or ("" if self.is_done or status != 200 else CUT)
        return msgspec.structs.replace(
            asked,
            status=status,
            code=code,
            ttft_s=self.ttft_s,
            took_s=now_s - self._begun_s,
            gaps_s=tuple(self._gaps_s),
            prompt_tokens=self._usage.prompt_tokens,
            tokens=self._usage.completion_tokens or self._chunks,
            queued_ms=number(headers.get("x-sluice-queue-ms")),
            variant=headers.get("x-sluice-variant", ""),
        )


def error_code(status: int, body: bytes) -> str:
    """The code of an error that came instead of a stream, or `http_STATUS` where the body tells none."""
    try:
        error = _EVENTS.decode(body).error
    except msgspec.DecodeError:
        error = None
    return str((error and (error.code or error.type)) or f"http_{status}")


def number(text: str | None) -> float:
    """A header's number; 0 for none, or for what is not one."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def retry_after_s(headers: Mapping[str, str], most_s: float) -> float:
    """How long a refused client waits: what it was told in seconds, at least a tenth, at most `most_s`."""
    return min(most_s, max(0.1, number(headers.get("retry-after")) or 1.0))


def encode(record: Record) -> bytes:
    """One line of a records file."""
    return msgspec.json.encode(record) + b"\n"


def decode(lines: Iterable[bytes]) -> list[Record]:
    """The records of a file. Raises ValueError naming the line that is none."""
    records = []
    for number_of, line in enumerate(lines, start=1):
        try:
            records.append(msgspec.json.decode(line, type=Record))
        except msgspec.DecodeError as error:
            raise ValueError(f"line {number_of} is no record: {error}") from None
    return records
