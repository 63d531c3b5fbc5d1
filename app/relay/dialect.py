"""What the events of each API mean: which carry a generated token, which carry usage, which is the last.

Chat and text completions are OpenAI's (`[DONE]` ends them), `/v1/responses` is OpenAI's newer API (ends with
`response.completed`, `.incomplete` or `.failed`), `/v1/messages` is Anthropic's (ends with `message_stop`). Shapes as
vLLM 0.32 sends them. An event that is understood by nobody here is relayed all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from app.errors import GatewayError
from app.inference import Route, TokenUsage

DONE = b"[DONE]"


class Meaning(msgspec.Struct, frozen=True):
    """What one event says. `only_usage`: it exists because usage was asked for, and says nothing else."""

    has_token: bool = False
    is_last: bool = False
    only_usage: bool = False
    is_error: bool = False
    usage: TokenUsage | None = None


NOTHING = Meaning()
TOKEN = Meaning(has_token=True)
LAST = Meaning(is_last=True)
ERROR = Meaning(is_error=True)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    """Usage in any of the three APIs' words."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    input_tokens_details: _PromptDetails | None = None
    cache_read_input_tokens: int | None = None

    def counted(self) -> TokenUsage:
        details = self.prompt_tokens_details or self.input_tokens_details
        cached = (details.cached_tokens if details else None) or self.cache_read_input_tokens
        return TokenUsage(
            self.prompt_tokens or self.input_tokens or 0, self.completion_tokens or self.output_tokens or 0, cached or 0
        )


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def generates(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls or self.reasoning_content or self.refusal)


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Nested(msgspec.Struct):
    usage: _Usage | None = None


class _TypedEvent(msgspec.Struct):
    """An event of `/v1/responses` or `/v1/messages`."""

    type: str = ""
    usage: _Usage | None = None
    response: _Nested | None = None
    message: _Nested | None = None


class _Answer(msgspec.Struct):
    """A whole answer, not streamed."""

    usage: _Usage | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_typed = msgspec.json.Decoder(_TypedEvent).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode


class Dialect(Protocol):
    """One API's way to stream."""

    def read(self, data: bytes) -> Meaning:
        """What an event with this data means. Never raises."""

    def error_event(self, error: GatewayError) -> bytes:
        """The event that tells a client, inside a stream, that it broke."""


class CompletionsDialect:
    """Chat and text completions."""

    def read(self, data: bytes) -> Meaning:
        if data == DONE:
            return LAST
        try:
            chunk = _decode_chunk(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return NOTHING
        choices = chunk.choices or ()
        if chunk.usage is not None:
            return Meaning(_any_token(choices), only_usage=chunk.choices == [], usage=chunk.usage.counted())
        if chunk.error is not None:
            return ERROR
        return TOKEN if _any_token(choices) else NOTHING

    def error_event(self, error: GatewayError) -> bytes:
        return b"data: " + error.body() + b"\n\n"


class TypedDialect:
    """APIs whose events name their type: `/v1/responses` and `/v1/messages`."""

    def __init__(self, *, last: frozenset[str], tokens: frozenset[str]) -> None:
        self._last = last
        self._tokens = tokens

    def read(self, data: bytes) -> Meaning:
        try:
            event = _decode_typed(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return NOTHING
        nested = event.response or event.message
        usage = event.usage or (nested.usage if nested else None)
        counted = usage.counted() if usage is not None else None
        return Meaning(
            has_token=event.type in self._tokens,
            is_last=event.type in self._last,
            is_error=event.type in ("error", "response.failed"),
            usage=counted,
        )

    def error_event(self, error: GatewayError) -> bytes:
        told = {
            "type": "error",
            **error.as_object(),
            "code": error.code,
            "message": error.message,
            "param": error.param,
        }
        return b"event: error\ndata: " + msgspec.json.encode(told) + b"\n\n"


_COMPLETIONS = CompletionsDialect()
_RESPONSES = TypedDialect(
    last=frozenset({"response.completed", "response.incomplete", "response.failed"}),
    tokens=frozenset(
        {
            "response.output_text.delta",
            "response.reasoning_text.delta",
            "response.reasoning.delta",
            "response.function_call_arguments.delta",
            "response.refusal.delta",
        }
    ),
)
_MESSAGES = TypedDialect(last=frozenset({"message_stop"}), tokens=frozenset({"content_block_delta"}))


def dialect_of(route: Route) -> Dialect:
    if route is Route.RESPONSES:
        return _RESPONSES
    return _MESSAGES if route is Route.MESSAGES else _COMPLETIONS


def usage_of_answer(body: bytes) -> TokenUsage | None:
    """The usage in a whole answer, None where it states none. Raises msgspec.DecodeError when it is not JSON."""
    try:
        answer = _decode_answer(body)
    except msgspec.ValidationError:  # JSON, in a shape without usage: tokenize, rerank, embeddings of some models
        return None
    return answer.usage.counted() if answer.usage is not None else None


def _any_token(choices: Sequence[_Choice]) -> bool:
    for choice in choices:  # a generator would cost more than all it looks at
        delta = choice.delta
        if choice.text or (delta is not None and (delta.content or delta.generates)):
            return True
    return False
