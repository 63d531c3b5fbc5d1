"""Which requests can be resumed, and the request that continues one on another worker. Pure.

What is continued is a prompt of token ids on `/v1/completions`: the ids of the first prompt, as the worker rendered it,
and of what it generated (vLLM's `return_token_ids`). Sampling by temperature, top-k and their like depends on all
tokens before, wherever the prompt ends, so the continuation is drawn as the rest would have been; with temperature 0
it *is* the rest. Whatever does not carry over that way makes a request not resumable, and so does every field that is
not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from app.inference import OWNED_FIELDS, InferenceRequest, Route
from app.relay.sse import EVENT_MAX_BYTES
from app.relay.transcript import Transcript

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for text completions, and vLLM's, for a limit that is left out or null."""

STOP_MAX_CHARS = 1024
# The worker's first event lists the prompt's ids, at most one a byte, in up to eight characters each.
PROMPT_MAX_BYTES = EVENT_MAX_BYTES // 8

# These act on every token alike, whether the ones before it were prompt or generated.
_CARRIED = frozenset(
    {
        "allowed_token_ids",
        "ignore_eos",
        "logit_bias",
        "min_p",
        "repetition_penalty",
        "skip_special_tokens",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_options",
        "temperature",
        "top_k",
        "top_p",
    }
)
_COUNTED = frozenset({"max_tokens", "max_completion_tokens", "min_tokens"})
# These shaped the prompt, whose ids are known by then.
_SPENT = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "chat_template_kwargs",
        "continue_final_message",
        "documents",
        "messages",
        "prompt",
    }
)
_WITHOUT_EFFECT = frozenset({"metadata", "model", "parallel_tool_calls", "service_tier", "store", "user"})
# Resumable only with these values: those that mean the same as leaving the field out.
_NEUTRAL: Mapping[str, frozenset[bytes]] = {
    "bad_words": frozenset({b"null", b"[]"}),
    "best_of": frozenset({b"null", b"1"}),
    "echo": frozenset({b"null", b"false"}),
    "frequency_penalty": frozenset({b"null", b"0", b"0.0"}),
    "functions": frozenset({b"null"}),
    "include_stop_str_in_output": frozenset({b"null", b"false"}),
    "logprobs": frozenset({b"null", b"false"}),
    "n": frozenset({b"null", b"1"}),
    "presence_penalty": frozenset({b"null", b"0", b"0.0"}),
    "prompt_logprobs": frozenset({b"null"}),
    "response_format": frozenset({b"null", b'{"type":"text"}', b'{"type": "text"}'}),
    "return_token_ids": frozenset({b"null", b"false"}),
    "structured_outputs": frozenset({b"null"}),
    "suffix": frozenset({b"null"}),
    "tool_choice": frozenset({b"null", b'"none"'}),
    "tools": frozenset({b"null", b"[]"}),
    "top_logprobs": frozenset({b"null", b"0"}),
    "use_beam_search": frozenset({b"null", b"false"}),
}
_KNOWN = _CARRIED | _COUNTED | _SPENT | _WITHOUT_EFFECT | OWNED_FIELDS | _NEUTRAL.keys() | {"seed"}
_TRUE = msgspec.Raw(b"true")


class NotResumable(Exception):
    """Why a stream cannot be resumed, in a word or two that are safe in a header."""


class _Part(msgspec.Struct):
    type: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What a continuation of `request` has to keep to, in tokens and characters; `max_tokens` None means the context.

    `request` is the client's own, `armed` the same with the token ids asked for.
    """

    request: InferenceRequest
    armed: InferenceRequest
    is_greedy: bool
    held_chars: int
    max_tokens: int | None
    min_tokens: int


def terms_of(request: InferenceRequest) -> Terms:
    """The terms on which the answer to `request` could be continued. Raises NotResumable."""
    if not request.stream or request.route not in (Route.CHAT, Route.COMPLETIONS):
        raise NotResumable("not a stream of completions")
    if request.prompt_bytes > PROMPT_MAX_BYTES:
        raise NotResumable("prompt too long")
    for name, raw in request.fields.items():
        if name not in _KNOWN:
            raise NotResumable("unknown field")
        if name in _NEUTRAL and bytes(raw) not in _NEUTRAL[name]:
            raise NotResumable(name)
    try:
        return _terms(request)
    except (msgspec.DecodeError, UnicodeDecodeError):  # the worker will say what is wrong with it
        raise NotResumable("invalid value") from None


def continuation(
    terms: Terms, transcript: Transcript, context_length: int | None, *, resumes_left: int
) -> InferenceRequest:
    """The request that makes another worker go on from the transcript's seam. Raises NotResumable.

    `context_length` is the worker's, in tokens: what is given no limit may go on up to it, but vLLM reads a text
    completion without one as 16 tokens.
    """
    _check(terms, transcript)
    done = transcript.seam.tokens
    prompt = [*transcript.prompt, *transcript.tokens[:done]]
    if terms.max_tokens is None and context_length is None:
        raise NotResumable("context length unknown")
    most = (context_length or 0) - len(prompt) if terms.max_tokens is None else terms.max_tokens - done
    if most < 1:
        raise NotResumable("finished")
    fields = {name: raw for name, raw in terms.request.fields.items() if name in _CARRIED or name == "seed"}
    fields["prompt"] = _raw(prompt)
    fields["max_tokens"] = _raw(most)
    if terms.min_tokens > done:
        fields["min_tokens"] = _raw(terms.min_tokens - done)
    if resumes_left:
        fields["return_token_ids"] = _TRUE
    return replace(terms.request, route=Route.COMPLETIONS, fields=fields)


def _check(terms: Terms, transcript: Transcript) -> None:
    if transcript.objection:
        raise NotResumable(transcript.objection)
    if not transcript.prompt or not transcript.tokens:
        raise NotResumable("nothing generated yet")
    if transcript.has_tail and not terms.is_greedy:
        raise NotResumable("sampled text without a seam")


def _terms(request: InferenceRequest) -> Terms:
    is_greedy = _value(request, "temperature", float | None) == 0
    stops = _stops(request)
    if stops and not is_greedy:
        raise NotResumable("stop strings with sampling")
    if not is_greedy and _value(request, "seed", int | None) is not None:
        raise NotResumable("seed with sampling")  # the rest of its random numbers cannot be asked for
    _check_prompt(request)
    return Terms(
        request=request,
        armed=replace(request, fields={**request.fields, "return_token_ids": _TRUE}),
        is_greedy=is_greedy,
        held_chars=max(map(len, stops), default=1) - 1,
        max_tokens=_max_tokens(request),
        min_tokens=_value(request, "min_tokens", int | None) or 0,
    )


def _check_prompt(request: InferenceRequest) -> None:
    """One prompt of text or token ids: several make several answers, and media are not in the ids."""
    if request.route is Route.CHAT:
        for message in _value(request, "messages", list[_Message]) or []:
            if isinstance(message.content, list) and any(part.type != "text" for part in message.content):
                raise NotResumable("media")
        return
    raw = bytes(request.fields.get("prompt", b""))
    if not raw.startswith(b'"') and not raw[1:].lstrip()[:1].isdigit():
        raise NotResumable("several prompts")


def _stops(request: InferenceRequest) -> list[str]:
    stop = _value(request, "stop", str | list[str] | None)
    stops = [stop] if isinstance(stop, str) else stop or []
    if sum(map(len, stops)) > STOP_MAX_CHARS:
        raise NotResumable("long stop strings")
    return stops


def _max_tokens(request: InferenceRequest) -> int | None:
    given: int | None = _value(request, "max_tokens", int | None)
    if request.route is Route.COMPLETIONS:
        return COMPLETION_MAX_TOKENS if given is None else given
    newer: int | None = _value(request, "max_completion_tokens", int | None)
    return given if newer is None else newer


def _value(request: InferenceRequest, name: str, expected: Any) -> Any:
    raw = request.fields.get(name)
    return None if raw is None else msgspec.json.decode(raw, type=expected)


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
