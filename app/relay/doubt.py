"""How unsure a worker was of its answer: asked of it on top of what the client asked, and taken out again.

Log-probabilities as vLLM writes them in chat and text completions; `app.uncertainty` makes one number of them. What the
client gets is what it would have got without: `"logprobs":null`, or as many alternatives as it asked for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import msgspec

from app.catalogue import Cascade
from app.inference import InferenceRequest, Route
from app.relay.answer import BegunStream, StreamedAnswer
from app.relay.sse import data_of
from app.telemetry.account import Account
from app.uncertainty import of_answer

_TRUE, _NULL = msgspec.Raw(b"true"), msgspec.Raw(b"null")
_HAS_LOGPROBS = b'"logprobs":{'


class _Alternative(msgspec.Struct):
    logprob: float


class _Token(msgspec.Struct):
    top_logprobs: list[_Alternative]


class _Logprobs(msgspec.Struct):
    """Of a chat completion, `content`; of a text completion, `top_logprobs`."""

    content: list[_Token] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    logprobs: _Logprobs | None = None


class _Part(msgspec.Struct):
    """A whole answer or a chunk."""

    choices: list[_Choice] = []


_decode = msgspec.json.Decoder(_Part).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_choices = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_encode = msgspec.json.Encoder().encode

Tokens = list[list[float]]
"""Of each token, the log-probabilities of its alternatives."""


def armed(request: InferenceRequest, alternatives: int) -> InferenceRequest:
    """`request`, asking also for the log-probabilities of so many alternatives."""
    if request.route is Route.COMPLETIONS:
        return replace(request, fields={**request.fields, "logprobs": _number(alternatives)})
    most = max(alternatives, _asked(request) or 0)
    return replace(request, fields={**request.fields, "logprobs": _TRUE, "top_logprobs": _number(most)})


def tokens_of(data: bytes) -> Tokens:
    """What was weighed in a whole answer or a chunk; nothing in what cannot be read."""
    try:
        choices = _decode(data).choices
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
    found = choices[0].logprobs if choices else None
    if found is None:
        return []
    if found.content is not None:
        return [[alternative.logprob for alternative in token.top_logprobs] for token in found.content]
    return [list(token.values()) for token in found.top_logprobs or () if token]


def doubt_of(tokens: Sequence[Sequence[float]], cascade: Cascade) -> float:
    """How unsure an answer of these tokens is; without any nobody can tell, which is as unsure as can be."""
    return of_answer(tokens, cascade.calibrated) if tokens else inf


def disarmed(data: bytes, request: InferenceRequest) -> bytes:
    """A whole answer or a chunk without what only the gateway asked for."""
    if _HAS_LOGPROBS not in data:
        return data
    asked = _asked(request)
    fields: dict[str, Any] = dict(_decode_fields(data))
    choices: list[dict[str, Any]] = list(_decode_choices(fields["choices"]))
    for choice in choices:
        choice["logprobs"] = _NULL if asked is None else _fewer(choice["logprobs"], asked)
    fields["choices"] = choices
    return _encode(fields)


def _fewer(raw: msgspec.Raw, asked: int) -> Any:
    logprobs = msgspec.json.decode(raw)
    for token in (logprobs or {}).get("content") or ():
        token["top_logprobs"] = token["top_logprobs"][:asked]
    return logprobs


def _asked(request: InferenceRequest) -> int | None:
    """How many alternatives of each token of a chat the client wants, None if not even the token's own."""
    if bytes(request.fields.get("logprobs", b"")) != b"true":
        return None
    raw = request.fields.get("top_logprobs")
    return (None if raw is None else msgspec.json.decode(raw)) or 0


def _number(value: int) -> msgspec.Raw:
    return msgspec.Raw(b"%d" % value)


class HeldStream(StreamedAnswer):
    """A stream whose beginning is held back until it is known how sure the worker is."""

    __slots__ = ("_beginning", "_request", "_tokens")

    def __init__(
        self, stream: BegunStream, request: InferenceRequest, account: Account, clock: Callable[[], float]
    ) -> None:
        super().__init__(stream, request, account, clock)
        self._request = request
        self._tokens: Tokens | None = []
        self._beginning = b""

    async def hear(self, tokens: int) -> Tokens:
        """What the worker weighed in its first `tokens` tokens, or in all of them; nothing if it broke before."""
        heard: Tokens = []
        parts = []
        self._tokens = heard
        while len(heard) < tokens and (part := await super().next()):
            parts.append(part)
        self._tokens = None
        self._beginning = b"".join(parts)
        return [] if self._ended and not self.is_whole else heard

    async def next(self) -> bytes:
        part, self._beginning = self._beginning, b""
        return part or await super().next()

    def _pass(self, data: bytes) -> bytes:
        return self._take(self._splitter.feed(data))

    def _take(self, events: list[bytes]) -> bytes:
        parts = []
        for event in events:
            if self._ended:
                break
            parts.append(self._sift(super()._take([event])))
        return b"".join(parts)

    def _sift(self, event: bytes) -> bytes:
        if _HAS_LOGPROBS not in event:
            return event
        data = data_of(event)
        if self._tokens is not None:
            self._tokens += tokens_of(data)
        return b"data: " + disarmed(data, self._request) + b"\n\n"
